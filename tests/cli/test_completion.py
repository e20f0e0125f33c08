"""``mfm_info completion``: what a shell offers after a Tab."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from mfm_nnunet.cli.info import COMMANDS, SHELLS, completion_script, main
from tests.builders.interface import parser_of

ASK = """
set -eu
source "$1"
command="$2"; shift 2
complete -p "$command" >/dev/null
COMP_WORDS=("$command" "$@"); COMP_CWORD=$#
"_shtab_$command"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("shell") / "completion.bash"
    file.write_text(completion_script("bash"))
    return file


def ask(script: Path, line: str, folder: Path) -> set[str]:
    """Return what bash offers for the last word of a line; an empty one is '-'."""
    words = ["" if word == "-" else word for word in line.split()]
    command = ["bash", "-c", ASK, "ask", str(script), *words]
    return set(subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.split())


def test_the_script_is_legal_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_of_every_command_is_offered(name: str, script: Path, tmp_path: Path) -> None:
    long = {flag for flag in parser_of(name).flags() if flag.startswith("--")}
    assert ask(script, f"mfm_{name} --", tmp_path) == long


def test_flags_words_and_files(script: Path, tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "weights.pth").touch()
    assert ask(script, "mfm_train --accept-l", tmp_path) == {"--accept-licence"}
    assert ask(script, "mfm_train 4 3d_fullres 0 -device c", tmp_path) == {"cpu", "cuda"}
    assert ask(script, "mfm_checkpoint d", tmp_path) == {"describe"}
    assert ask(script, "mfm_train 4 3d_fullres 0 -pretrained_weights w", tmp_path) == {"weights.pth"}
    assert ask(script, "mfm_predict -i -", tmp_path) == {"scans", "weights.pth"}


@pytest.mark.parametrize("shell", SHELLS)
def test_one_script_has_all_commands(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert not [name for name in COMMANDS if f"mfm_{name}" not in text]


@pytest.mark.parametrize("line", ["completion", "completion fish", "completion bash --json"])
def test_which_shell(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    assert stopped.value.code == 2
    assert "bash, zsh, tcsh" in capsys.readouterr().err
