"""Lock, container recipes and release: they name what is there, agree with each other and with pyproject.toml.

Images are not built here: that needs a network and a container engine.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mfm_nnunet.version import __version__

tomllib = pytest.importorskip("tomllib")
from setup_scripts.write_lock import EXTRAS, LOCK, closure, required  # noqa: E402

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
APPTAINER = (ROOT / "apptainer.def").read_text()
WORKFLOW = ROOT / ".github" / "workflows" / "release.yml"
FILES = ("Dockerfile", "apptainer.def", "requirements.lock", ".github/workflows/release.yml")
INSTALL = ROOT / "setup_scripts" / "install_locked.sh"


def locked() -> dict[str, str]:
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def instructions(name: str) -> list[str]:
    """The arguments of a Dockerfile's instructions, continued lines joined."""
    text = DOCKERFILE.replace("\\\n", "")
    return [line.partition(" ")[2].strip() for line in text.splitlines() if line.startswith(f"{name} ")]


def section(name: str) -> list[str]:
    """The lines of a section of the apptainer recipe."""
    found = re.search(rf"^%{name}\n(.*?)(?=^%|\Z)", APPTAINER, re.MULTILINE | re.DOTALL)
    assert found, name
    return [line.strip() for line in found[1].splitlines() if line.strip()]


def test_the_lock_has_everything_that_is_required_in_a_version_that_fits() -> None:
    versions = locked()
    wrong = [
        str(item)
        for item in required()
        if not item.specifier.contains(versions.get(canonicalize_name(item.name), "0"), prereleases=True)
    ]
    assert not wrong
    assert set(EXTRAS) <= set(PROJECT["optional-dependencies"])
    assert all(re.fullmatch(r"[0-9][0-9a-z.+]*", version) for version in versions.values())
    assert list(versions) == sorted(versions)


def test_the_lock_is_the_closure_of_what_is_installed() -> None:
    """Through extras of dependencies too; what is missing or does not fit is not passed over."""
    assert {"torch", "jinja2", "markupsafe"} <= set(closure([Requirement("torch")]))
    assert "markdown-it-py" in closure([Requirement("rich")])
    with pytest.raises(PackageNotFoundError):
        closure([Requirement("no-such-package-at-all")])
    with pytest.raises(SystemExit, match=r"numpy.*is installed, numpy>=999"):
        closure([Requirement("numpy>=999")])


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_a_host(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not re.search(r"https?://|\b[\w-]+\.(org|io|com|net|dev)\b", text)


def test_both_containers_take_the_same_files_and_run_the_same_script() -> None:
    copied = {word for line in instructions("COPY") for word in line.split()[:-1]}
    assert copied == {line.split()[0] for line in section("files")}
    assert all((ROOT / name).exists() for name in copied)
    assert {"requirements.lock", "pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]} <= copied
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert {line[1:] for line in ignored} == copied
    for line in section("files"):
        source, target = line.split()
        assert target == f"/opt/mfm_nnunet/{source}"
    script = "setup_scripts/install_locked.sh"
    assert f'bash {script} "${{DEVICE}}" "${{TORCH_INDEX}}"' in instructions("RUN")
    assert f'bash /opt/mfm_nnunet/{script} "{{{{ DEVICE }}}}" "{{{{ TORCH_INDEX }}}}"' in section("post")
    assert section("arguments") == ["DEVICE=cuda", "TORCH_INDEX="]
    assert instructions("ARG") == ["PYTHON=3.11", "DEVICE=cuda", 'TORCH_INDEX=""']


def test_both_containers_have_the_python_of_the_lock() -> None:
    (python,) = re.findall(r"Python (3\.\d+) on Linux", LOCK.read_text())
    assert f"ARG PYTHON={python}\nFROM python:${{PYTHON}}-slim\n" in DOCKERFILE
    assert f"From: python:{python}-slim\n" in APPTAINER


def test_the_dockerfile_keeps_the_rules() -> None:
    """Those of hadolint that matter here: no cache of apt, no root, absolute folders, a command that exists."""
    (apt,) = [line for line in instructions("RUN") if "apt-get" in line]
    for part in ("apt-get update", "install --yes --no-install-recommends", "rm -rf /var/lib/apt/lists/*"):
        assert part in apt
    assert "sudo" not in DOCKERFILE
    assert not re.search(r"^RUN (?:.*&& )?(cd|pip) ", DOCKERFILE, re.MULTILINE)
    assert instructions("USER")[-1] not in ("root", "0")
    assert all(folder.startswith("/") for folder in instructions("WORKDIR"))
    assert not instructions("ADD")
    (command,) = yaml.safe_load(instructions("CMD")[0])
    assert command in PROJECT["scripts"]
    for used in re.findall(r"mfm_[a-z_]+(?= (?:networks|-i))|mfm_doctor", APPTAINER):
        assert used in PROJECT["scripts"]


def install(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script with a ``python`` that says what it was asked for, and shows the lock that it was given."""
    python = folder / "python"
    python.write_text('#!/bin/bash\necho "python $*"\nfor word; do [ -f "$word" ] && cat "$word"; done; true\n')
    python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(["bash", str(INSTALL), *arguments], env=environment, capture_output=True, text=True)


def test_what_the_containers_install(tmp_path: Path) -> None:
    everything = install(tmp_path, "cuda").stdout
    assert set(LOCK.read_text().splitlines()) <= set(everything.splitlines())
    assert "--extra-index-url" not in everything
    assert everything.splitlines()[-1] == "python -m pip check"
    on_cpu = install(tmp_path, "cpu", "file:///wheels").stdout
    left_out = set(everything.splitlines()) - set(on_cpu.splitlines())
    names = {line.partition("==")[0] for line in left_out if "==" in line}
    assert names == {name for name in locked() if name.startswith(("nvidia-", "cuda-"))} | {"triton"}
    assert "--extra-index-url file:///wheels" in on_cpu
    for wrong, word in ((("cpu",), "TORCH_INDEX"), (("tpu",), "Known: cuda, cpu")):
        refused = install(tmp_path, *wrong)
        assert refused.returncode == 2
        assert word in refused.stderr


def test_the_release_publishes_without_a_token() -> None:
    text = WORKFLOW.read_text()
    workflow = yaml.safe_load(text)
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML reads "on" as true
    jobs = workflow["jobs"]
    assert (jobs["try"]["needs"], jobs["publish"]["needs"]) == ("build", "try")
    assert workflow["permissions"] == {"contents": "read"}
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "secrets." not in text
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]) for step in steps if "uses" in step)
    for command in re.findall(r"^ +(mfm_\w+) ", text, re.MULTILINE):
        assert command in PROJECT["scripts"]
    for script in (step["run"] for step in steps if "run" in step):
        subprocess.run(["bash", "-n", "-c", script], check=True)


@pytest.mark.parametrize(("tag", "code"), [(f"v{__version__}", 0), ("v99.0.0", 1)])
def test_the_tag_is_compared_with_the_version(tag: str, code: int) -> None:
    (script,) = [
        step["run"] for step in yaml.safe_load(WORKFLOW.read_text())["jobs"]["build"]["steps"]
        if step.get("name") == "The tag is the version"
    ]  # fmt: skip
    environment = {**os.environ, "GITHUB_REF_NAME": tag}
    assert subprocess.run(["bash", "-e", "-c", script], cwd=ROOT, env=environment).returncode == code


@pytest.mark.long
def test_the_sdist_installs_and_runs_elsewhere(tmp_path: Path) -> None:
    """It has every file of the package, and its commands run where the repository is not."""
    build = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    place = tmp_path / "installed"
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--target", str(place))
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(archive)], cwd=tmp_path, check=True)
    listed = subprocess.run(["git", "ls-files", "mfm_nnunet"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not [name for name in listed.stdout.split() if not (place / name).is_file()]
    environment = {**os.environ, "PYTHONPATH": str(place)}
    for command, word in ((("mfm_info", "networks"), "primus"), (("mfm_checkpoint", "list"), "openmind-resencl-mae")):
        shown = subprocess.run(
            [place / "bin" / command[0], *command[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert shown.returncode == 0, shown.stderr
        assert word in shown.stdout
    where = "import mfm_nnunet; print(mfm_nnunet.__file__)"
    found = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.stdout.startswith(str(place))
