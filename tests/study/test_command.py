"""The command: bad input is one message and exit code 2 before any work; and (long) the whole study."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from mfm_nnunet.cli import study as command
from mfm_nnunet.errors import CaseFailure
from mfm_nnunet.study import cells
from mfm_nnunet.study.design import Cell
from mfm_nnunet.study.evaluation import evaluate_cell
from mfm_nnunet.study.folder import read_study
from tests.builders import small
from tests.builders.architectures import resenc
from tests.builders.site import edit_json
from tests.builders.tiny_data import pretrained_checkpoint
from tests.builders.unions import write_dataset as write_spheres

pytest.importorskip("surface_distance", reason="the extra 'study' is not installed")
ASKED = {
    "-d": "4", "-c": "3d_fullres", "--labels": "2 4", "--arms": "scratch", "--test": "3", "--seeds": "1",
    "--workspace": ".",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with a dataset of empty files; where a check let them through, reading would fail."""
    small.write_raw(tmp_path)
    (tmp_path / "weights.pth").write_bytes(b"none")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def line(changes: dict[str, str]) -> list[str]:
    return [word for flag, value in {**ASKED, **changes}.items() for word in (flag, *value.split())]


@pytest.mark.parametrize(
    ("changes", "code", "hint"),
    [
        ({"-d": "5"}, "E_NOT_FOUND", "there is no dataset 5"),
        ({"-c": "3d_cascade_fullres"}, "E_CONFIG", "one stage"),
        ({"-c": "3d_fulres"}, "E_CONFIG", "Did you mean '3d_fullres'?"),
        ({"--labels": "8"}, "E_CONFIG", "7 subjects"),
        ({"--arms": "scratch nowhere.pth"}, "E_NOT_FOUND", "nowhere.pth"),
        ({"--arms": "scratch scratch"}, "E_CONFIG", "'scratch'"),
        ({"--arms": "a=weights.pth A=weights.pth"}, "E_CONFIG", "'A'"),
        ({"--arms": "scratch=weights.pth"}, "E_CONFIG", "cannot be named"),
        ({"--arms": "../x=weights.pth"}, "E_CONFIG", "cannot be named"),
        ({"--arms": "weights.pth"}, "E_MODEL_CORRUPT", "weights.pth"),
        ({"--arms": "scratch,finetune.part=encoder"}, "E_CONFIG", "'finetune.parts'"),
        ({"--seeds": "0"}, "E_CONFIG", "--seeds 0"),
        ({"--test": "100%"}, "E_CONFIG", "--test 100%"),
        ({"--test": "who.txt"}, "E_NOT_FOUND", "who.txt"),
        ({"--subjects": "who.csv"}, "E_NOT_FOUND", "who.csv"),
        ({"--tolerance-mm": "-1"}, "E_CONFIG", "--tolerance-mm"),
        ({"--tolerance-mm": "nan"}, "E_CONFIG", "--tolerance-mm"),
        ({"--set": "finetune.epoch=3"}, "E_CONFIG", "'finetune.epochs'"),
        ({"--set": "seed=3"}, "E_CONFIG", "--seeds"),
        ({"--set": "finetune.epochs=0"}, "E_CONFIG", "finetune.epochs"),
        ({"-p": "mfmNone"}, "E_NOT_FOUND", "mfmNone"),
        ({}, "E_NOT_FOUND", "pip install 'mfm_nnunet[study]'"),
    ],
)
def test_bad_input(
    folder: Path,
    changes: dict[str, str],
    code: str,
    hint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A package that is missing hides no other mistake."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command.main(line(changes)) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"{code}  "), message
    assert hint in message
    assert len(message.splitlines()) <= 5
    assert "Traceback" not in message
    assert not (folder / "mfm_study").exists()


def test_a_dataset_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = small.write_raw(tmp_path, labels={"background": 0})
    assert command.main(line({"--workspace": str(tmp_path)})) == 2
    assert "E_CONFIG  Dataset004_Small has no labels" in capsys.readouterr().err
    for file in (raw / "labelsTr").iterdir():
        file.unlink()
    assert command.main(line({"--workspace": str(tmp_path)})) == 2
    assert "E_NOT_FOUND" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "code", "hint"),
    [
        ("name,person\ncase0,a\n", "E_FORMAT", "who.csv"),
        ("case,subject\ncase0,a\n", "E_CONFIG", "case1"),
        ("case,subject\ncase0,b\ncase0,a\ncase0,b\n", "E_CONFIG", "case0 has the subjects a and b"),
        ("case,subject\n" + "".join(f"case{n},a\n" for n in range(10)), "E_CONFIG", "--test 1"),
    ],
)
def test_bad_table_of_subjects(
    folder: Path, text: str, code: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "who.csv").write_text(text)
    assert command.main(line({"--subjects": "who.csv", "--test": "1"})) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"{code}  "), message
    assert hint in message


def test_a_checkpoint_of_another_configuration(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.builders import tiny

    pretrained_checkpoint(folder / "flat.pth", tiny.plans(), "2d")
    assert command.main(line({"--arms": "scratch flat=flat.pth"})) == 2
    assert "flat.pth was pretrained for 2d" in capsys.readouterr().err


def test_the_folder_of_something_else(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "precious.txt").touch()
    assert command.main(line({"-o": "mine"})) == 2
    assert "E_EXISTS" in capsys.readouterr().err
    assert command.main(line({"-o": "weights.pth"})) == 2
    assert "E_EXISTS" in capsys.readouterr().err
    assert [file.name for file in (folder / "mine").iterdir()] == ["precious.txt"]
    assert command.main(["--table", "-o", "mine"]) == 2
    assert "E_NOT_FOUND" in capsys.readouterr().err


def test_images_that_cannot_be_read_are_found_before_any_training(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(line({})) == 2
    message = capsys.readouterr().err
    assert "7 of 7 labelled cases cannot be used" in message
    assert not (folder / "mfm_study" / "cells").exists()


SHORT = ("finetune.epochs=2", "finetune.iterations_per_epoch=2", "num_workers=0")


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_the_whole_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pretrain a step, compare with scratch at two numbers of labels; the second call only renews the table."""
    import mfm_nnunet
    from mfm_nnunet.workspace import Workspace
    from tests.builders.synthetic import write_dataset

    here = Workspace(*(tmp_path / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")))
    name = write_dataset(here, "classes", 8)
    images = here.raw / name / "imagesTr"
    mfm_nnunet.plan_and_preprocess([701], images=images, configurations=["3d_fullres"], workspace=tmp_path)
    one = ("pretrain.epochs=1", "pretrain.iterations_per_epoch=1", "pretrain.validation_iterations=1", "num_workers=0")
    checkpoint = mfm_nnunet.pretrain(701, "3d_fullres", settings=one, device="cpu", workspace=tmp_path)
    flags: dict[str, Any] = {
        "--labels": "1 50%",
        "--arms": f"scratch {checkpoint}",
        "--test": "2",
        "--jobs": "2",
        "--workspace": str(tmp_path),
        "-device": "cpu",
        "--set": " ".join(SHORT),
    }
    words = [*line({**flags, "-d": "31"}), "--disable_tta"]
    capsys.readouterr()
    assert command.main(words) == 0, capsys.readouterr().err
    table = capsys.readouterr().out
    assert "Finished cells: 4 of 4." in table
    study = tmp_path / "mfm_study"
    record = json.loads((study / "study.json").read_text())
    assert [(row["labels"], row["arm"]) for row in record["results"]["rows"]] == [
        *((1, "scratch"), (1, "mae"), (3, "scratch"), (3, "mae"))
    ]
    assert all(0 <= row["nsd"]["mean"] <= 1 for row in record["results"]["rows"])
    assert record["results"]["rows"][1]["dice"]["against_scratch"]["cases"] == 2
    trained = {case for fold in record["folds"] for case in fold["train"]}
    assert not trained & set(record["test_cases"])
    preprocessed = {file.name.partition(".")[0] for file in study.rglob("case_*.pkl")}
    assert preprocessed
    assert not preprocessed & set(record["test_cases"]), "the plan and the data of the study know no test image"
    masks = {path.stat().st_mtime_ns for path in study.glob("cells/*/masks/*.nii.gz")}
    assert command.main(words) == 0
    assert "4 of them finished" in capsys.readouterr().err
    assert masks == {path.stat().st_mtime_ns for path in study.glob("cells/*/masks/*.nii.gz")}
    assert command.main(["--table", "-o", str(study)]) == 0
    assert capsys.readouterr().out.startswith(f"# Label efficiency: {name}, 3d_fullres")
    words[words.index("2") :] = [word if word != "2" else "3" for word in words[words.index("2") :]]
    assert command.main(words) == 2
    assert "another question" in capsys.readouterr().err


def run_cells_here(todo: list[Cell], steps: cells.Steps, *given: Any) -> list[CaseFailure]:
    """Run all steps in this process: starting one for each would take most of the time."""
    on_success = given[2]
    for cell in todo:
        for step in steps(cell):
            with pytest.MonkeyPatch.context() as patch:
                for name, value in step.environment.items():
                    patch.setenv(name, value)
                if step.words[0] == "python":
                    evaluate_cell(read_study(Path(step.words[-2])), Path(step.words[-1]))
                else:
                    module = importlib.import_module(f"mfm_nnunet.cli.{step.words[0].removeprefix('mfm_')}")
                    assert module.main([*step.words[1:]]) == 0, step
        on_success(cell, {cells.TRAINING: 1.0})
    return []


def test_teachers_and_students_are_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The unlabelled images are the cases that the subset leaves without label; each cell ends with a score."""
    import mfm_nnunet

    monkeypatch.setattr(cells, "run_cells", run_cells_here)
    write_spheres(tmp_path, 4)
    (result,) = mfm_nnunet.plan_and_preprocess([4], configurations=["3d_fullres"], workspace=tmp_path, preprocess=False)
    edit_json(
        result.file,
        lambda plans: plans["configurations"]["3d_fullres"].update(architecture=resenc(), patch_size=[16, 16, 16]),
    )
    flags = {
        "-d": "4",
        "-p": "mfmPlans",
        "--labels": "1",
        "--seeds": "1",
        "--test": "1",
        "--unlabelled": "4",
        "--arms": "scratch mean_teacher=scratch,semi.method=mean_teacher "
        "student=scratch,semi.method=student,semi.teachers=2",
        "--jobs": "1",
        "--workspace": str(tmp_path),
        "-device": "cpu",
        "--set": " ".join((*SHORT, "finetune.validation_iterations=1")),
    }
    assert command.main([*line(flags), "--disable_tta"]) == 0, capsys.readouterr().err
    assert "Finished cells: 3 of 3." in capsys.readouterr().out
    record = json.loads((tmp_path / "mfm_study" / "study.json").read_text())
    assert [row["arm"] for row in record["results"]["rows"]] == ["scratch", "mean_teacher", "student"]
    (fold,) = tmp_path.glob("mfm_study/cells/student__*/results/*/*/fold_*")
    assert len(list(fold.glob("teachers/*/*/*/fold_*/checkpoint_final.pth"))) == 2
    ranked = (fold / "pseudo_labels" / "round_1" / "next_to_label.csv").read_text()
    assert all(case not in ranked for case in record["test_cases"])
