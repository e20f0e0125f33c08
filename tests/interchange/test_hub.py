"""Addresses of checkpoints: files, folders, and a hub that is played by a server on this computer."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, hf_hub_download

from mfm_nnunet.errors import MFMError
from mfm_nnunet.interchange.hub import fetch
from mfm_nnunet.interchange.read import find_checkpoint, read_checkpoint
from tests.builders import foreign

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ADDRESS = f"hf://AnonRes/ResEncL-OpenMind-MAE@{COMMIT}"


class Hub(ThreadingHTTPServer):
    """A hub with one repository; ``asked`` are the files that were fetched."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.asked: list[str] = []
        self.lies = False
        """Whether files are not what their hashes say."""
        self.status = 0
        """What every question is answered with, if it is not 0."""


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(is_head=True)

    def do_GET(self) -> None:
        self.answer(is_head=False)

    def answer(self, is_head: bool) -> None:
        path = self.path.partition("?")[0]
        if self.server.status:
            self.send_error(self.server.status)
            return
        if path == f"/api/models/AnonRes/ResEncL-OpenMind-MAE/revision/{COMMIT}":
            assert "blobs=true" in self.path
            siblings = [listed(name, data) for name, data in self.server.files.items()]
            self.send(json.dumps({"id": "AnonRes/ResEncL-OpenMind-MAE", "sha": COMMIT, "siblings": siblings}).encode())
            return
        name = path.rpartition("/")[2]
        if not path.startswith(f"/AnonRes/ResEncL-OpenMind-MAE/resolve/{COMMIT}/") or name not in self.server.files:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = self.server.files[name]
        entry = listed(name, data)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{entry.get("lfs", {}).get("sha256") or entry["blobId"]}"'}
        if not is_head:
            self.server.asked.append(name)
            data = data[:-1] + b"?" if self.server.lies else data
        self.send(data, headers, is_head)

    def send(self, data: bytes, headers: dict[str, str] | None = None, is_head: bool = False) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if not is_head:
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


def listed(name: str, data: bytes) -> dict[str, Any]:
    """What a hub lists of a file: git's hash, and SHA-256 of those that are too large for git."""
    git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git}
    if name.endswith((".json", ".md")):
        return entry
    return {**entry, "lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    file = foreign.OPENMIND["ResEncL-OpenMind-MAE"]().write(tmp_path / "origin")
    files = {"checkpoint_final.pth": file.read_bytes(), "README.md": b"card", "huge.bin": b"x", "evil.pkl": b"x"}
    with Hub({**files, "config.json": b"{}"}) as server:
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_hub_is_asked_for_what_is_needed_once(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = find_checkpoint(ADDRESS)
    assert file.read_bytes() == hub.files["checkpoint_final.pth"]
    assert hub.asked == ["config.json", "README.md", "checkpoint_final.pth"]
    assert read_checkpoint(file).mfm["pretext"] == "mae"
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    assert find_checkpoint(ADDRESS) == file


def test_a_file_that_is_not_what_the_hub_lists_is_removed(hub: Hub) -> None:
    hub.lies = True
    with pytest.raises(MFMError, match="hash differs") as caught:
        find_checkpoint(ADDRESS)
    assert caught.value.code == "E_MODEL_CORRUPT"
    hub.lies = False
    assert find_checkpoint(ADDRESS).read_bytes() == hub.files["checkpoint_final.pth"]


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("name", ["checkpoint_final.pth", "config.json"])
def test_a_cache_that_was_changed_is_noticed(
    name: str, links: bool, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the cache cannot link its files, their names tell no hash."""
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda *_: links)
    file = find_checkpoint(ADDRESS).with_name(name)
    assert file.is_symlink() == links
    file.resolve().write_bytes(b"another")
    with pytest.raises(MFMError, match="hash differs"):
        find_checkpoint(ADDRESS)
    assert find_checkpoint(ADDRESS).with_name(name).read_bytes() == hub.files[name]


def test_a_cache_that_another_program_filled_is_completed(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    repository = ADDRESS.removeprefix("hf://").partition("@")[0]
    fetched = hf_hub_download(repository, "checkpoint_final.pth", revision=COMMIT)
    with monkeypatch.context() as without, caplog.at_level(logging.INFO):
        without.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        assert str(find_checkpoint(ADDRESS)) == fetched
    assert "not in the cache, if it has them: config.json, adaptation_plan.json" in caplog.text
    assert str(find_checkpoint(ADDRESS)) == fetched
    assert hub.asked == ["checkpoint_final.pth", "config.json", "README.md"]


def test_no_connection_of_a_client_that_calls_it_a_file_error(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """requests' ConnectionError is an OSError without a number: what is in the cache is used."""
    no_connection = type("ConnectionError", (OSError,), {"__module__": "requests.exceptions"})
    fetched = hf_hub_download("AnonRes/ResEncL-OpenMind-MAE", "checkpoint_final.pth", revision=COMMIT)

    def refuse(*_: Any, **__: Any) -> str:
        raise no_connection("nobody answers")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    assert str(find_checkpoint(ADDRESS)) == fetched


def test_hubs_that_list_no_hash_are_not_trusted(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.listed", lambda name, data: {"rfilename": name})
    with pytest.raises(MFMError, match="lists no hash") as caught:
        fetch(ADDRESS)
    assert caught.value.code == "E_NETWORK"


@pytest.mark.parametrize(("status", "code"), [(401, "E_NOT_FOUND"), (403, "E_NOT_FOUND"), (503, "E_NETWORK")])
def test_what_the_hub_answers_is_told(status: int, code: str, hub: Hub) -> None:
    hub.status = status
    with pytest.raises(MFMError, match=str(status)) as caught:
        fetch(ADDRESS)
    assert caught.value.code == code


def test_a_full_disk_is_no_missing_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(OSError, match="No space"):
        fetch(ADDRESS)


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(MFMError, match="cannot be reached") as caught:
        fetch(ADDRESS)
    assert caught.value.code == "E_NETWORK"


def test_a_repository_that_does_not_exist(hub: Hub) -> None:
    with pytest.raises(MFMError, match="404") as caught:
        fetch(f"hf://AnonRes/Other@{COMMIT}")
    assert caught.value.code == "E_NOT_FOUND"
    hub.files.pop("checkpoint_final.pth")
    with pytest.raises(MFMError, match="has neither") as caught:
        fetch(ADDRESS)
    assert caught.value.code == "E_NOT_FOUND"


@pytest.mark.parametrize(
    "address",
    [
        "hf://AnonRes", "hf://a/b", "hf://a/b@main", f"hf://a/b@{COMMIT[:-1]}", "file://elsewhere/a.pth",
        f"hf://a/b--c@{COMMIT}", "https://huggingface.co/AnonRes/ResEncL-OpenMind-MAE",
        "https://huggingface.co/AnonRes/ResEncL-OpenMind-MAE/tree/main",
    ],
)  # fmt: skip
def test_addresses_that_cannot_be_trusted(address: str) -> None:
    with pytest.raises(MFMError) as caught:
        fetch(address)
    assert caught.value.code == "E_CONFIG"
    assert address in caught.value.message


def test_files_and_folders_of_this_computer(tmp_path: Path) -> None:
    file = foreign.OPENMIND["ResEncL-OpenMind-MAE"]().write(tmp_path / "with space")
    for address in (file, str(file), file.parent, file.as_uri(), file.parent.as_uri()):
        assert find_checkpoint(address) == file
