"""Addresses of checkpoints: files, folders, and a hub that is played by a server on this computer."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, hf_hub_download

from mfm_nnunet import info
from mfm_nnunet.errors import MFMError
from mfm_nnunet.interchange.hub import fetch
from mfm_nnunet.interchange.published import PUBLISHED
from mfm_nnunet.interchange.read import convert, find_checkpoint, read_checkpoint
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
        self.commit = COMMIT
        """The newest commit; all files are of it."""


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
        commit, owners = self.server.commit, ("AnonRes", "MIC-DKFZ")
        for repository in (f"{owner}/ResEncL-OpenMind-MAE" for owner in owners):
            if path in (f"/api/models/{repository}/revision/{revision}" for revision in ("main", commit)):
                self.send(json.dumps({"id": repository, "sha": commit, "siblings": []}).encode())
                return
            if path == f"/api/models/{repository}/tree/{commit}":
                self.send(json.dumps([listed(name, data) for name, data in self.server.files.items()]).encode())
                return
        name = path.rpartition("/")[2]
        if f"/ResEncL-OpenMind-MAE/resolve/{commit}/" not in path or name not in self.server.files:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = self.server.files[name]
        entry = listed(name, data)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry.get("lfs", {}).get("oid") or entry["oid"]}"'}
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
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": git}
    if name.endswith((".json", ".md")):
        return entry
    return {**entry, "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}}


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
    assert sorted(hub.asked) == ["README.md", "checkpoint_final.pth", "config.json"]
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
    assert "files in the cache are used as they are" in caplog.text
    assert str(find_checkpoint(ADDRESS)) == fetched
    assert sorted(hub.asked) == ["README.md", "checkpoint_final.pth", "config.json"]


def test_no_connection_of_a_client_that_calls_it_a_file_error(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """requests' ConnectionError is an OSError without a number: what is in the cache is used."""
    no_connection = type("ConnectionError", (OSError,), {"__module__": "requests.exceptions"})
    fetched = hf_hub_download("AnonRes/ResEncL-OpenMind-MAE", "checkpoint_final.pth", revision=COMMIT)

    def refuse(*_: Any, **__: Any) -> str:
        raise no_connection("nobody answers")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    assert str(find_checkpoint(ADDRESS)) == fetched


def test_hubs_that_list_no_hash_are_not_trusted(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    without = lambda name, data: {"type": "file", "path": name, "size": len(data), "oid": None}  # noqa: E731
    monkeypatch.setattr(f"{__name__}.listed", without)
    with pytest.raises(MFMError, match="hash differs") as caught:
        fetch(ADDRESS)
    assert caught.value.code == "E_MODEL_CORRUPT"


@pytest.mark.parametrize(("status", "code"), [(401, "E_NOT_FOUND"), (403, "E_NOT_FOUND"), (503, "E_NETWORK")])
def test_what_the_hub_answers_is_told(status: int, code: str, hub: Hub) -> None:
    hub.status = status
    with pytest.raises(MFMError, match=str(status)) as caught:
        fetch(ADDRESS)
    assert caught.value.code == code


def test_a_full_disk_is_no_missing_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
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


def publish(monkeypatch: pytest.MonkeyPatch, **changes: str | None) -> str:
    """Let the played hub's repository have a published name, pinned as ``changes`` say."""
    entry = dataclasses.replace(PUBLISHED["openmind-resencl-mae"], sha256=None, **changes)
    monkeypatch.setitem(PUBLISHED, entry.name, entry)
    return entry.name


def test_a_published_name_is_pinned_by_its_first_download(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The commit is said, kept when the repository moves on, used without a connection, and recorded on import."""
    name, address = publish(monkeypatch), f"hf://MIC-DKFZ/ResEncL-OpenMind-MAE@{COMMIT}"
    with caplog.at_level(logging.INFO):
        file = find_checkpoint(name)
    assert f"{name}: this computer uses {address} from now on" in caplog.text
    hub.commit = "f" * 40
    with pytest.raises(MFMError, match="404"):  # the played hub forgets the older commit, a real one keeps it
        find_checkpoint(name)
    hub.commit = COMMIT
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert find_checkpoint(name) == file
    assert read_checkpoint(file).origin["address"] == address
    convert(file, tmp_path / "ours.pth", "pth")
    source = read_checkpoint(tmp_path / "ours.pth").mfm["source"]
    assert (source["address"], source["sha256"]) == (address, hashlib.sha256(file.read_bytes()).hexdigest())


def test_a_published_name_with_a_hash_takes_no_other_weights(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(hub.files["checkpoint_final.pth"]).hexdigest()
    name = publish(monkeypatch, commit=COMMIT)
    monkeypatch.setitem(PUBLISHED, name, dataclasses.replace(PUBLISHED[name], sha256=digest))
    assert find_checkpoint(name).read_bytes() == hub.files["checkpoint_final.pth"]
    monkeypatch.setitem(PUBLISHED, name, dataclasses.replace(PUBLISHED[name], sha256="0" * 64))
    with pytest.raises(MFMError, match=f"{digest}, not the 0{{64}}.*@{COMMIT}") as caught:
        find_checkpoint(name)
    assert caught.value.code == "E_MODEL_CORRUPT"


def test_names_of_published_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MFMError, match=r"'openmind-resencl-mae'.*mfm_checkpoint list") as caught:
        fetch("openmind-resenc-mae")
    assert caught.value.code == "E_NOT_FOUND"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openmind-resencl-mae").mkdir()
    assert fetch("openmind-resencl-mae") == Path("openmind-resencl-mae")


def test_the_table_of_published_weights() -> None:
    """Each name is an address that this program takes, and what pins it has the form of a hash."""
    assert {row["name"] for row in info("checkpoints")} == set(PUBLISHED)
    for name, entry in PUBLISHED.items():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", name)
        assert re.fullmatch(r"[0-9a-f]{64}", entry.sha256 or "0" * 64)
        assert re.fullmatch(r"[0-9a-f]{40}", entry.commit or "0" * 40)
        assert re.fullmatch(r"[\w-]+/[\w-]+", entry.repository)
        assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", entry.paper)
    assert {entry.repository.partition("/")[2] for entry in PUBLISHED.values()} >= set(foreign.OPENMIND)
