"""A folder of scans: masks as stock makes them, one bad case costs no other, nothing is overwritten unasked."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import pickle
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.ensembling.ensemble import average_probabilities, merge_files
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from mfm_nnunet import device
from mfm_nnunet.errors import CasesFailedError, MFMError
from mfm_nnunet.jobs import predict
from mfm_nnunet.jobs.predict import PredictReport
from mfm_nnunet.prediction import cases, journal
from mfm_nnunet.prediction.model import Model
from mfm_nnunet.requests import PredictRequest
from tests.builders.groups import started
from tests.builders.tiny_model import dataset_json, save_model, stock_predictor, tiny_plans, voxels_of, write_scan

BOOKKEEPING = {"cases.jsonl", "dataset.json", "plans.json", "predict_from_raw_data_args.json", "report.html"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plans = tiny_plans(spacing=(1.2, 0.9, 1.1), transpose=(1, 0, 2))
    return save_model(tmp_path_factory.mktemp("results") / "model", plans, dataset_json(), mirror_axes=(1,))


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scans")
    for seed, name in enumerate(("a", "b.1", "c c")):
        write_scan(folder / f"{name}_0000.nii.gz", seed, spacing=(0.7, 1.1, 1.0))
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def predict_folder(model: Path, source: Path, out: Path, **options: Any) -> PredictReport:
    return predict.predict(source, out, model_folder=model, **{"device": "cpu", "step_size": 1.0, **options})


def _failed(model: Path, source: Path, out: Path, **options: Any) -> dict[str, str]:
    """Code of each failed case."""
    with pytest.raises(CasesFailedError) as caught:
        predict_folder(model, source, out, **options)
    return {failure.case: failure.code for failure in caught.value.failures}


def _masks(folder: Path, ending: str = ".nii.gz") -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob(f"*{ending}"))}


def _journal(out: Path, name: str = "cases.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def _stock(predictor: nnUNetPredictor, files: list[list[Path]], out: Path, ending: str, **options: Any) -> Path:
    """Predict with nnU-Net, in this process."""
    out.mkdir()
    targets = [str(out / case[0].name[: -len(ending) - 5]) for case in files]
    names = [[str(file) for file in case] for case in files]
    predictor.predict_from_files_sequential(names, targets, **options)
    return out


@pytest.mark.parametrize("has_bf16", [True, False])
def test_fast_is_without_mirroring_and_in_bf16_where_the_cpu_has_it(
    model: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    has_bf16: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(device, "has_bf16", lambda: has_bf16)
    dtypes: set[torch.dtype] = set()
    forward = Model._forward

    def record(self: Model, tile: torch.Tensor) -> torch.Tensor:
        dtypes.add((logits := forward(self, tile)).dtype)
        return logits

    monkeypatch.setattr(Model, "_forward", record)
    predict_folder(model, scans, tmp_path / "fast", fast=True)
    assert dtypes == {torch.bfloat16 if has_bf16 else torch.float32}
    assert ("does not compute in bf16" in caplog.text) is not has_bf16
    settings = json.loads((tmp_path / "fast" / "predict_from_raw_data_args.json").read_text())["settings"]
    assert settings["mirroring"] is False
    assert settings.get("precision") == ("bf16" if has_bf16 else None)
    predict_folder(model, scans, tmp_path / "plain", mirroring=False)
    for file in (tmp_path / "plain").glob("*.nii.gz"):
        same = voxels_of(file) == voxels_of(tmp_path / "fast" / file.name)
        assert same.mean() >= (0.97 if has_bf16 else 1)


def test_masks_are_those_of_stock_with_the_geometry_of_the_scan(
    model: Path, scans: Path, out: Path, tmp_path: Path
) -> None:
    report = predict_folder(model, scans, out, step_size=0.5)
    assert report == PredictReport(["a", "b.1", "c c"], [], [], out)
    assert {file.name for file in out.iterdir()} == BOOKKEEPING | {"a.nii.gz", "b.1.nii.gz", "c c.nii.gz"}
    files = [[file] for file in sorted(scans.iterdir())]
    stock = _stock(stock_predictor(model), files, tmp_path / "stock", ".nii.gz")
    different = total = 0
    for name in report.done:
        mask, expected = voxels_of(out / f"{name}.nii.gz"), voxels_of(stock / f"{name}.nii.gz")
        assert mask.dtype == expected.dtype == np.uint8
        assert set(np.unique(mask)) == {0, 1, 2}
        different += int((mask != expected).sum())
        total += mask.size
        scan = nibabel.load(scans / f"{name}_0000.nii.gz").header
        header = nibabel.load(out / f"{name}.nii.gz").header
        for field in ("dim", "pixdim", "srow_x", "srow_y", "srow_z", "qoffset_x", "qform_code", "sform_code"):
            assert header[field].tobytes() == scan[field].tobytes()
    print(f"{different} of {total} voxels differ from stock")
    assert different == 0


def test_the_journal_tells_where_a_mask_comes_from(model: Path, scans: Path, out: Path) -> None:
    predict_folder(model, scans, out)
    lines = _journal(out)
    assert {line["status"] for line in lines} == {"started", "publishing", "done"}
    assert [line["case"] for line in lines if line["status"] == "done"] == ["a", "b.1", "c c"]
    last = lines[-1]
    assert last["case"] == "c c"
    assert list(last["input"]) == ["c c_0000.nii.gz"]
    assert list(last["output"]) == ["c c.nii.gz"]
    assert len(last["model"]) == 64
    assert last["settings"]["step_size"] == 1.0
    assert last["settings"]["folds"] == [0]
    assert set(last["versions"]) == {"mfm_nnunet", "nnunetv2", "torch", "device"}
    assert json.loads((out / "plans.json").read_text()) == json.loads((model / "plans.json").read_text())
    assert json.loads((out / "dataset.json").read_text()) == json.loads((model / "dataset.json").read_text())
    for file in out.iterdir():
        assert str(scans.parent).encode() not in file.read_bytes(), f"{file.name} holds an absolute path"


def test_resuming_keeps_what_is_done_and_does_the_rest(model: Path, scans: Path, out: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(scans, tmp_path / "scans"))
    whole = (source / "b.1_0000.nii.gz").read_bytes()
    (source / "b.1_0000.nii.gz").write_bytes(b"")
    assert _failed(model, source, out) == {"b.1": "E_EMPTY"}
    first = _masks(out)
    (source / "b.1_0000.nii.gz").write_bytes(whole)
    report = predict_folder(model, source, out, resume=True)
    assert (report.done, report.skipped) == (["b.1"], ["a", "c c"])
    assert {name: mask for name, mask in _masks(out).items() if name in first} == first
    (out / "a.nii.gz").unlink()
    report = predict_folder(model, source, out, resume=True)
    assert (report.done, report.skipped) == (["a"], ["b.1", "c c"])
    assert _masks(out)["a.nii.gz"] == first["a.nii.gz"]
    write_scan(source / "c c_0000.nii.gz", 77)
    report = predict_folder(model, source, out, resume=True)
    assert (report.done, report.skipped) == (["c c"], ["a", "b.1"])
    assert _masks(out)["c c.nii.gz"] != first["c c.nii.gz"]


def test_masks_of_two_models_are_not_mixed(
    model: Path, scans: Path, out: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    predict_folder(model, scans, out, save_probabilities=True)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    labels = {"background": 0, "b": 1, "a": 2}
    other = save_model(tmp_path / "m", tiny_plans(spacing=(1.0, 1.0, 1.0)), dataset_json(labels))
    with pytest.raises(MFMError, match=r"E_EXISTS.*another model.*--overwrite"):
        predict_folder(other, scans, out, resume=True)
    with pytest.raises(MFMError, match=r"E_EXISTS.*mirroring was True, is False"):
        predict_folder(model, scans, out, resume=True, save_probabilities=True, mirroring=False)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    source = tmp_path / "scans"
    source.mkdir()
    for name in ("a_0000.nii.gz", "b.1_0000.nii.gz"):
        shutil.copy(scans / name, source)
    with caplog.at_level("WARNING"):
        assert predict_folder(other, source, out, overwrite=True).done == ["a", "b.1"]
    assert "1 masks of other inputs were kept (c c.nii.gz)" in caplog.text
    assert sorted(file.name for file in out.iterdir() if file.suffix in (".npz", ".pkl")) == ["c c.npz", "c c.pkl"]
    assert json.loads((out / "dataset.json").read_text())["labels"] == labels
    assert predict_folder(other, source, out, resume=True).skipped == ["a", "b.1"]


@contextlib.contextmanager
def killed_at(case: str, monkeypatch: pytest.MonkeyPatch, is_published: bool = False) -> Iterator[None]:
    """End a run as a kill does, before or after the mask of a case gets its final name."""
    publish = predict.publish

    def killed(stage: Path, folder: Path) -> None:
        is_there = (stage / f"{case}.nii.gz").exists()
        if not is_there or is_published:
            publish(stage, folder)
        if is_there:
            shutil.copytree(stage, folder / (stage.name + "x"))  # SIGKILL leaves the staging folder
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(predict, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            yield


def test_a_killed_run_that_replaces_masks_goes_on(
    model: Path, scans: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The masks of the model before are known and replaced, their probabilities too."""
    predict_folder(model, scans, out, save_probabilities=True)
    other = save_model(tmp_path / "m", tiny_plans(spacing=(1.0, 1.0, 1.0)), dataset_json())
    with killed_at("b.1", monkeypatch):
        predict_folder(other, scans, out, overwrite=True)
    report = predict_folder(other, scans, out, resume=True)
    assert (sorted(report.done), report.skipped) == (["b.1", "c c"], ["a"])
    assert not [*out.glob("*.npz"), *out.glob("*.pkl")]
    predict_folder(other, scans, tmp_path / "clean")
    assert _masks(out) == _masks(tmp_path / "clean")


@pytest.mark.parametrize("moment", ["before renaming", "after renaming", "within a line"])
def test_a_killed_run_goes_on_with_the_same_result(
    model: Path, scans: Path, out: Path, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict_folder(model, scans, tmp_path / "clean")
    with killed_at("b.1", monkeypatch, moment != "before renaming"):
        predict_folder(model, scans, out)
    assert _masks(out).keys() == ({"a.nii.gz"} if moment == "before renaming" else {"a.nii.gz", "b.1.nii.gz"})
    if moment == "within a line":
        with open(out / "cases.jsonl", "ab") as file:
            file.write(b'{"case": "c c", "sta')
    report = predict_folder(model, scans, out, resume=True)
    assert report.skipped == (["a"] if moment == "before renaming" else ["a", "b.1"])
    assert _masks(out) == _masks(tmp_path / "clean")
    assert {file.name for file in out.iterdir()} == BOOKKEEPING | set(_masks(out))
    last = (out / "cases.jsonl").read_text().splitlines()[-2:]  # an earlier line may be cut off
    assert {json.loads(line)["case"] for line in last} == {"c c"}


KILLED = """
import os, pickle, signal, sys
from mfm_nnunet.jobs import predict

arguments, killer = pickle.loads(sys.stdin.buffer.read())
prepare = predict.prepare_case

def prepare_or_die(model, case, options):
    if case.name == killer:
        os.kill(os.getpid(), signal.SIGKILL)
    return prepare(model, case, options)

predict.prepare_case = prepare_or_die
model, scans, out, options = arguments
predict.predict(scans, out, model_folder=model, **options)
"""


def test_a_case_that_kills_the_process_costs_no_other(model: Path, scans: Path, out: Path) -> None:
    for run, masks in ((0, set()), (1, {"a.nii.gz", "c c.nii.gz"})):
        content = pickle.dumps(((model, scans, out, {"device": "cpu", "step_size": 1.0, "resume": True}), "b.1"))
        process = subprocess.run([sys.executable, "-c", KILLED], input=content, timeout=120, check=False)
        assert process.returncode == -signal.SIGKILL
        assert _masks(out).keys() >= masks, f"run {run}"
    with pytest.raises(CasesFailedError, match="died 2 times") as caught:
        predict_folder(model, scans, out, resume=True)
    assert [(failure.case, failure.code) for failure in caught.value.failures] == [("b.1", "E_PROCESS_DIED")]
    assert predict_folder(model, scans, out, resume=True).done == ["b.1"]


STOPPED = """
import argparse, pickle, sys, threading
from pathlib import Path
from mfm_nnunet.cli.run import run_command
from mfm_nnunet.jobs import predict

model, scans, out, options, ready = pickle.loads(Path(sys.argv[1]).read_bytes())

def hang(*arguments):
    ready.touch()
    threading.Event().wait(600)

predict.prepare_case = hang
job = lambda arguments: predict.predict(scans, out, model_folder=model, **options)
sys.exit(run_command(job, argparse.Namespace(workspace=sys.argv[1] + ".w", debug=False)))
"""


def test_a_signal_does_not_wait_for_a_reader(model: Path, scans: Path, out: Path, tmp_path: Path) -> None:
    """A damaged file may keep a reader busy for ever; a run that was stopped suspects no case."""
    number = signal.SIGUSR1
    script, arguments, ready = tmp_path / "predict.py", tmp_path / "arguments", tmp_path / "ready"
    script.write_text(STOPPED)
    arguments.write_bytes(pickle.dumps((model, scans, out, {"device": "cpu", "step_size": 1.0}, ready)))
    process = started(script, arguments)
    until = time.monotonic() + 120
    while not ready.exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert errors.splitlines()[-1] == f"stopped by {number.name}."
    assert [line["status"] for line in _journal(out)] == ["started", "started", "stopped", "stopped"]
    assert not list(out.glob(".partial_*"))


def test_a_run_that_was_stopped_suspects_no_case(
    model: Path, scans: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Model, *arguments: Any, **options: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Model, "predict_logits", stop)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                predict_folder(model, scans, out, resume=True)
    assert {line["case"] for line in _journal(out) if line["status"] == "stopped"} == {"a", "b.1"}
    assert predict_folder(model, scans, out, resume=True).done == ["a", "b.1", "c c"]


def test_errors_inside_are_told_apart(model: Path, scans: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predict, errors = Model.predict_logits, [torch.OutOfMemoryError("CUDA"), RuntimeError("device-side assert"), None]
    calls: list[int] = []

    def sometimes(self: Model, *arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        error = errors[len(calls) - 1]
        if error is not None:
            raise error
        return predict(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Model, "predict_logits", sometimes)
        assert _failed(model, scans, out) == {"a": "E_OOM", "b.1": "E_INTERNAL"}
    assert len(calls) == 3  # nothing was tried twice
    assert "device-side assert" in (out / "errors" / "b.1.txt").read_text()
    assert predict_folder(model, scans, out, resume=True).done == ["a", "b.1"]
    assert not (out / "errors" / "b.1.txt").exists()


def test_what_cannot_be_read_or_written_costs_its_own_case(
    model: Path, scans: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(scans, tmp_path / "scans"))
    shutil.copy(source / "a_0000.nii.gz", source / ("d" * 243 + "_0000.nii.gz"))
    shutil.copy(source / "a_0000.nii.gz", source / ("e" * 246 + ".nii.gz"))  # a mask's ending makes it too long
    assert _failed(model, source, out) == {"e" * 246 + ".nii.gz": "E_CHANNELS"}
    for file in source.glob("[de]*"):
        file.unlink()
    original = cases.sha256

    def unreadable(file: Path) -> str:
        if file.name.startswith("b"):
            raise OSError(errno.EIO, "Input/output error")
        return original(file)

    with monkeypatch.context() as patch:
        patch.setattr(cases, "sha256", unreadable)
        (out / "a.nii.gz").unlink()
        assert _failed(model, source, out, resume=True) == {"b.1": "E_NOT_FOUND"}
    assert (out / "a.nii.gz").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(journal, "sha256", unreadable)
        assert _failed(model, source, out, resume=True) == {"b.1": "E_NOT_FOUND"}

    def breaks(loaded: Model, case: Any, options: PredictRequest) -> Any:
        raise KeyError(case.name)

    (out / "errors").write_text("a file where the folder of reports should be")
    assert predict_folder(model, scans, out, overwrite=True).done == ["a", "b.1", "c c"]
    monkeypatch.setattr(predict, "prepare_case", breaks)
    with pytest.raises(CasesFailedError) as caught:
        predict_folder(model, source, out, overwrite=True)
    assert [failure.code for failure in caught.value.failures] == ["E_INTERNAL"] * 3
    assert all("Traceback" in failure.details for failure in caught.value.failures)


@pytest.mark.parametrize("change", ["grown", "unlinked", "none"])
def test_a_file_that_cannot_be_read_because_it_changes(
    change: str, model: Path, scans: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A half-written file looks damaged; that it changed is what the user needs to know."""
    source = Path(shutil.copytree(scans, tmp_path / "scans"))
    read = cases.read_image

    def damaged_meanwhile(files: Sequence[Path], reader: str) -> Any:
        if not files[0].name.startswith("b"):
            return read(files, reader)
        if change == "grown":
            files[0].write_bytes(files[0].read_bytes() + b"x")
        elif change == "unlinked":
            files[0].unlink()
        raise MFMError("E_FORMAT", "damaged")

    monkeypatch.setattr(cases, "read_image", damaged_meanwhile)
    assert _failed(model, source, out) == {"b.1": "E_CHANGED" if change == "grown" else "E_FORMAT"}


def test_a_scan_that_is_replaced_after_it_was_read_does_not_lend_its_geometry(
    model: Path, scans: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(scans, tmp_path / "scans"))
    file = source / "a_0000.nii.gz"
    before = nibabel.load(file).affine
    predict = Model.predict_logits

    def replaced_meanwhile(self: Model, *arguments: Any, **options: Any) -> torch.Tensor:
        voxels = np.asarray(nibabel.load(file).dataobj)
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([3.0, 3.0, 3.0, 1.0])), file)
        return predict(self, *arguments, **options)

    monkeypatch.setattr(Model, "predict_logits", replaced_meanwhile)
    predict_folder(model, source, out)
    assert np.array_equal(nibabel.load(out / "a.nii.gz").affine, before)


def test_a_second_run_on_the_same_folder_is_refused(
    model: Path, scans: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class SecondRun(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            with pytest.raises(MFMError, match="another run"):
                predict_folder(model, scans, out, resume=True)

    predict.logger.addHandler(handler := SecondRun())
    with caplog.at_level("INFO", "mfm_nnunet.jobs.predict"):
        assert predict_folder(model, scans, out).done == ["a", "b.1", "c c"]
    predict.logger.removeHandler(handler)
    lines = [record.getMessage() for record in caplog.records if record.name == predict.logger.name]
    assert [line.split(":")[0] for line in lines] == ["1 of 3  a", "2 of 3  b.1", "3 of 3  c c"]


def test_parts_share_a_folder(model: Path, scans: Path, out: Path, tmp_path: Path) -> None:
    clean = tmp_path / "clean"
    predict_folder(model, scans, clean)
    for part, names in ((1, ["b.1"]), (0, ["a", "c c"])):
        options = {"num_parts": 2, "part_id": part}
        assert predict_folder(model, scans, out, **options).done == names
        with pytest.raises(MFMError, match="E_EXISTS"):
            predict_folder(model, scans, out, **options)
        assert predict_folder(model, scans, out, resume=True, **options).skipped == names
    assert _masks(out) == _masks(clean)
    assert [line["status"] for line in _journal(out, "cases_1of2.jsonl")] == ["started", "publishing", "done"]
    assert predict_folder(model, scans, out, resume=True).skipped == ["a", "b.1", "c c"]
    shared = tmp_path / "shared"
    predict_folder(model, scans, shared, num_parts=2)
    (shared / "notes.txt").write_text("mine")
    with pytest.raises(MFMError, match=r"E_EXISTS.*notes\.txt"):
        predict_folder(model, scans, shared, num_parts=2, part_id=1)


def test_names_without_a_channel_number(model: Path, scans: Path, out: Path, tmp_path: Path) -> None:
    source = tmp_path / "plain"
    source.mkdir()
    shutil.copy(scans / "a_0000.nii.gz", source / "a.nii.gz")
    assert predict_folder(model, source, out).done == ["a"]
    two = save_model(tmp_path / "m", tiny_plans(channels=2), dataset_json(channels=("T1", "T2")))
    with pytest.raises(MFMError, match=r"E_CHANNELS.*_0000\.nii\.gz \.\.\. <case>_0001\.nii\.gz"):
        predict_folder(two, source, tmp_path / "out2")
    (source / "b_0000.nii.gz").write_bytes((scans / "a_0000.nii.gz").read_bytes())
    assert _failed(model, source, tmp_path / "out3") == {"a.nii.gz": "E_CHANNELS"}
    assert not (tmp_path / "out2").exists()


def test_formats_may_be_mixed(
    model: Path, scans: Path, out: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Volumes of any format give the same mask on their own grid; pictures are left out, doubled names refused."""
    source = tmp_path / "scans"
    source.mkdir()
    image = sitk.ReadImage(str(scans / "a_0000.nii.gz"))
    for name in ("a_0000.nii.gz", "b_0000.nrrd", "c_0000.nii", "d_0000.mha", "e_0000.mha", "e_0000.nrrd"):
        sitk.WriteImage(image, str(source / name))
    shutil.copy(scans / "a_0000.nii.gz", source / "f_0000.NII.GZ")
    (source / "g.png").write_bytes(b"left out")
    with caplog.at_level("WARNING"), pytest.raises(CasesFailedError) as caught:
        predict_folder(model, source, out)
    codes = {failure.case: failure.code for failure in caught.value.failures}
    assert codes == {"e": "E_CONFIG", "f_0000.NII.GZ": "E_FORMAT"}
    assert "Rename it to f_0000.nii.gz" in str(caught.value)
    assert "1 images are left out" in caplog.text
    assert _masks(out).keys() == {f"{name}.nii.gz" for name in "abcd"}
    for name in "bcd":
        assert np.array_equal(voxels_of(out / f"{name}.nii.gz"), voxels_of(out / "a.nii.gz"))
        mask = sitk.ReadImage(str(out / f"{name}.nii.gz"))
        for get in ("GetSpacing", "GetOrigin", "GetDirection"):
            assert np.allclose(getattr(mask, get)(), getattr(image, get)(), atol=1e-6)


def test_one_file(model: Path, scans: Path, out: Path, tmp_path: Path) -> None:
    """Of a folder with others; of several channels any one names the case; a file of another kind is refused."""
    assert predict_folder(model, scans / "b.1_0000.nii.gz", out).done == ["b.1"]
    two = save_model(tmp_path / "m", tiny_plans(channels=2), dataset_json(channels=("T1", "T2")))
    (tmp_path / "in").mkdir()
    for name in ("x", "y"):
        for channel in (0, 1):
            write_scan(tmp_path / "in" / f"{name}_000{channel}.nii.gz", channel)
    assert predict_folder(two, tmp_path / "in" / "y_0001.nii.gz", tmp_path / "out2").done == ["y"]
    (tmp_path / "notes.txt").write_text("x")
    for file in (tmp_path / "notes.txt", tmp_path / "nowhere.nii.gz"):
        with pytest.raises(MFMError, match="E_NOT_FOUND"):
            predict_folder(model, file, tmp_path / "out3")
    assert not (tmp_path / "out3").exists()


def test_names_that_some_file_systems_take_for_one(model: Path, scans: Path, out: Path, tmp_path: Path) -> None:
    source = tmp_path / "scans"
    source.mkdir()
    names = ["Patient", "patient", *(unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))]
    for name in (*names, "other"):
        shutil.copy(scans / "a_0000.nii.gz", source / f"{name}_0000.nii.gz")
    if len(list(source.iterdir())) < 5:
        pytest.skip("this file system is one of them")
    assert _failed(model, source, out) == dict.fromkeys(names, "E_CONFIG")
    assert _masks(out).keys() == {"other.nii.gz"}


def test_several_channels(scans: Path, out: Path, tmp_path: Path) -> None:
    plans = tiny_plans(channels=2, reader="NibabelIO")
    folder = save_model(tmp_path / "m", plans, dataset_json(channels=("T1", "T2")))
    source = tmp_path / "scans"
    source.mkdir()
    for channel in (0, 1):
        write_scan(source / f"both_000{channel}.nii.gz", channel)
        write_scan(source / f"apart_000{channel}.nii.gz", channel, (20, 18, 16 + channel))
    write_scan(source / "half_0000.nii.gz")
    assert _failed(folder, source, out) == {"apart": "E_CHANNELS", "half": "E_CHANNELS"}
    files = [[source / "both_0000.nii.gz", source / "both_0001.nii.gz"]]
    stock = _stock(stock_predictor(folder, step_size=1.0), files, tmp_path / "stock", ".nii.gz")
    assert np.array_equal(voxels_of(out / "both.nii.gz"), voxels_of(stock / "both.nii.gz"))
    assert list(_journal(out)[-1]["input"]) == ["both_0000.nii.gz", "both_0001.nii.gz"] or _journal(out)[-1]["code"]


def test_a_channel_of_one_value_is_noted_with_the_mask(
    out: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_model(tmp_path / "m", tiny_plans(channels=2), dataset_json(channels=("T1", "T2")))
    source = tmp_path / "scans"
    source.mkdir()
    for name in ("a", "b"):
        write_scan(source / f"{name}_0000.nii.gz")
        image = nibabel.load(write_scan(source / f"{name}_0001.nii.gz", 1))
    nibabel.save(nibabel.Nifti1Image(np.zeros(image.shape, np.int16), image.affine), source / "b_0001.nii.gz")
    for resume, done in ((False, ["a", "b"]), (True, [])):
        caplog.clear()
        with caplog.at_level("WARNING"):
            report = predict_folder(folder, source, out, resume=resume)
        assert (report.done, report.warnings) == (done, ["b: channel 1 is 0 everywhere"])
        assert "b: channel 1 is 0 everywhere" in caplog.messages[-1]
    assert [line["warnings"] for line in _journal(out) if line["status"] == "done"] == [
        [],
        ["channel 1 is 0 everywhere"],
    ]


def test_voxels_beside_their_header_are_part_of_the_scan(out: Path, tmp_path: Path) -> None:
    plans = tiny_plans(reader="SimpleITKIO")
    folder = save_model(tmp_path / "m", plans, dataset_json(file_ending=".mhd"))
    source = tmp_path / "scans"
    source.mkdir()
    write_scan(source / "a_0000.mhd")
    assert predict_folder(folder, source, out).done == ["a"]
    assert list(_journal(out)[-1]["input"]) == ["a_0000.mhd", "a_0000.raw"]
    assert predict_folder(folder, source, out, resume=True).skipped == ["a"]
    before = (source / "a_0000.mhd").read_bytes()
    write_scan(source / "a_0000.mhd", seed=5)
    assert (source / "a_0000.mhd").read_bytes() == before
    assert predict_folder(folder, source, out, resume=True).done == ["a"]


def test_other_volumes_and_pictures(out: Path, tmp_path: Path) -> None:
    for ending, reader, dimensions in ((".nrrd", "SimpleITKIO", 3), (".png", "NaturalImage2DIO", 2)):
        channels = ("R", "G", "B") if ending == ".png" else ("CT",)
        folder = save_model(
            tmp_path / f"m{ending}",
            tiny_plans(dimensions, reader=reader, channels=len(channels)),
            dataset_json(channels=channels, file_ending=ending),
        )
        source = tmp_path / f"scans{ending}"
        source.mkdir()
        if ending == ".png":
            colours = np.random.default_rng(0).integers(0, 255, (30, 25, 3)).astype(np.uint8)
            sitk.WriteImage(sitk.GetImageFromArray(colours, isVector=True), str(source / "case_0000.png"))
        else:
            write_scan(source / "case_0000.nrrd")
        assert predict_folder(folder, source, out / ending).done == ["case"]
        predictor = stock_predictor(folder, step_size=1.0)
        stock = _stock(predictor, [[source / f"case_0000{ending}"]], tmp_path / f"stock{ending}", ending)
        mask, expected = (place / f"case{ending}" for place in (out / ending, stock))
        assert np.array_equal(voxels_of(mask), voxels_of(expected))
        assert len(np.unique(voxels_of(mask))) > 1


def test_a_cascade_needs_the_masks_of_the_previous_stage(scans: Path, out: Path, tmp_path: Path) -> None:
    plans = tiny_plans()
    plans["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"
    folder = save_model(tmp_path / "m", plans, dataset_json())
    with pytest.raises(MFMError, match=r"E_CONFIG.*3d_lowres"):
        predict_folder(folder, scans, out)
    previous = tmp_path / "lowres"
    previous.mkdir()
    for scan in sorted(scans.iterdir())[:2]:
        image = nibabel.load(scan)
        labels = (np.asarray(image.dataobj) > 100).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(labels, image.affine), previous / scan.name.replace("_0000", ""))
    assert _failed(folder, scans, out, previous_stage=previous) == {"c c": "E_NOT_FOUND"}
    none = save_model(tmp_path / "n", tiny_plans(), dataset_json())
    with pytest.raises(MFMError, match="E_CONFIG"):
        predict_folder(none, scans, tmp_path / "o", previous_stage=previous)


def test_masks_of_a_previous_stage_that_are_of_another_scan(scans: Path, out: Path, tmp_path: Path) -> None:
    plans = tiny_plans()
    plans["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"
    folder = save_model(tmp_path / "m", plans, dataset_json())
    previous = tmp_path / "lowres"
    previous.mkdir()
    for name, shift, label in (("a", 0, 2), ("b.1", 30, 2), ("c c", 0, 3)):
        image = nibabel.load(scans / f"{name}_0000.nii.gz")
        affine = image.affine.copy()
        affine[2, 3] += shift
        labels = label * (np.asarray(image.dataobj) > 100).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(labels, affine), previous / f"{name}.nii.gz")
    assert _failed(folder, scans, out, previous_stage=previous) == {"b.1": "E_LABEL_GEOMETRY", "c c": "E_LABEL_VALUE"}
    assert _masks(out).keys() == {"a.nii.gz"}
    with pytest.raises(MFMError, match=r"E_CONFIG.*previous stage"):
        predict_folder(folder, scans, previous, previous_stage=previous, overwrite=True)


def test_probabilities_can_be_ensembled_by_stock(model: Path, scans: Path, out: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    predict_folder(model, scans, out, save_probabilities=True)
    files = [[scans / "a_0000.nii.gz"]]
    stock = _stock(stock_predictor(model, step_size=1.0), files, tmp_path / "stock", ".nii.gz", save_probabilities=True)
    ours, theirs = (np.load(place / "a.npz")["probabilities"] for place in (out, stock))
    assert ours.dtype == theirs.dtype
    # The images differ in the seventh digit, so that a logit may round to the next number of half precision.
    print("largest difference of a probability", np.abs(ours - theirs).max())
    assert np.allclose(ours, theirs, atol=5e-3)
    assert np.array_equal(voxels_of(out / "a.nii.gz"), voxels_of(stock / "a.nii.gz"))
    manager = PlansManager(json.loads((out / "plans.json").read_text()))
    pair = [str(out / "a.npz"), str(stock / "a.npz")]
    assert np.allclose(average_probabilities(pair), ours, atol=5e-3)
    labels = manager.get_label_manager(json.loads((out / "dataset.json").read_text()))
    merge_files(pair, str(tmp_path / "merged"), ".nii.gz", manager.image_reader_writer_class(), labels)
    assert np.array_equal(voxels_of(tmp_path / "merged.nii.gz"), voxels_of(out / "a.nii.gz"))
    report = predict_folder(model, scans, out, save_probabilities=True, resume=True)
    assert report.skipped == ["a", "b.1", "c c"]
    (out / "a.npz").unlink()
    report = predict_folder(model, scans, out, save_probabilities=True, resume=True)
    assert report.done == ["a"]
