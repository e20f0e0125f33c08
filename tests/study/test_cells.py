"""Running cells: finished ones stay, killed ones go on, what fails costs only itself, signals end the children."""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mfm_nnunet.errors import CasesFailedError, MFMError
from mfm_nnunet.study import cells, run
from mfm_nnunet.study.arms import Arm
from mfm_nnunet.study.cells import Slot, run_cells, slots, time_left
from mfm_nnunet.study.commands import Step, Steps, all_steps, commands_script, steps_of
from mfm_nnunet.study.design import Cell, Design, labelled_cases
from mfm_nnunet.study.folder import make_design, note_asked, read_record, write_design
from mfm_nnunet.workspace import Workspace
from tests.builders import small
from tests.builders.groups import wait_for_end

LIBRARY = small.LIBRARY
PYTHON = "#"
"""The first word of a step that is a line of Python here."""


CRAFTED = {
    "quotes": 'it\'s $HOME; "here"',
    "substitutions": "$(touch pwned) `touch pwned` ${IFS}",
    "operators": "a & touch pwned; b | tee pwned > pwned < c",
    "lines": "a\ntouch pwned\n#",
    "patterns": "*?[a-z]{a,b}~!!\\",
    "bytes": os.fsdecode(b"M\xfcller"),
    "paths": "$OUT",
}
"""Names of folders and checkpoints that a shell would take for something else."""


@pytest.fixture(autouse=True)
def _polled_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "POLL_SECONDS", 0.01)


@pytest.fixture
def design(tmp_path: Path) -> Design:
    """Two arms, one and two labels, one seed; the folder is written."""
    small.write_raw(tmp_path)
    (tmp_path / "mae.pth").write_bytes(b"weights")
    made = design_in(tmp_path)
    write_design(made, LIBRARY)
    return made


def begin(design: Design) -> None:
    """As the command does before and after its checks."""
    write_design(design, LIBRARY)
    note_asked(design, LIBRARY)


def design_in(root: Path, **changes: Any) -> Design:
    here = Workspace(*(root / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")))
    found, dataset_json = labelled_cases(here, small.NAME)
    asked: dict[str, Any] = {
        "dataset": small.NAME,
        "configuration": "3d_fullres",
        "plans": "own",
        "arms": (Arm("scratch"), Arm("mae", root / "mae.pth")),
        "labels": ("1", "2"),
        "seeds": 1,
        "test": "4",
        "subjects": None,
        "settings": (),
        "tolerance_mm": 1.0,
        "mirroring": True,
    }
    return make_design(root / "study", found, dataset_json, **{**asked, **changes})


def python(code: str) -> Step:
    return Step("training", (sys.executable, "-c", code))


def fake_steps(design: Design, code: str = "") -> Steps:
    """Each cell notes that it ran, and writes a result; ``code`` comes first and knows ``folder``."""

    def steps(cell: Cell) -> Iterator[Step]:
        folder = design.cell_folder(cell)
        text = json.dumps(small.result([0.5, 0.6, 0.7, 0.8]))
        yield python(
            f"import pathlib, sys; folder = pathlib.Path({str(folder)!r}); folder.mkdir(parents=True, exist_ok=True); "
            f"(folder / 'runs').open('a').write('x')\n{code}\n(folder / 'result.json').write_text({text!r})"
        )

    return steps


def num_runs(design: Design, cell: Cell) -> int:
    file = design.cell_folder(cell) / "runs"
    return len(file.read_text()) if file.exists() else 0


def run_all(design: Design, monkeypatch: pytest.MonkeyPatch, code: str = "", jobs: int = 2) -> None:
    monkeypatch.setattr(run, "steps_of", lambda *arguments: fake_steps(design, code))
    run.run_design(design, "mfmStudyPlans", "cpu", jobs)


def test_finished_cells_are_not_run_again(design: Design, monkeypatch: pytest.MonkeyPatch) -> None:
    first = next(design.cells())
    design.cell_folder(first).mkdir(parents=True)
    (design.cell_folder(first) / "result.json").write_text(json.dumps(small.result([0.5] * 4)))
    run_all(design, monkeypatch)
    assert [num_runs(design, cell) for cell in design.cells()] == [0, 1, 1, 1]
    run_all(design, monkeypatch)
    assert [num_runs(design, cell) for cell in design.cells()] == [0, 1, 1, 1]
    assert "Finished cells: 4 of 4." in (design.folder / "table.md").read_text()
    assert (design.folder / "study.png").stat().st_size > 10_000
    record = json.loads((design.folder / "study.json").read_text())
    assert record["results"]["num_finished"] == 4


def test_a_study_in_a_folder_whose_name_is_no_utf_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands and logs hold the bytes of the name, and a failure is told."""
    root = tmp_path / CRAFTED["bytes"]
    small.write_raw(root)
    design = design_in(root, arms=(Arm("scratch"),), labels=("1",))
    write_design(design, LIBRARY)
    line = (sys.executable, "-c", "import sys; sys.exit('E_OOM  ' + sys.argv[1])", str(root))
    monkeypatch.setattr(run, "steps_of", lambda *_: lambda cell: iter([Step("training", line)]))
    with pytest.raises(CasesFailedError):
        run.run_design(design, "mfmStudyPlans", "cpu", 1)
    for file in (design.folder / "commands.sh", next((design.folder / "logs").iterdir())):
        assert b"M\xfcller" in file.read_bytes()
    assert r"M\udcfcller" in (design.folder / "table.md").read_text()


def test_one_cell_that_fails_costs_only_itself(design: Design, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "if 'mae__1' in str(folder): sys.exit('E_OOM  training needs more memory than there is. Buy some.')"
    with pytest.raises(CasesFailedError, match="1 of 4 cells failed, the others are done") as failed:
        run_all(design, monkeypatch, code)
    (failure,) = failed.value.failures
    assert (failure.case, failure.code) == ("mae, 1 labels, seed 0", "E_OOM")
    assert "training needs more memory" in failure.reason
    table = (design.folder / "table.md").read_text()
    assert "Finished cells: 3 of 4." in table
    assert "* mae, 1 labels, seed 0: E_OOM" in table
    run.renew(design.folder)  # --table forgets no failure, until the cell is finished
    assert (design.folder / "table.md").read_text() == table
    run_all(design, monkeypatch)
    assert [num_runs(design, cell) for cell in design.cells()] == [1, 2, 1, 1]
    assert "## Failed" not in (design.folder / "table.md").read_text()


def test_a_failure_without_a_code_tells_the_last_line(design: Design, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CasesFailedError, match=r"E_INTERNAL.*ZeroDivisionError") as failed:
        run_all(design, monkeypatch, "1 / 0")
    assert len(failed.value.failures) == 4
    with pytest.raises(CasesFailedError, match="ended from outside"):
        run_all(design, monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGTERM)")


def test_a_stopped_training_goes_on(design: Design) -> None:
    """``--c`` as soon as there is a checkpoint; a finished training is not repeated."""
    steps, cell = steps_of(design, "mfmStudyPlans", "auto"), next(design.cells())
    train, predict, score = all_steps(design, cell, "mfmStudyPlans", "auto", design.cell_folder(cell))
    assert list(steps(cell)) == [train, predict, score]
    model = Path(predict.words[predict.words.index("-m") + 1])
    fold = model / "fold_0"
    fold.mkdir(parents=True)
    (fold / "settings.json").touch()
    assert next(steps(cell)) == train
    (fold / "checkpoint_latest.pth").touch()
    first = next(steps(cell))
    assert first.words == (*train.words, "--c")
    assert first.title == "training, continued"
    (fold / "checkpoint_final.pth").touch()
    assert list(steps(cell)) == [predict, score]
    (design.cell_folder(cell) / "result.json").touch()
    assert list(steps(cell)) == [score]


def test_the_commands_of_a_cell(design: Design) -> None:
    script = commands_script(design, "mfmStudyPlans", "cpu").splitlines()
    assert sum(line.startswith("# ") for line in script) == 1 + 4
    train, predict, score = script[script.index("# mae, 2 labels, seed 0") + 1 :][:3]
    assert f"mfm_train {small.NAME} 3d_fullres 1 -p mfmStudyPlans -pretrained_weights {design.folder.parent}" in train
    assert "-device cpu --set finetune.validation_iterations=1 seed=0" in train
    assert f"nnUNet_preprocessed={design.workspace}/nnUNet_preprocessed" in train
    assert 'nnUNet_results="$OUT"/mae__2_labels__seed0/results' in train
    assert f'mfm_predict -i {design.folder}/test -o "$OUT"/mae__2_labels__seed0/masks' in predict
    assert "-f 1 --resume" in predict
    assert f'mfm_nnunet.study.evaluation {design.folder} "$OUT"/mae__2_labels__seed0' in score
    assert f"{design.folder}/cells" not in "\n".join(script), "what is finished stays as it is"


@pytest.mark.parametrize("kind", CRAFTED)
def test_the_commands_are_understood(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script as the shell reads it, with names that need quoting; its words as the commands read them."""
    root, out = tmp_path / CRAFTED[kind], tmp_path / f"out of $1 {CRAFTED[kind]}"
    small.write_raw(root)
    checkpoint = root / f"mae {CRAFTED[kind]}.pth"
    checkpoint.write_bytes(b"weights")
    monkeypatch.chdir(root)
    arm = Arm("mae", checkpoint, (f"finetune.parts={CRAFTED[kind]}",))
    design = design_in(root, arms=(Arm("scratch"), arm))
    write_design(design, LIBRARY)
    script = tmp_path / "commands.sh"
    script.write_bytes(os.fsencode(commands_script(design, "mfmStudyPlans", "cpu")))
    subprocess.run(["bash", "-n", script], check=True)
    refused = subprocess.run(["bash", script], capture_output=True, text=True)
    assert refused.returncode != 0
    assert "bash commands.sh OUT" in refused.stderr
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("mfm_train", "mfm_predict", "python"):  # they only tell what they were called with
        note = f"import json, os, sys; print(json.dumps([{name!r}, os.environ.get('nnUNet_results'), *sys.argv[1:]]))"
        (programs / name).write_text(f"#!{sys.executable}\n{note}\n")
        (programs / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    told = subprocess.run(["bash", script, out], check=True, capture_output=True, text=True, env=environment)
    calls = [json.loads(line) for line in told.stdout.splitlines()]
    assert [words[0] for words in calls] == ["mfm_train", "mfm_predict", "python"] * 4
    trained = [words for words in calls if "-pretrained_weights" in words]
    assert len(trained) == 2
    for words in trained:
        assert words[words.index("-pretrained_weights") + 1] == str(checkpoint)
        assert arm.settings[0] in words
    assert not [file for file in tmp_path.rglob("pwned*") if file.is_file()]
    for name, results, *words in calls:
        if name == "python":
            assert words[:-1] == ["-m", "mfm_nnunet.study.evaluation", str(design.folder)]
            assert Path(words[-1]).parent == out
            continue
        assert Path(results).is_relative_to(out)
        parser = importlib.import_module(name.replace("mfm_", "mfm_nnunet.cli.", 1)).build_parser()
        arguments = parser.parse_strictly(words)
        assert arguments.device == "cpu"
        assert Path(arguments.workspace).parent == out
        if name == "mfm_predict":
            assert (arguments.input, Path(arguments.output).name) == (str(design.test_folder), "masks")
            assert Path(arguments.output).is_relative_to(out)


def test_folds_are_the_subsets_and_never_the_test_cases(design: Design) -> None:
    folder = design.workspace / "nnUNet_preprocessed" / small.NAME
    splits = json.loads((folder / "splits_final.json").read_text())
    assert [len(split["train"]) for split in splits] == [1, 2]
    assert set(splits[0]["train"]) < set(splits[1]["train"])
    assert all(set(split["val"]) <= set(split["train"]) for split in splits)
    pool = json.loads((design.workspace / "nnUNet_raw" / small.NAME / "dataset.json").read_text())["dataset"]
    assert len(pool) == 6
    assert not set(pool) & set(design.question.test)
    assert {file.name.partition("_")[0] for file in (design.folder / "test").iterdir()} == set(design.question.test)


def test_a_study_may_grow_and_its_folds_keep_their_numbers(design: Design, tmp_path: Path) -> None:
    design.cell_folder(next(design.cells())).mkdir(parents=True)
    arms = (Arm("scratch"),)
    grown = design_in(tmp_path, labels=("1", "100%"), seeds=2, arms=arms)
    assert grown.folds == [(1, 0), (2, 0), (6, 0), (1, 1), (6, 1)]
    begin(grown)
    assert design_in(tmp_path).folds == grown.folds
    record = json.loads((design.folder / "study.json").read_text())
    assert (set(record["arms"]), record["compared"]) == ({"scratch", "mae"}, ["scratch", "mae"])
    assert (record["labels"], record["seeds"]) == ([1, 2, 6], 2)


def test_the_report_of_a_study_that_grows_is_about_all_that_was_asked(
    design: Design, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CasesFailedError):
        run_all(design, monkeypatch, "if 'mae__1' in str(folder): sys.exit('E_OOM  too large')")
    arms = (Arm("scratch"), Arm("vf", tmp_path / "mae.pth"))
    grown = design_in(tmp_path, labels=("2", "4"), arms=arms)
    begin(grown)
    run_all(grown, monkeypatch)
    assert [num_runs(design, cell) for cell in design.cells()] == [1, 1, 1, 1], "a call runs only its own cells"
    record = json.loads((design.folder / "study.json").read_text())
    rows = [(row["labels"], row["arm"]) for row in record["results"]["rows"]]
    assert rows == [*((1, "scratch"), (2, "scratch"), (2, "mae"), (2, "vf"), (4, "scratch"), (4, "vf"))]
    table = (design.folder / "table.md").read_text()
    assert "Finished cells: 6 of 7." in table
    assert "* mae, 1 labels, seed 0: E_OOM" in table
    script = commands_script(grown, "mfmStudyPlans", "cpu").splitlines()
    assert {f"# {cell}" for cell in design.cells()} < set(script)
    assert len(record["asked"]) == sum(line.startswith("mfm_predict") or " mfm_predict" in line for line in script)


def test_a_call_that_is_refused_leaves_no_trace(
    design: Design, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cells never run, and its arm may be given again with what is right."""
    run_all(design, monkeypatch)
    before = read_record(design.folder)
    arms = (Arm("vf", tmp_path / "mae.pth", ("finetune.train=lora",)),)
    write_design(design_in(tmp_path, labels=("3",), arms=arms), LIBRARY)
    assert read_record(design.folder) == before
    begin(design_in(tmp_path, arms=(Arm("vf", tmp_path / "mae.pth"),)))
    assert read_record(design.folder)["labels"] == [1, 2]


def test_a_study_begun_by_an_earlier_version_goes_on(
    design: Design, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not tell what was asked, but the numbers of labels, the seeds and the arms of its last call."""
    run_all(design, monkeypatch)
    file = design.folder / "study.json"
    record = json.loads(file.read_text())
    del record["asked"], record["results"]
    file.write_text(json.dumps(record))
    run.renew(design.folder)
    assert "Finished cells: 4 of 4." in (design.folder / "table.md").read_text()
    grown = design_in(tmp_path, labels=("4",), arms=(Arm("scratch"),))
    assert grown.asked() == [*design.cells(), Cell(4, 0, "scratch")]


def test_another_question_is_refused_once_something_was_trained(design: Design, tmp_path: Path) -> None:
    before = design_in(tmp_path, tolerance_mm=2.0)
    write_design(before, LIBRARY)  # nothing was trained: the folder is anew
    before.cell_folder(next(before.cells())).mkdir(parents=True)
    with pytest.raises(MFMError, match=r"E_CONFIG.*tolerance_mm was 2\.0, is 1\.0"):
        design_in(tmp_path)
    with pytest.raises(MFMError, match=r"E_CONFIG.*settings was .*validation_iterations"):
        design_in(tmp_path, tolerance_mm=2.0, settings=("finetune.epochs=5",))
    with pytest.raises(MFMError, match=r"E_CONFIG.*test was"):
        design_in(tmp_path, tolerance_mm=2.0, test="5")
    with pytest.raises(MFMError, match=r"E_CONFIG.*holds an arm 'mae'\. Name 'MAE' the same"):
        design_in(tmp_path, tolerance_mm=2.0, arms=(Arm("MAE", tmp_path / "mae.pth"),))
    (tmp_path / "mae.pth").write_bytes(b"other weights")
    with pytest.raises(MFMError, match=r"E_CONFIG.*arm 'mae' was another checkpoint"):
        design_in(tmp_path, tolerance_mm=2.0)


@pytest.mark.parametrize(
    "change",
    [
        {"labels": {"background": 0, "inner": 2, "outer": 1}},
        {"labels": {"background": 0, "inner": 1, "ignore": 2}},
        {"channel_names": {"0": "CT"}},
        {"overwrite_image_reader_writer": "NibabelIO"},
    ],
)
def test_another_meaning_of_the_labels_is_refused_once_something_was_trained(
    design: Design, tmp_path: Path, change: dict[str, Any]
) -> None:
    file = tmp_path / "nnUNet_raw" / small.NAME / "dataset.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **change}))
    (design.workspace / "old").touch()
    write_design(design_in(tmp_path), LIBRARY)  # nothing was trained: the folder is anew
    assert not (design.workspace / "old").exists()
    file.write_text(json.dumps({**content, "description": "for people"}))
    write_design(design_in(tmp_path), LIBRARY)
    design.cell_folder(next(design.cells())).mkdir(parents=True)
    design_in(tmp_path)
    file.write_text(json.dumps({**content, **change}))
    with pytest.raises(MFMError, match=f"E_CONFIG.*asks something else: {next(iter(change))} in dataset.json"):
        design_in(tmp_path)


def test_regions_in_another_order_are_another_meaning(tmp_path: Path) -> None:
    raw = small.write_raw(tmp_path, labels={"background": 0, "whole": [1, 2], "core": [2]})  # type: ignore[dict-item]
    (tmp_path / "mae.pth").write_bytes(b"weights")
    content = {**json.loads((raw / "dataset.json").read_text()), "regions_class_order": [1, 2]}
    (raw / "dataset.json").write_text(json.dumps(content))
    made = design_in(tmp_path)
    write_design(made, LIBRARY)
    made.cell_folder(next(made.cells())).mkdir(parents=True)
    content["labels"] = {"background": 0, "core": [2], "whole": [1, 2]}
    (raw / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(MFMError, match=r"E_CONFIG.*labels in dataset\.json was"):
        design_in(tmp_path)


def test_settings_of_an_arm_alone(tmp_path: Path) -> None:
    small.write_raw(tmp_path)
    (tmp_path / "mae.pth").write_bytes(b"weights")
    arms = (Arm("scratch"), Arm("enc", tmp_path / "mae.pth", ("finetune.parts=encoder",)))
    made = design_in(tmp_path, arms=arms, settings=("finetune.epochs=5",))
    write_design(made, LIBRARY)
    told = {cell.arm: all_steps(made, cell, "mfmStudyPlans", "cpu", tmp_path)[0].words for cell in made.cells()}
    assert told["enc"][-4:] == (
        "finetune.validation_iterations=1",
        "finetune.epochs=5",
        "finetune.parts=encoder",
        "seed=0",
    )
    assert "finetune.parts=encoder" not in told["scratch"]
    made.cell_folder(next(made.cells())).mkdir(parents=True)
    with pytest.raises(MFMError, match="arm 'enc' was trained with other settings"):
        design_in(tmp_path, arms=(Arm("enc", tmp_path / "mae.pth"),), settings=("finetune.epochs=5",))


def test_two_studies_in_one_folder(tmp_path: Path) -> None:
    refused = pytest.raises(MFMError, match=r"E_EXISTS.*another mfm_study")
    with cells.alone(tmp_path / "study"), refused, cells.alone(tmp_path / "study"):
        pass
    with cells.alone(tmp_path / "study"):
        pass


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(cells.fcntl, "flock", refuse)
    with cells.alone(tmp_path / "study"):
        assert "this file system has no locks (" in caplog.text


def test_cells_of_another_version_of_the_library_are_scored_again(
    design: Design, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of earlier calls too; nothing is trained or predicted again."""
    run_all(design, monkeypatch)
    first, *_, last = design.cells()
    for cell in (first, last):
        file = design.cell_folder(cell) / "result.json"
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, "library": {**LIBRARY, "version": "0.0"}, "seconds": {"training": 7}}))
    run.renew(design.folder)
    note = "surface-distance 0.0 and surface-distance 0.1 (mfm_study scores all cells again with one of them)"
    assert note in (design.folder / "table.md").read_text()
    later = design_in(tmp_path, labels=("2",), arms=(Arm("mae", tmp_path / "mae.pth"),))
    begin(later)
    run_all(later, monkeypatch)
    assert [num_runs(design, cell) for cell in design.cells()] == [2, 1, 1, 2]
    assert "Dice of surface-distance 0.1; other" in (design.folder / "table.md").read_text()
    seconds = json.loads((design.cell_folder(first) / "result.json").read_text())["seconds"]
    assert seconds["prediction"] == 5, "the seconds of other steps stay"


def test_shares_of_the_computer() -> None:
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    (all_of_it,) = slots(1, [])
    assert all_of_it == Slot(tuple(cores), None)
    assert [slot.gpu for slot in slots(3, ["0", "GPU-1"])] == ["0", "GPU-1", "0"]
    many = slots(len(cores), [])
    assert sorted(core for slot in many for core in slot.cores) == cores
    assert cells.default_jobs(["0", "1"]) == 2


def test_time_left() -> None:
    assert time_left([100.0, 200.0], 3, [50.0, 400.0], 2) == "about 0:04:35 left"
    assert time_left([], 3, [1.0], 2) == "time left unknown"
    assert time_left([5.0], 0, [], 2) == "nothing left"


SCRIPT = """
import sys
from pathlib import Path
from mfm_nnunet.cli.run import run_command
from mfm_nnunet.study import cells
from mfm_nnunet.study.commands import Step
from mfm_nnunet.study.design import Cell
import argparse

def steps(cell):
    code = "import signal, sys, time, pathlib; signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(sys.argv[1]).touch(), sys.exit(143))); print(1, flush=True); time.sleep(60)"
    yield Step("training", (sys.executable, "-c", code, sys.argv[1] + "/" + cell.arm))

def job(arguments):
    folder = Path(sys.argv[1])
    cells.run_cells([Cell(1, 0, "a"), Cell(1, 0, "b")], steps, cells.slots(2, []), lambda cell: folder / f"{cell.arm}.log", lambda *_: "")

sys.exit(run_command(job, argparse.Namespace(workspace=sys.argv[1], debug=False)))
"""  # noqa: E501


def test_signals_end_the_children_cleanly(tmp_path: Path) -> None:
    """SIGTERM and Ctrl-C, each to a study of its own."""
    expected = {signal.SIGTERM: 143, signal.SIGINT: 130}
    folders = {number: tmp_path / number.name for number in expected}
    processes = {
        number: subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)], stderr=subprocess.PIPE, text=True)
        for number, folder in folders.items()
    }
    logs = [folder / f"{arm}.log" for folder in folders.values() for arm in "ab"]
    deadline = time.monotonic() + 60
    while not all(log.exists() and log.read_text().endswith("1\n") for log in logs):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for number, process in processes.items():
        process.send_signal(number)
    for number, process in processes.items():
        message = process.communicate(timeout=30)[1]
        assert process.returncode == expected[number]
        assert all((folders[number] / arm).exists() for arm in "ab"), "a child was not asked to end"
        assert "the same command goes on" in message
        assert "Traceback" not in message


def test_a_second_signal_kills_the_children(tmp_path: Path) -> None:
    """It waits for no step of theirs; none is left."""
    deaf = SCRIPT.replace("lambda *_: (pathlib.Path(sys.argv[1]).touch(), sys.exit(143))", "signal.SIG_IGN")
    patient = f"from mfm_nnunet import stopping; stopping.SECONDS_TO_END = 120\n{deaf}"  # on a busy machine too
    process = subprocess.Popen([sys.executable, "-c", patient, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    logs = [tmp_path / f"{arm}.log" for arm in "ab"]
    deadline = time.monotonic() + 60
    while not all(log.exists() and log.read_text().endswith("1\n") for log in logs):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = [int(file.parent.name) for file in Path("/proc").glob("[0-9]*/stat") if _parent_of(file) == process.pid]
    assert len(children) == 2
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "to stop at once" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "stopped at once by a second signal" in message
    assert "Traceback" not in message
    assert not any(wait_for_end(child) for child in children)


def _parent_of(stat: Path) -> int:
    try:
        return int(stat.read_text().rsplit(")", 1)[1].split()[1])
    except OSError:  # it has just ended
        return 0


def test_run_cells_keeps_to_its_slots(tmp_path: Path) -> None:
    """Never more at a time than there are slots."""
    code = (
        f"import pathlib, time; folder = pathlib.Path({str(tmp_path)!r}); me = folder / str(time.time_ns()); "
        "me.touch(); print(len(list(folder.glob('1*'))), flush=True); time.sleep(0.1); me.unlink()"
    )
    many = [Cell(1, seed, "a") for seed in range(5)]
    seen: list[Cell] = []

    def finished(cell: Cell, seconds: dict[str, float]) -> str:
        assert seconds["training"] > 0
        seen.append(cell)
        return ""

    logs = tmp_path / "logs"
    failures = run_cells(
        many, lambda cell: iter([python(code)]), slots(2, []), lambda cell: logs / f"{cell.seed}.txt", finished
    )
    assert not failures
    assert sorted(seen) == many
    counts = [int(file.read_text().splitlines()[-1]) for file in logs.iterdir()]
    assert max(counts) <= 2
