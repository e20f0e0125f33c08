"""The small hospital, built once; each test gets a copy of it."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.builders.site import Site, build, reader


@contextlib.contextmanager
def _captured() -> Iterator[tuple[io.StringIO, io.StringIO]]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        yield out, err


@pytest.fixture(scope="session")
def _hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch, _captured() as (out, err):
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer"):
            patch.delenv(name, raising=False)

        def call() -> tuple[str, str]:
            texts = out.getvalue(), err.getvalue()
            for stream in (out, err):
                stream.seek(0)
                stream.truncate()
            return texts

        return build(tmp_path_factory.mktemp("hospital"), call).folder


@pytest.fixture
def empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Site:
    """A place without anything."""
    return Site(tmp_path / "site", reader(capsys))


@pytest.fixture
def site(_hospital: Path, empty: Site) -> Site:
    """A copy of the hospital; its corpus refers to the scans of the original."""
    shutil.copytree(_hospital, empty.folder)
    return empty
