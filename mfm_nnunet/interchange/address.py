"""Where a checkpoint lies: a path, ``file://...``, or ``hf://owner/name@commit`` on a model hub; one way for all.

A hub's revision can be moved by its owner, so only a commit (40 hex digits) is accepted. Of a repository only weights,
plans and the card are fetched, and the weights are compared with the SHA-256 that the hub lists for them. What was
fetched once is used from the hub client's cache, also without a network.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlparse

from mfm_nnunet.checkpoint import sha256
from mfm_nnunet.errors import MFMError

WEIGHTS = ("model.safetensors", "checkpoint_final.pth")
"""The first that a repository has is fetched."""
BESIDE = ("config.json", "adaptation_plan.json", "README.md")
"""What is fetched beside the weights, where it is there."""
_HUB = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<commit>[^/]+))?/?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def fetch(address: str | Path) -> Path:
    """The local file or folder of an address.

    Raises MFMError: E_CONFIG for an address that is none or names no commit, E_NOT_FOUND for what the hub does not
    have, E_NETWORK when it cannot be reached and the cache has nothing, E_MODEL_CORRUPT when a hash differs.
    """
    text = str(address)
    if text.startswith("file:"):
        parsed = urlparse(text)
        if parsed.netloc not in ("", "localhost"):
            raise MFMError("E_CONFIG", f"{text}: a file of another computer. Give file:///PATH or a path.")
        return Path(unquote(parsed.path))
    if not text.startswith("hf://"):
        return Path(address)
    match = _HUB.fullmatch(text)
    if match is None:
        raise MFMError("E_CONFIG", f"{text}: expected hf://owner/name@commit.")
    if not _COMMIT.fullmatch(match["commit"] or ""):
        raise MFMError(
            "E_CONFIG",
            f"{text}: name the commit, hf://{match['repo']}@ and 40 hex digits (the hub's page lists them): a branch "
            "or tag may be moved, and the weights with it.",
        )
    return _snapshot(match["repo"], match["commit"])


def _snapshot(repository: str, commit: str) -> Path:
    """The folder of a repository in the cache, fetched if needed."""
    try:
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise MFMError("E_CONFIG", "hf:// needs the package huggingface_hub: pip install huggingface_hub.") from error
    cached = _cached(repository, commit)
    if cached is not None:
        return cached
    where = f"hf://{repository}@{commit}"
    try:
        listed = {entry.rfilename for entry in HfApi().model_info(repository, revision=commit).siblings or ()}
        weights = next((name for name in WEIGHTS if name in listed), None)
        if weights is None:
            raise MFMError("E_NOT_FOUND", f"{where}: the repository has neither {' nor '.join(WEIGHTS)}.")
        # The weights last: what is in the cache then is whole.
        names = [*(name for name in BESIDE if name in listed), weights]
        for name in names:
            file = Path(hf_hub_download(repository, name, revision=commit))
            _require_hash(where, file)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        raise MFMError("E_NOT_FOUND", f"{where}: the hub answered {status}. Check owner, name and commit.") from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise _no_network(where) from error
    except Exception as error:  # the client's transport raises errors of its own library when there is no connection
        if type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            raise _no_network(where) from error
        raise
    return file.parent


def _cached(repository: str, commit: str) -> Path | None:
    """The snapshot if its weights were fetched before; they are verified again, since that may have been cut short."""
    from huggingface_hub import try_to_load_from_cache

    for weights in WEIGHTS:
        found = try_to_load_from_cache(repository, weights, revision=commit)
        if isinstance(found, str):
            _require_hash(f"hf://{repository}@{commit}", Path(found))
            return Path(found).parent
    return None


def _require_hash(where: str, file: Path) -> None:
    """Compare a file with the SHA-256 that the hub lists, by which the cache names it; files in git have none."""
    blob = file.resolve()
    if _SHA256.fullmatch(blob.name) and sha256(blob) != blob.name:
        blob.unlink()
        file.unlink(missing_ok=True)
        raise MFMError(
            "E_MODEL_CORRUPT",
            f"{where}: {file.name} is not what the hub lists (its SHA-256 differs). It was removed; fetch it again.",
        )


def _no_network(where: str) -> MFMError:
    return MFMError(
        "E_NETWORK",
        f"{where}: the hub cannot be reached and this checkpoint was not fetched before. Connect, or copy the "
        "repository's files into a folder and give its path.",
    )
