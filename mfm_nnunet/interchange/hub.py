"""Fetch checkpoints by address: a path, ``file://...``, a published name, or ``hf://owner/name@commit`` on a model hub.

Branches and tags can be moved by their owner, so only a commit (40 hex digits) is accepted. Only weights, plans and
the model card are downloaded. huggingface_hub downloads, caches, works offline from its cache, and compares each file
with the hash that the hub lists: SHA-256, or git's hash for small files.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from urllib.parse import unquote, urlparse

from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import sha256
from mfm_nnunet.interchange.published import Published, find_published

logger = logging.getLogger(__name__)

WEIGHTS = ("checkpoint_final.pth", "model.safetensors")
"""Weights in a repository; one is needed. Our own have only safetensors."""
BESIDE = ("config.json", "adaptation_plan.json", "README.md")
"""Optional files to download with the weights."""
_HUB = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<commit>[^/]+))?/?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CACHED = re.compile(r".*/models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<commit>[0-9a-f]{40})(/[^/]*)?")
_PAGE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>[\w.-]+/[\w.-]+)(?:/.*)?")
_NAME = re.compile(r"[\w-]+")
"""Form of a published name; files have an ending, and folders are there."""
_FIRST = "main"
"""Branch that is resolved at the first download of a published name without a commit. The client's cache keeps it."""
_CLIENTS = ("httpx", "httpcore", "requests", "urllib3")
"""Libraries whose connection errors the hub client does not wrap."""


def fetch(address: str | Path) -> Path:
    """Return the local file or folder for an address, downloading it if needed.

    A published name is the commit and the SHA-256 in the table. Without a commit there it is the newest one at the
    first download on this computer, which is logged.

    Raises MFMError: E_CONFIG for an invalid address or one without a commit, E_NOT_FOUND for an unknown name or if the
    hub does not have it, E_NETWORK if the hub cannot be reached and the cache is empty, E_MODEL_CORRUPT if a hash
    differs. Raises OSError if the cache cannot be written.
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
        is_name = _NAME.fullmatch(text) and not Path(text).exists()
        return _fetch_published(find_published(text)) if is_name else Path(address)
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


def hub_address(place: Path) -> str | None:
    """Return the address with the commit of a file or folder in the hub client's cache; None for other places."""
    match = _CACHED.fullmatch(place.absolute().as_posix())
    return f"hf://{match['owner']}/{match['name']}@{match['commit']}" if match else None


def _fetch_published(entry: Published) -> Path:
    revision = entry.commit or _first_commit(entry.repository) or _FIRST
    folder = _snapshot(entry.repository, revision)
    if revision == _FIRST:
        logger.info("%s: this computer uses %s from now on", entry.name, hub_address(folder))
    if entry.sha256 and (found := sha256(_weights_in(folder))) != entry.sha256:
        raise MFMError(
            "E_MODEL_CORRUPT",
            f"{entry.name}: the SHA-256 of the weights is {found}, not the {entry.sha256} they were published with. If "
            f"you trust the new ones, give their address: {hub_address(folder)}.",
        )
    return folder


def _first_commit(repository: str) -> str | None:
    """Return the commit of the first download on this computer, if the cache has its weights."""
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(repository, name, revision=_FIRST) for name in WEIGHTS]
    return next((Path(file).parent.name for file in found if isinstance(file, str)), None)


def _snapshot(repository: str, revision: str) -> Path:
    """Return the folder of a repository in the hub client's cache, downloaded if needed and verified."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    where = f"hf://{repository}@{revision}"
    try:
        return _download(where, repository, revision)
    except HFValidationError as error:
        raise MFMError("E_CONFIG", f"{where}: not a valid repository ({error}). Check owner and name.") from error
    except HfHubHTTPError as error:
        raise _refused(where, error.response.status_code if error.response is not None else 0) from error
    except LocalEntryNotFoundError as error:
        raise MFMError(
            "E_NETWORK",
            f"{where}: the hub cannot be reached, and this checkpoint was not downloaded before. Connect to the "
            "internet, or copy the files of the repository into a folder and give its path.",
        ) from error
    except Exception as error:
        if _is_unreachable(error) or (isinstance(error, OSError) and error.errno is None):  # not a disk error
            raise MFMError("E_NETWORK", f"{where}: the download was interrupted ({error}). Try again.") from error
        raise


def _download(where: str, repository: str, revision: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    hub, is_reached = HfApi(), True
    try:
        hub.model_info(repository, revision=revision)  # unlike the client's other calls it does not wait and retry
    except Exception as error:
        if not _is_unreachable(error):
            raise
        is_reached = False
    patterns = [*WEIGHTS, *BESIDE]
    folder = Path(
        snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=not is_reached)
    )
    has_weights = _weights_in(folder).is_file()
    if not is_reached:
        if not has_weights:
            raise LocalEntryNotFoundError("only other files are in the cache")
        logger.info("%s: the hub cannot be reached; its files in the cache are used as they are", where)
        return folder
    if not has_weights:
        raise MFMError("E_NOT_FOUND", f"{where}: the repository has neither {' nor '.join(WEIGHTS)}.")
    names = [str(wrong["path"]) for wrong in hub.verify_repo_checksums(repository, revision=folder.name).mismatches]
    for file in (folder / name for name in names):
        if file.resolve().is_relative_to(folder.parents[1].resolve()):  # a link may lead out of the cache
            file.resolve().unlink(missing_ok=True)
        file.unlink(missing_ok=True)
    if names:
        raise MFMError(
            "E_MODEL_CORRUPT",
            f"{where}: {', '.join(names)}: the hash differs from the hub's. Removed; run the command again.",
        )
    return folder


def _weights_in(folder: Path) -> Path:
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), folder / WEIGHTS[0])


def _is_unreachable(error: Exception) -> bool:
    is_of_client = type(error).__module__.startswith(_CLIENTS)  # requests' errors are OSErrors too
    return is_of_client or isinstance(error, (ConnectionError, TimeoutError))


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
