"""Running cells: finished ones stay, killed ones continue, failures cost only themselves, signals end the commands."""

from __future__ import annotations

import importlib
import json
import os
import shlex
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
from mfm_nnunet.study.cells import Slot, Step, all_steps, list_commands, run_cells, share_computer, steps_left
from mfm_nnunet.study.design import Cell
from mfm_nnunet.study.folder import Study, read_study
from mfm_nnunet.study_requests import StudyRequest
from tests.builders import small
from tests.builders.groups import wait_for_end

CRAFTED = "it's $HOME; $(touch pwned) `touch pwned` & b | c > d\n#*?{a,b}~!\\ " + os.fsdecode(b"M\xfcller")
"""A name of folders and checkpoints that a shell would take for something else."""


@pytest.fixture(autouse=True)
def _polled_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "POLL_SECONDS", 0.01)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Two arms, one and two labels, one seed; the folder is written."""
    small.write_raw(tmp_path)
    return small.begin(tmp_path)[0]


def python(code: str) -> Step:
    return Step("training", (sys.executable, "-c", code))


def train_all(
    study: Study, monkeypatch: pytest.MonkeyPatch, code: str = "", wanted: list[Cell] | None = None, jobs: int = 2
) -> None:
    """Run all cells: each notes that it ran, and writes a result; ``code`` comes first and knows ``folder``."""

    def steps(study: Study, cell: Cell, device: str, licence: str | None = None) -> Iterator[Step]:
        folder = study.cell_folder(cell)
        text = json.dumps(small.result([0.5, 0.6, 0.7, 0.8]))
        for number, case in enumerate(study.question.test):
            text = text.replace(f'"case{number}"', f'"{case}!"')
        text = text.replace('!"', '"')
        yield python(
            f"import pathlib, sys; folder = pathlib.Path({str(folder)!r}); folder.mkdir(parents=True, exist_ok=True); "
            f"(folder / 'runs').open('a').write('x')\n{code}\n(folder / 'new').write_text({text!r})\n"
            "(folder / 'new').rename(folder / 'result.json')"
        )

    monkeypatch.setattr(run, "steps_left", steps)
    request = StudyRequest(small.NAME, "3d_fullres", labels=(), arms=(), jobs=jobs, device="cpu")
    lock = os.open(study.folder, os.O_RDONLY)
    run.train_cells(study, list(study.asked) if wanted is None else wanted, request, [], lock)
    os.close(lock)


def num_runs(study: Study) -> list[int]:
    files = [study.cell_folder(cell) / "runs" for cell in study.asked]
    return [len(file.read_text()) if file.exists() else 0 for file in files]


def test_finished_cells_are_not_run_again(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    train_all(study, monkeypatch, wanted=list(study.asked[:1]))
    assert num_runs(study) == [1, 0, 0, 0]
    for _ in range(2):
        train_all(study, monkeypatch)
        assert num_runs(study) == [1, 1, 1, 1]
    assert "Finished cells: 4 of 4." in (study.folder / "table.md").read_text()
    assert (study.folder / "study.png").stat().st_size > 10_000
    assert read_study(study.folder).results["num_finished"] == 4


def test_a_study_in_a_folder_whose_name_is_no_utf_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands and logs hold the bytes of the name, and a failure is reported."""
    root = tmp_path / os.fsdecode(b"M\xfcller")
    small.write_raw(root)
    study, asked = small.begin(root, {"scratch": small.SCRATCH}, labels=("1",))
    step = Step("training", (sys.executable, "-c", "import sys; sys.exit('E_OOM  ' + sys.argv[1])", str(root)))
    monkeypatch.setattr(run, "steps_left", lambda *_: iter([step]))
    request = StudyRequest(small.NAME, "3d_fullres", labels=(), arms=(), jobs=1, device="cpu")
    with pytest.raises(CasesFailedError), cells.lock_folder(study.folder) as lock:
        run.train_cells(study, asked, request, [], lock)
    for file in (study.folder / "commands.sh", next((study.folder / "logs").iterdir())):
        assert b"M\xfcller" in file.read_bytes()
    assert r"M\udcfcller" in (study.folder / "table.md").read_text()


def test_one_cell_that_fails_costs_only_itself(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "if 'mae__1' in str(folder): sys.exit('E_OOM  training needs more memory than there is. Buy some.')"
    with pytest.raises(CasesFailedError) as failed:
        train_all(study, monkeypatch, code)
    (failure,) = failed.value.failures
    assert (failure.case, failure.code) == ("mae, 1 labels, seed 0", "E_OOM")
    assert "training needs more memory" in failure.reason
    table = (study.folder / "table.md").read_text()
    assert "Finished cells: 3 of 4." in table
    assert "* mae, 1 labels, seed 0: E_OOM" in table
    run.renew(study.folder)  # --table forgets no failure, until the cell is finished
    assert (study.folder / "table.md").read_text() == table
    train_all(study, monkeypatch)
    assert num_runs(study) == [1, 2, 1, 1]
    assert "## Failed" not in (study.folder / "table.md").read_text()


def test_a_failure_without_a_code_reports_the_last_line(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CasesFailedError, match=r"E_INTERNAL.*ZeroDivisionError") as failed:
        train_all(study, monkeypatch, "1 / 0")
    assert len(failed.value.failures) == 4
    with pytest.raises(CasesFailedError, match="killed by another process"):
        train_all(study, monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGTERM)")


def test_a_stopped_training_is_continued(study: Study) -> None:
    """``--c`` as soon as there is a checkpoint; a finished training is not repeated."""
    cell = study.asked[0]
    train, predict, score = all_steps(study, cell, "auto")
    assert list(steps_left(study, cell, "auto")) == [train, predict, score]
    fold = Path(predict.words[predict.words.index("-m") + 1]) / "fold_0"
    fold.mkdir(parents=True)
    (fold / "settings.json").touch()
    assert next(steps_left(study, cell, "auto")) == train
    (fold / "checkpoint_latest.pth").touch()
    first = next(steps_left(study, cell, "auto"))
    assert first.words == (*train.words, "--c")
    assert first.title == "training, continued"
    (fold / "checkpoint_final.pth").touch()
    assert list(steps_left(study, cell, "auto")) == [predict, score]
    (study.cell_folder(cell) / "result.json").touch()
    assert list(steps_left(study, cell, "auto")) == [score]


def test_the_commands_of_a_cell(tmp_path: Path) -> None:
    """As the commands read them; an arm's settings follow the study's, and its seed is the cell's."""
    small.write_raw(tmp_path)
    arms = {"scratch": small.SCRATCH, "mae": small.arm(tmp_path, settings=("finetune.parts=encoder",))}
    study, asked = small.begin(tmp_path, arms, settings=("finetune.epochs=5",))
    assert [cell.arm for cell in asked] == ["scratch", "mae"] * 2
    lines = list_commands(study, "cpu").splitlines()
    train, predict, score = (shlex.split(text) for text in lines[lines.index("# mae, 2 labels, seed 0") + 1 :][:3])
    folder = study.folder / "cells" / "mae__2_labels__seed0"
    assert f"nnUNet_results={folder}/results" in train
    assert f"nnUNet_preprocessed={study.workspace}/nnUNet_preprocessed" in train
    arguments = read("train", train[3:])
    assert (arguments.dataset, arguments.configuration, arguments.fold) == (small.NAME, "3d_fullres", "1")
    assert (arguments.pretrained_weights, arguments.device) == (str(tmp_path / "mae.pth"), "cpu")
    settings = ["finetune.validation_iterations=1", "finetune.epochs=5", "finetune.parts=encoder", "seed=0"]
    assert arguments.settings == settings
    arguments = read("predict", predict[3:])
    assert (arguments.input_folder, arguments.output_folder) == (str(study.test_folder), f"{folder}/masks")
    assert arguments.resume
    assert score == ["python", "-m", "mfm_nnunet.study.evaluation", str(study.folder), str(folder)]
    assert "finetune.parts" not in str(all_steps(study, Cell(2, 0, "scratch"), "cpu")[0])


def read(name: str, words: list[str]) -> Any:
    assert words[0] == f"mfm_{name}"
    return importlib.import_module(f"mfm_nnunet.cli.{name}").build_parser().parse_strictly(words[1:])


def test_commands_with_crafted_names_are_what_a_shell_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / CRAFTED.replace("/", "")
    small.write_raw(root)
    monkeypatch.chdir(tmp_path)
    study, _ = small.begin(root)
    step = all_steps(study, Cell(1, 0, "mae"), "cpu")[0]
    show = f"{sys.executable} -c 'import os, sys; print(ascii([os.environ[\"nnUNet_results\"], *sys.argv[1:]]))'"
    script = tmp_path / "script.sh"
    script.write_bytes(os.fsencode(str(step).replace("mfm_train", show, 1)))
    shown = subprocess.run(["bash", script], check=True, capture_output=True, text=True).stdout
    assert shown.strip() == ascii([step.environment["nnUNet_results"], *step.words[1:]])
    assert not [*tmp_path.rglob("pwned")]


def test_the_report_of_a_study_that_grows_is_about_all_that_was_asked(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CasesFailedError):
        train_all(study, monkeypatch, "if 'mae__1' in str(folder): sys.exit('E_OOM  too large')")
    grown, asked = small.begin(tmp_path, {"scratch": small.SCRATCH, "vf": small.arm(tmp_path, "vf")}, labels=("2", "4"))
    train_all(grown, monkeypatch, wanted=asked)
    assert num_runs(study) == [1, 1, 1, 1], "a call runs only its own cells"
    after = read_study(study.folder)
    rows = [(row["labels"], row["arm"]) for row in after.results["rows"]]
    assert rows == [*((1, "scratch"), (2, "scratch"), (2, "mae"), (2, "vf"), (4, "scratch"), (4, "vf"))]
    table = (study.folder / "table.md").read_text()
    assert "Finished cells: 6 of 7." in table
    assert "* mae, 1 labels, seed 0: E_OOM" in table
    script = (study.folder / "commands.sh").read_text()
    assert all(f"# {cell}\n" in script for cell in after.asked)


def test_cells_of_another_version_of_the_library_are_scored_again(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of earlier calls too; nothing is trained or predicted again."""
    train_all(study, monkeypatch)
    for cell in (study.asked[0], study.asked[-1]):
        file = study.cell_folder(cell) / "result.json"
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, "library": {**small.LIBRARY, "version": "0.0"}}))
    run.renew(study.folder)
    note = "surface-distance 0.0 and surface-distance 0.1 (mfm_study scores all cells again with one of them)"
    assert note in (study.folder / "table.md").read_text()
    later, asked = small.begin(tmp_path, {"mae": small.arm(tmp_path)}, labels=("2",))
    train_all(later, monkeypatch, wanted=asked)
    assert num_runs(study) == [2, 1, 1, 2]
    assert "Dice of surface-distance 0.1; other" in (study.folder / "table.md").read_text()
    seconds = json.loads((study.cell_folder(study.asked[0]) / "result.json").read_text())["seconds"]
    assert seconds["prediction"] == 5, "the seconds of other steps stay"


def test_two_studies_in_one_folder(tmp_path: Path) -> None:
    """Also while a command of a study that was killed is at work."""
    with cells.lock_folder(tmp_path / "study") as lock:
        orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=(lock,))
        with pytest.raises(MFMError, match=r"E_EXISTS.*another mfm_study"), cells.lock_folder(tmp_path / "study"):
            pass
    with pytest.raises(MFMError, match="E_EXISTS"), cells.lock_folder(tmp_path / "study"):
        pass
    orphan.kill()
    orphan.wait()
    with cells.lock_folder(tmp_path / "study"):
        pass


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cells, "take_lock", lambda handle: None)
    with cells.lock_folder(tmp_path / "study"):
        assert "this file system has no locks" in caplog.text


def test_shares_of_the_computer() -> None:
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    assert share_computer(1, []) == [Slot(tuple(cores), None)]
    assert [slot.gpu for slot in share_computer(3, ["0", "GPU-1"])] == ["0", "GPU-1", "0"]
    many = share_computer(len(cores), [])
    assert sorted(core for slot in many for core in slot.cores) == cores


def test_time_left() -> None:
    assert cells.format_time_left([100.0, 200.0], 3, 2) == "about 0:03:45 left"
    assert cells.format_time_left([], 3, 2) == "time left unknown"
    assert cells.format_time_left([5.0], 0, 2) == "nothing left"


def test_cells_keep_to_their_slots(tmp_path: Path) -> None:
    """Never more at a time than there are slots, each on its own cores and GPU; the caller's cores stay."""
    code = (
        f"import os, pathlib, time; folder = pathlib.Path({str(tmp_path)!r}); me = folder / str(time.time_ns()); "
        "me.touch(); print(os.environ['CUDA_VISIBLE_DEVICES'], sorted(os.sched_getaffinity(0)), "
        "len(list(folder.glob('1*'))), flush=True); time.sleep(0.1); me.unlink()"
    )
    many, seen, mine = [Cell(1, seed, "a") for seed in range(5)], [], os.sched_getaffinity(0)
    slots = share_computer(2, ["0", "1"])

    def finish(cell: Cell, seconds: dict[str, float]) -> str:
        assert seconds["training"] > 0
        seen.append(cell)
        return ""

    assert not run_cells(many, lambda cell: iter([python(code)]), slots, tmp_path / "logs", finish)
    assert sorted(seen) == many
    assert os.sched_getaffinity(0) == mine
    lines = [file.read_text().splitlines()[-1] for file in (tmp_path / "logs").iterdir()]
    assert {line[:-2] for line in lines} == {f"{slot.gpu} {[*slot.cores]}" for slot in slots}
    assert max(int(line[-1]) for line in lines) <= 2


SCRIPT = """
import argparse, sys
from pathlib import Path
from mfm_nnunet.cli.run import run_command
from mfm_nnunet.study import cells
from mfm_nnunet.study.design import Cell

def steps(cell):
    code = "import signal, sys, time, pathlib; signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(sys.argv[1]).touch(), sys.exit(143))); print(1, flush=True); time.sleep(60)"
    yield cells.Step("training", (sys.executable, "-c", code, sys.argv[1] + "/" + cell.arm))

def job(arguments):
    three = [Cell(1, 0, arm) for arm in "abc"]
    cells.run_cells(three, steps, cells.share_computer(2, []), Path(sys.argv[1]), lambda *_: "")

sys.exit(run_command(job, argparse.Namespace(workspace=sys.argv[1], debug=False)))
"""  # noqa: E501


def started(folder: Path, script: str) -> subprocess.Popen[str]:
    """Start two of three cells; return the study once both are at work."""
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)], stderr=subprocess.PIPE, text=True)
    logs = [folder / f"{arm}__1_labels__seed0.txt" for arm in "ab"]
    deadline = time.monotonic() + 60
    while not all(log.exists() and log.read_text().endswith("1\n") for log in logs):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_the_commands_cleanly(tmp_path: Path, number: int, code: int) -> None:
    process = started(tmp_path, SCRIPT)
    process.send_signal(number)
    message = process.communicate(timeout=30)[1]
    assert process.returncode == code
    assert all((tmp_path / arm).exists() for arm in "ab"), "a command was not asked to end"
    assert not (tmp_path / "c").exists(), "a command began after the signal"
    assert "the same command continues" in message
    assert "Traceback" not in message


def test_a_second_signal_kills_the_commands(tmp_path: Path) -> None:
    """It waits for no step of theirs; none is left."""
    process = started(
        tmp_path, SCRIPT.replace("lambda *_: (pathlib.Path(sys.argv[1]).touch(), sys.exit(143))", "signal.SIG_IGN")
    )
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
