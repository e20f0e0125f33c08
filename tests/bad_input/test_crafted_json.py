"""Hundreds of crafted JSON files, journals and preprocessed files: refused with a code or understood, and nothing else.

A part of a healthy file is replaced by what hurts: names that lead elsewhere, names of code, numbers beyond all bounds,
other types, depth. Whatever a command makes of it, it says so in a few lines, changes nothing outside of the workspace
and imports nothing that a file names.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.builders.site import CORPUS, FINETUNE, MAX_LINES, PRETRAIN, Outcome, Site, accepted, contents

SEED = 20261130
PER_FILE = 24
SECONDS = 60
"""Twice what a command may take, for tests share the cores."""

NASTY: tuple[Any, ...] = (
    None, True, False, -1, 0, 3, 1e308, 10**30, float("nan"), float("inf"), "", "x" * 10_000, "\u00b2", "\x1b[2J\u202e",
    "\ud83d", "../../../outside/victim.txt", "/../../outside/victim.txt", "{outside}/victim.txt", "pwned.run",
    "os.system", "subprocess.Popen", "__import__('os')", [], {}, [[]], [None], {"a": {}}, [1, 2, 3, 4, 5, 6, 7],
)  # fmt: skip
TEXTS: dict[str, Callable[[str], bytes]] = {
    "deep lists": lambda text: b"[" * 100_000 + b"]" * 100_000,
    "deep tables": lambda text: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "empty": lambda text: b"",
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "UTF-16": lambda text: text.encode("utf-16"),
    "cut off": lambda text: text.encode()[: len(text) // 2],
    "a long number": lambda text: b'{"labels": ' + b"9" * 10_000 + b"}",
    "bytes": lambda text: bytes(range(256)) * 10,
    "a list": lambda text: b"[1, 2]",
    "a text": lambda text: b'"text"',
}


@dataclass(frozen=True)
class Door:
    """A file that people hand on, and the command that reads it."""

    file: Callable[[Site], Path]
    command: Callable[[Site], Outcome]


def _train(site: Site, *words: object) -> Outcome:
    return site.train(1, *words, settings=FINETUNE)


def _predict(site: Site, *words: object) -> Outcome:
    return site.predict(site.test_images, site.folder / "masks", *words)


DOORS: dict[str, Door] = {
    "dataset.json": Door(lambda s: s.raw / "dataset.json", lambda s: s.plan("-d", 5, "-c", "3d_fullres")),
    "plan": Door(lambda s: s.preprocessed() / "mfmPlans.json", _train),
    "fingerprint": Door(
        lambda s: s.preprocessed() / "dataset_fingerprint.json", lambda s: s.plan("-d", 5, "-c", "3d_fullres")
    ),
    "splits": Door(lambda s: s.preprocessed() / "splits_final.json", _train),
    "dataset.json beside the data": Door(lambda s: s.preprocessed() / "dataset.json", _train),
    "model's plan": Door(lambda s: s.model / "plans.json", lambda s: _predict(s, "--overwrite")),
    "model's dataset.json": Door(lambda s: s.model / "dataset.json", lambda s: _predict(s, "--overwrite")),
    "run's settings": Door(lambda s: s.model / "fold_0" / "settings.json", lambda s: s.train(0, "--c")),
    "corpus.json": Door(
        lambda s: s.workspace / "nnUNet_raw" / CORPUS / "corpus.json",
        lambda s: s.plan("-d", 701, "-c", "3d_fullres"),
    ),
    "pretraining plan": Door(
        lambda s: s.preprocessed(CORPUS) / "mfmPlans.json",
        lambda s: s.pretrain("--run-name", "other", settings=PRETRAIN),
    ),
}


@contextmanager
def guarded(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place outside of the workspace that must stay as it is, and a module that notes it when it is imported."""
    outside = site.folder.parent / "outside"
    outside.mkdir()
    (outside / "victim.txt").write_text("precious")
    (outside / "pwned.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('imported').touch()\nrun = print\n"
    )
    monkeypatch.syspath_prepend(outside)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before, names = contents(outside), {entry.name for entry in site.folder.parent.iterdir()}
    yield outside
    assert contents(outside) == before
    assert {entry.name for entry in site.folder.parent.iterdir()} == names


def places_in(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all values of nested tables and lists."""
    if path:
        yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from places_in(value, (*path, key))


def crafted(text: str, number: int, seed: str, outside: Path) -> Iterator[tuple[str, bytes]]:
    """Versions of a JSON file, each with what was done to it."""
    for name, change in TEXTS.items():
        yield name, change(text)
    original = json.loads(text)
    places = list(places_in(original))
    for index in range(number):
        rng = random.Random(f"{SEED}/{seed}/{index}")
        content, path = copy.deepcopy(original), rng.choice(places)
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        action = rng.choice(("replace", "replace", "replace", "remove", "rename"))
        value = rng.choice(NASTY)
        value = value.replace("{outside}", str(outside)) if isinstance(value, str) else value
        if action == "remove":
            del parent[path[-1]]
        elif action == "rename" and isinstance(parent, dict):
            parent[str(value)] = parent.pop(path[-1])
        else:
            parent[path[-1]] = value
        yield f"{'.'.join(map(str, path))}: {action} {value!r:.60}", json.dumps(content).encode()


def problem_of(outcome: Outcome, seconds: float) -> str:
    """What is wrong with how a command ended; empty if nothing is."""
    shown = outcome.out + outcome.err
    if outcome.code not in (0, 2, 3):
        return f"exit code {outcome.code}: {outcome.err[-300:]}"
    for word in ("Traceback", "internal error", "E_INTERNAL"):
        if word in shown:
            return f"{word}: {shown[-300:]}"
    if len(outcome.message.splitlines()) > MAX_LINES:
        return f"{len(outcome.message.splitlines())} lines"
    return f"{seconds:.0f} s" if seconds > SECONDS else ""


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", DOORS)
def test_crafted_json(site: Site, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    door, problems, codes = DOORS[name], [], []
    if name == "splits":
        accepted(_train(site))
    elif name.startswith("model"):
        accepted(_predict(site))
    healthy = contents_of(site)
    text = door.file(site).read_text()
    with guarded(site, monkeypatch) as outside:
        for what, content in crafted(text, PER_FILE, name, outside):
            restore(site, healthy)
            door.file(site).write_bytes(content)
            start = time.monotonic()
            outcome = door.command(site)
            codes.append(outcome.code)
            if problem := problem_of(outcome, time.monotonic() - start):
                problems.append(f"{what}: {problem}")
            if (outside / "imported").exists():
                problems.append(f"{what}: a module was imported")
                (outside / "imported").unlink()
    assert not problems, "\n".join([f"{len(problems)} of {len(codes)}", *problems])
    assert 2 in codes or name == "fingerprint", "nothing was refused"  # a damaged fingerprint is made again


def contents_of(site: Site) -> dict[Path, bytes]:
    """All files of the workspace and of the predictions."""
    folders = (site.workspace, site.folder / "masks")
    return {file: file.read_bytes() for folder in folders for file in folder.rglob("*") if file.is_file()}


def restore(site: Site, healthy: dict[Path, bytes]) -> None:
    """Put all files back as they were, and remove what is new."""
    for file in set(contents_of(site)) - set(healthy):
        file.unlink()
    for file, content in healthy.items():
        if not file.is_file() or file.read_bytes() != content:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
