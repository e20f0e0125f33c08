"""Fetch checkpoints by address: a path, ``file://...``, or ``hf://owner/name@commit`` on a model hub.

Branches and tags can be moved by their owner, so only a commit (40 hex digits) is accepted. Only weights, plans and
the model card are downloaded. Each file is verified against the hash that the hub lists: SHA-256, or git's hash for
small files. Without a connection the hub client's cache is used.
"""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from urllib.parse import unquote, urlparse

from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import sha256

logger = logging.getLogger(__name__)

WEIGHTS = ("checkpoint_final.pth", "model.safetensors")
"""The first of these in a repository is downloaded. Our own have only safetensors."""
BESIDE = ("config.json", "adaptation_plan.json", "README.md")
"""Optional files to download with the weights."""
_HUB = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<commit>[^/]+))?/?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PAGE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>[\w.-]+/[\w.-]+)(?:/.*)?")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_CLIENTS = ("httpx", "httpcore", "requests", "urllib3")
"""Libraries whose connection errors the hub client does not wrap."""


def fetch(address: str | Path) -> Path:
    """Return the local file or folder for an address, downloading it if needed.

    Raises MFMError: E_CONFIG for an invalid address or one without a commit, E_NOT_FOUND if the hub does not have it,
    E_NETWORK if the hub cannot be reached and the cache is empty, E_MODEL_CORRUPT if a hash differs. Raises OSError if
    the cache cannot be written.
    """
    text = str(address)
    if text.startswith("file:"):
        try:
            parsed = urlparse(text)
        except ValueError as error:
            raise MFMError("E_CONFIG", f"{text}: not an address ({error}). Give file:///PATH or a path.") from error
        if parsed.netloc not in ("", "localhost"):
            raise MFMError("E_CONFIG", f"{text}: the file is on another computer. Give file:///PATH or a path.")
        return Path(unquote(parsed.path))
    if page := _PAGE.fullmatch(text):
        raise MFMError(
            "E_CONFIG",
            f"{text}: give hf://{page['repo']}@COMMIT, with the 40 hex digits of a commit (the page lists them under "
            "Files, History).",
        )
    if not text.startswith("hf://"):
        return Path(address)
    match = _HUB.fullmatch(text)
    if match is None:
        raise MFMError("E_CONFIG", f"{text}: expected hf://owner/name@commit.")
    if not _COMMIT.fullmatch(match["commit"] or ""):
        raise MFMError(
            "E_CONFIG",
            f"{text}: add the commit: hf://{match['repo']}@ and 40 hex digits, listed on the hub's page. A branch or "
            "tag may move, and the weights with it.",
        )
    return _snapshot(match["repo"], match["commit"])


def _snapshot(repository: str, commit: str) -> Path:
    """Return the folder of a repository in the hub client's cache, downloaded if needed."""
    try:
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise MFMError("E_CONFIG", "hf:// needs the package huggingface_hub: pip install huggingface_hub.") from error
    where = f"hf://{repository}@{commit}"
    try:
        return _download(where, repository, commit)
    except HFValidationError as error:
        raise MFMError("E_CONFIG", f"{where}: not a valid repository ({error}). Check owner and name.") from error
    except HfHubHTTPError as error:
        raise _refused(where, error.response.status_code if error.response is not None else 0) from error
    except Exception as error:
        is_of_client = type(error).__module__.startswith(_CLIENTS)  # requests' errors are OSErrors too
        if is_of_client or isinstance(error, (LocalEntryNotFoundError, ConnectionError, TimeoutError)):
            return _cached(where, repository, commit, error)
        if isinstance(error, OSError) and error.errno is None:  # not a disk error
            raise MFMError("E_NETWORK", f"{where}: the download was interrupted ({error}). Try again.") from error
        raise


def _download(where: str, repository: str, commit: str) -> Path:
    """Download the files that are not cached, and verify all of them against the hub's hashes."""
    from huggingface_hub import HfApi, hf_hub_download

    listed = {}
    for entry in HfApi().model_info(repository, revision=commit, files_metadata=True).siblings or ():
        listed[entry.rfilename] = entry.lfs.sha256 if entry.lfs else entry.blob_id
    weights = next((name for name in WEIGHTS if name in listed), None)
    if weights is None:
        raise MFMError("E_NOT_FOUND", f"{where}: the repository has neither {' nor '.join(WEIGHTS)}.")
    files, wrong = [], []
    for name in (*(name for name in BESIDE if name in listed), weights):
        if not _HASH.fullmatch(listed[name] or ""):
            raise MFMError("E_NETWORK", f"{where}: the hub lists no hash of {name}, so it cannot be verified.")
        files.append(Path(hf_hub_download(repository, name, revision=commit)))
        if not _has_hash(files[-1], str(listed[name])):
            wrong.append(name)
            if files[-1].resolve().is_relative_to(files[-1].parents[2].resolve()):  # a link may lead out of the cache
                files[-1].resolve().unlink(missing_ok=True)
            files[-1].unlink(missing_ok=True)
    if wrong:
        raise MFMError(
            "E_MODEL_CORRUPT",
            f"{where}: {', '.join(wrong)}: the hash differs from the hub's. Removed; run the command again.",
        )
    return files[0].parent


def _cached(where: str, repository: str, commit: str, error: Exception) -> Path:
    """Return the folder of an earlier download, for use without a connection."""
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(repository, name, revision=commit) for name in (*BESIDE, *WEIGHTS)]
    files = {Path(file).name: Path(file) for file in found if isinstance(file, str)}
    if not files.keys() & set(WEIGHTS):
        raise MFMError(
            "E_NETWORK",
            f"{where}: the hub cannot be reached, and this checkpoint was not downloaded before. Connect to the "
            "internet, or copy the files of the repository into a folder and give its path.",
        ) from error
    if missing := [name for name in BESIDE if name not in files]:
        logger.info("%s: the hub cannot be reached; not in the cache, if it has them: %s", where, ", ".join(missing))
    return next(iter(files.values())).parent


def _has_hash(file: Path, wanted: str) -> bool:
    if len(wanted) == 64:
        return sha256(file) == wanted
    content = file.read_bytes()  # git's own hash
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == wanted


def _refused(where: str, status: int) -> MFMError:
    if status in (401, 403):
        return MFMError(
            "E_NOT_FOUND",
            f"{where}: the hub denies access ({status}). Check owner and name, accept the model's conditions on its "
            "page, and log in with: hf auth login.",
        )
    if status in (0, 408, 429) or status >= 500:
        return MFMError("E_NETWORK", f"{where}: the hub answered {status or 'nothing'}. Try again later.")
    return MFMError("E_NOT_FOUND", f"{where}: the hub answered {status}. Check owner, name and commit.")
