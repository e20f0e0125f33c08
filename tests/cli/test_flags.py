"""The command lines: strict parsing, quick help, and errors as short messages and exit codes."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import mfm_nnunet
from mfm_nnunet.cli import run as running
from mfm_nnunet.errors import CaseFailure, CasesFailedError, MFMError, StoppedError
from mfm_nnunet.tasks.registry import list_tasks
from tests.builders.interface import COMMANDS


def command(name: str) -> Any:
    return importlib.import_module(f"mfm_nnunet.cli.{name}")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Record what the commands give to the jobs, which do nothing here."""
    seen: dict[str, Any] = {}

    def record(name: str, result: Any) -> None:
        def job(*arguments: Any, **keywords: Any) -> Any:
            seen.update(job=name, **keywords)
            if arguments:
                seen["arguments"] = arguments
            return result

        monkeypatch.setattr(mfm_nnunet, name, job)

    record("plan_and_preprocess", [SimpleNamespace(file=Path("plans.json"))])
    record("pretrain", Path("run/checkpoint_final.pth"))
    record("train", Path("model/fold_0"))
    record("predict", SimpleNamespace(table=None))
    return seen


HEAVY = "{'torch', 'numpy', 'nnunetv2', 'timm', 'SimpleITK', 'scipy', 'matplotlib'}"


@pytest.mark.parametrize("line", [*(f"{name} --help" for name in COMMANDS), "pretrain --list"])
def test_help_and_list_import_nothing_heavy(line: str) -> None:
    """So that they answer in under half a second: the time itself would depend on what else the computer does."""
    name, flag = line.split()
    code = (
        f"import atexit, sys; from mfm_nnunet.cli.{name} import main; "
        f"atexit.register(lambda: print('heavy', *{HEAVY} & set(sys.modules))); main(['{flag}'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines()[-1] == "heavy"
    assert f"usage: mfm_{name}" in result.stdout or flag == "--list"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_is_explained_and_no_other_is_taken(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor an abbreviation, nor a flag with its value attached."""
    assert all(action.help for action in command(name).build_parser()._actions)
    for flag, nearest in (("--hlep", "--help"), ("--workspac", "--workspace"), ("-plans_name_that_is_none", "")):
        with pytest.raises(SystemExit) as stopped:
            command(name).main([flag, "x"])
        message = capsys.readouterr().err
        assert stopped.value.code == 2
        assert flag in message
        assert f"'{nearest}'?" in message or not nearest
        assert len(message.splitlines()) <= 5


@pytest.mark.parametrize("flag", ["--telemetry", "--wandb"])
def test_a_flag_like_none_proposes_none(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("pretrain").main(["701", "3d_fullres", flag])
    assert capsys.readouterr().err == f"mfm_pretrain: unknown flag {flag}.\nSee mfm_pretrain --help.\n"


@pytest.mark.parametrize(
    "line",
    [
        "4 3d_fullres 0 -p mfmX",
        "-p mfmX 4 3d_fullres 0",
        "4 -p mfmX 3d_fullres 0",
        "-d 4 -c 3d_fullres -f 0 -p mfmX",
        "-f 0 -p mfmX 4 3d_fullres",
        "4 3d_fullres 0 -d 4 --plans=mfmX",
    ],
)
def test_positions_and_flags_alike(line: str, calls: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert command("train").main(line.split()) == 0
    assert (calls["dataset"], calls["configuration"], calls["fold"]) == ("4", "3d_fullres", 0)
    assert calls["plans_name"] == "mfmX"
    assert capsys.readouterr().out == f"{Path('model/fold_0')}\n"


@pytest.mark.parametrize(
    ("name", "line", "hint"),
    [
        ("train", "4 3d_fullres", "FOLD"),
        ("train", "4 3d_fullres 0 -d 5", "DATASET"),
        ("train", "4 3d_fullres 0 1", "1"),
        ("train", "4 3d_fullres 0 --set epochs", "name=value"),
        ("train", "4 3d_fullres 0 --set", "--set"),
        ("train", "4 3d_fullres 0 -num_gpus 0", "-num_gpus"),
        ("train", "4 3d_fullres 0 -device gpu", "-device"),
        ("pretrain", "701", "CONFIG"),
        ("plan_and_preprocess", "", "-d"),
        ("plan_and_preprocess", "-d 4 --spacing 1 2", "--spacing"),
        ("plan_and_preprocess", "-d 4 --spacing 1 2 0", "--spacing"),
        ("plan_and_preprocess", "-d 4 --spacing big", "--spacing"),
        ("plan_and_preprocess", "-d 4 --memory-gb nan", "--memory-gb"),
        ("plan_and_preprocess", "-d 4 --network vit", "--network"),
        ("predict", "-o out -m model", "-i"),
        ("predict", "-i in -o out", "-m MODEL_FOLDER"),
        ("predict", "-i in -o out -d 4", "-c CONFIG"),
        ("predict", "-i in -o out -m model -d 4 -c 2d", "not both"),
        ("predict", "-i in -o out -m model --overwrite --resume", "--overwrite"),
        ("predict", "-i in -o out -m model -step_size 1.5", "-step_size"),
        ("predict", "-i in -o out -m model -num_parts 2 -part_id 2", "-part_id"),
        ("study", "4 3d_fullres --arms scratch", "--labels"),
        ("study", "4 3d_fullres --labels 5", "--arms"),
        ("study", "4 3d_fullres --labels 5 --arms", "--arms"),
        ("study", "4 --labels 5 --arms scratch", "CONFIG"),
        ("study", "4 3d_fullres --labels 5 --arms scratch --jobs 0", "--jobs"),
        ("study", "4 3d_fullres --labels 5 --arms scratch --seeds some", "--seeds"),
    ],
)
def test_wrong_usage_is_refused(name: str, line: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = command(name).main(line.split())
    except SystemExit as stopped:  # what the parser finds; what a request refuses is returned
        code = stopped.code
    message = capsys.readouterr().err
    assert code == 2
    assert hint in message
    assert len(message.splitlines()) <= 5


def test_wrong_folds_are_refused_and_all_is_one(calls: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert command("train").main(["4", "3d_fullres", "first"]) == 2
    assert "E_CONFIG" in capsys.readouterr().err
    assert not calls
    assert command("train").main(["4", "3d_fullres", "all"]) == 0
    assert calls["fold"] == "all"


def test_several_settings_leave_the_positions_alone(calls: dict[str, Any]) -> None:
    line = ["--set", "pretrain.epochs=3", "seed=1", "701", "3d_fullres", "--set", "pretext.mask_ratio=0.5", "--c"]
    assert command("pretrain").main(line) == 0
    assert calls["settings"] == ("pretrain.epochs=3", "seed=1", "pretext.mask_ratio=0.5")
    assert (calls["dataset"], calls["configuration"]) == ("701", "3d_fullres")
    assert calls["continue_training"] is True


def test_pretrain_prints_the_checkpoint_last(calls: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert command("pretrain").main(["701", "3d_fullres", "--pretext", "volume_fusion", "-device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(Path("run/checkpoint_final.pth"))
    assert (calls["pretext"], calls["device"], calls["num_gpus"]) == ("volume_fusion", "cpu", 1)


def test_pretrain_lists_the_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("pretrain").main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    for task in list_tasks():
        for text in (task.name, ", ".join(task.backbones), task.recipe, task.paper):
            assert any(text in line for line in lines), text
    assert all(word in " ".join(lines).split() for task in list_tasks() for word in task.hides.split())


def test_plan_hands_everything_over(calls: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    line = "-d 4 Dataset005_X -c 2d 3d_fullres --network primus --memory-gb 8 --spacing 1 1 2.5 -pl mfmA -np 2 --no_pp"
    assert command("plan_and_preprocess").main([*line.split(), "--workspace", "w"]) == 0
    assert calls["datasets"] == ["4", "Dataset005_X"]
    assert calls["configurations"] == ("2d", "3d_fullres")
    assert calls["spacing"] == (1.0, 1.0, 2.5)
    assert (calls["memory_gb"], calls["num_processes"], calls["preprocess"]) == (8.0, 2, False)
    assert (calls["network"], calls["plans_name"], calls["workspace"]) == ("primus", "mfmA", "w")
    assert "plans.json" in capsys.readouterr().out


def test_plan_registers_a_corpus(calls: dict[str, Any]) -> None:
    assert command("plan_and_preprocess").main(["-d", "701", "--images", "scans/", "--name", "Corpus"]) == 0
    assert (calls["images"], calls["name"], calls["spacing"]) == ("scans/", "Corpus", "median")


def test_predict_hands_everything_over(calls: dict[str, Any]) -> None:
    line = (
        "-i in -o out -d 4 -c 3d_fullres -f 0 all -p mfmA -tr T -chk checkpoint_best.pth -step_size 0.7 --disable_tta "
        "--save_probabilities -prev_stage_predictions prev -num_parts 3 -part_id 1 -device cpu --continue_prediction "
        "-npp 2 -nps 2 --disable_progress_bar"
    )
    assert command("predict").main(line.split()) == 0
    assert calls == {
        "job": "predict", "input_folder": "in", "output_folder": "out",
        "model_folder": None, "dataset": "4", "configuration": "3d_fullres", "folds": (0, "all"),
        "plans_name": "mfmA", "trainer": "T", "checkpoint_name": "checkpoint_best.pth", "step_size": 0.7,
        "mirroring": False, "save_probabilities": True, "overwrite": False, "resume": True, "previous_stage": "prev",
        "num_parts": 3, "part_id": 1, "device": "cpu", "workspace": None,
        "spacing": None, "series": None, "key_file": None, "dicom_seg": False, "references": None,
        "report": True, "classes": None, "classes_of": None, "modality": None, "dry_run": False, "fast": False,
    }  # fmt: skip


def outcome(error: BaseException | None, debug: bool = False) -> int:
    def job(arguments: argparse.Namespace) -> None:
        if error:
            raise error

    return running.run_command(job, argparse.Namespace(workspace="w", debug=debug))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (MFMError("E_CONFIG", "wrong"), 2),
        (CasesFailedError([CaseFailure("a", "E_EMPTY", "empty")], 3), 3),
        (StoppedError(143, "stopped"), 143),
        (StoppedError(130, "stopped"), 130),
        (KeyboardInterrupt(), 130),
        (RuntimeError("broken"), 1),
        (ValueError("not by us"), 1),
        (FloatingPointError("the loss became non-finite"), 1),
        (MemoryError(), 2),
        (OSError(28, "No space left on device", "file"), 2),
        (PermissionError(13, "Permission denied", "file"), 2),
    ],
)
def test_exit_codes(error: BaseException | None, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(error) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert len(captured.err.splitlines()) == (0 if error is None else len(str(error).splitlines()) or 1)


@pytest.mark.parametrize("fault", ["raise ValueError('too few')", "int('x')", "a, b = [1]", "dict([1])"])
def test_only_our_own_errors_are_the_users(fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Built-ins raise from the frame that called them, so a frame of this package says nothing."""

    def job(arguments: argparse.Namespace) -> None:
        exec(compile(fault, running.__file__, "exec"), {})

    assert running.run_command(job, argparse.Namespace(workspace="w", debug=False)) == 1
    assert capsys.readouterr().err.startswith("internal error: ")
    assert "Traceback" in Path("w/mfm_error.log").read_text()


def test_internal_error_is_one_line_and_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    """Also with text that is not UTF-8."""
    assert outcome(RuntimeError("M\udcfcller broken\nin two lines")) == 1
    message, log = capsys.readouterr().err, Path("w/mfm_error.log")
    assert message.startswith(r"internal error: RuntimeError: M\udcfcller broken (")
    assert str(log) in message
    assert "--debug" in message
    assert "Traceback" in log.read_text(encoding="utf-8")
    assert r"M\udcfcller" in log.read_text(encoding="utf-8")


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(MFMError("E_CONFIG", "wrong"), debug=True) == 2
    message = capsys.readouterr().err
    assert "Traceback" in message
    assert message.endswith("E_CONFIG  wrong\n")


def test_a_long_message_is_cut_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    failures = [CaseFailure(f"case{number}", "E_EMPTY", "the file is empty") for number in range(50)]
    assert outcome(CasesFailedError(failures, 60)) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert "50 of 60" in lines[0]
    assert "47 more lines" in lines[-1]
    assert "case49" in Path("w/mfm_error.log").read_text()


def run_python(code: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


PRELUDE = (
    "import argparse, sys, time; from mfm_nnunet.cli.run import run_command; "
    "arguments = argparse.Namespace(workspace=sys.argv[1] if sys.argv[1:] else 'w', debug=False); "
)


def test_sigterm_ends_with_143() -> None:
    code = PRELUDE + "sys.exit(run_command(lambda a: (print('ready', flush=True), time.sleep(60)), arguments))"
    with run_python(code) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(20) == 143
        assert process.stderr.read() == "stopped by SIGTERM.\n"


def test_a_reader_that_goes_away_makes_no_noise() -> None:
    code = PRELUDE + "sys.exit(run_command(lambda a: [print('x' * 1000) for _ in range(10000)], arguments))"
    with run_python(code) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(20) == 1
        assert process.stderr.read() == ""
