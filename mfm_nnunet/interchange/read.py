"""Read any checkpoint: ours, nnssl's and OpenMind's, nnU-Net's, a folder of safetensors, or a hub address.

No code in a file is executed. The result is in our layout (:class:`mfm_nnunet.interchange.foreign.Reading`).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mfm_nnunet import checkpoint, files
from mfm_nnunet.errors import MFMError, about
from mfm_nnunet.files import read_json
from mfm_nnunet.interchange import nnssl
from mfm_nnunet.interchange.folder import (
    CONFIG,
    UNKNOWN_LICENCE,
    WEIGHTS,
    is_folder_checkpoint,
    read_folder,
    read_pictures,
    stated_licence,
    write_hub_folder,
)
from mfm_nnunet.interchange.foreign import (
    DESCRIBED,
    Reading,
    TokenOrder,
    from_nnssl,
    from_nnunet,
    ours,
    report_unused,
    require_plan,
)
from mfm_nnunet.interchange.hub import fetch
from mfm_nnunet.interchange.natural import ENDING, bare_weights, from_timm, read_tensors, settle_licence, timm_config
from mfm_nnunet.interchange.nnssl_export import write_nnssl
from mfm_nnunet.interchange.verify import require_complete
from mfm_nnunet.models.families import family_of

logger = logging.getLogger(__name__)

FILE = "checkpoint_final.pth"
"""File to look for in folders of other programs."""
SIDE_PLAN = "adaptation_plan.json"
WEIGHTS_BY_OTHERS = ("model_state_dict", "model")
"""Keys of the weights in files of PyMIC (MIS-FM) and VISION-MAE, beside ``network_weights`` of nnU-Net and nnssl."""
KNOWN = (
    "mfm_nnunet (network_weights and mfm; or a folder with model.safetensors and config.json), nnssl and OpenMind "
    "(network_weights, nnssl_adaptation_plan), nnU-Net (network_weights, init_args), network_weights alone, "
    "PyMIC and MIS-FM (model_state_dict), VISION-MAE (model), timm (tensors alone)"
)


def find_checkpoint(address: str | Path) -> Path:
    """Find the file, or folder of safetensors, at an address, e.g. a path or ``hf://owner/name@commit``.

    Raises MFMError (E_NOT_FOUND) if there is none, and those of :func:`mfm_nnunet.interchange.hub.fetch`.
    """
    place = fetch(address)
    if place.name == WEIGHTS and place.is_file() and is_folder_checkpoint(place.parent):
        place = place.parent
    if not place.is_dir() or is_folder_checkpoint(place):
        return place
    if (place / WEIGHTS).is_file() and timm_config(place):
        return place / WEIGHTS
    if (place / FILE).is_file():
        return place / FILE
    if (place / WEIGHTS).is_file():
        raise MFMError(
            "E_NOT_FOUND",
            f"{place / WEIGHTS}: there is no {CONFIG} of mfm_nnunet beside it, so the network is unknown. Export the "
            "checkpoint again (mfm_checkpoint export), or give a .pth file.",
        )
    below = sorted(place.glob(f"fold_*/{FILE}"))
    advice = f" Give one of its folders, e.g. {below[0].parent}." if below else ""
    raise MFMError(
        "E_NOT_FOUND",
        f"{place}: no checkpoint in this folder (neither {WEIGHTS} with {CONFIG}, nor {FILE}).{advice}",
    )


def read_checkpoint(place: Path, token_order: TokenOrder | None = None) -> Reading:
    """Read the checkpoint at ``place`` into our layout, logging assumptions and repairs.

    ``token_order`` is for Primus weights of other programs whose file does not specify it.

    Raises MFMError: those of :func:`mfm_nnunet.checkpoint.load`, E_MODEL_CORRUPT for an unknown layout or an invalid
    entry, E_MODEL_MISMATCH for a newer format, an unsupported network or Primus weights with unknown token order,
    E_MODEL_UNSAFE if a plan names anything but networks and layers.
    """
    if place.is_dir():
        content = read_folder(place)
        with about(place / CONFIG):
            reading = ours(content)
    elif place.suffix == ENDING:
        reading = from_timm(read_tensors(place), place.parent)
    else:
        raw = checkpoint.load(place)
        with about(place):
            reading = _recognised(raw, place, token_order)
    file = place / WEIGHTS if place.is_dir() else place
    reading = dataclasses.replace(reading, file=file, place=place)
    if reading.layout == "mfm_nnunet":
        report_unused(token_order)
    if not reading.mfm.get("licence") and (licence := stated_licence(place if place.is_dir() else place.parent)):
        reading.mfm["licence"] = licence
    for note in reading.notes:
        logger.info("%s: %s", place.name, note)
    return reading


def read_initial(place: Path, network: nn.Module, accepted_licence: str | None) -> Reading:
    """Read the weights that ``network`` starts from, as :func:`read_checkpoint`, and settle their licence.

    Raises MFMError (E_CONFIG) if the licence must be accepted by its name and is not.
    """
    reading = read_checkpoint(place)
    settle_licence(reading, family_of(network), network, accepted_licence)
    return reading


def sha256(place: Path) -> str:
    """Return the SHA-256 of the weights file, in hex."""
    return files.sha256(place / WEIGHTS if place.is_dir() else place)


def convert(
    place: Path,
    output: Path,
    layout: str,
    licence: str | None = None,
    token_order: TokenOrder | None = None,
    pictures: bool = False,
) -> None:
    """Convert the checkpoint at ``place`` to ``pth``, ``folder`` or ``nnssl``. It must be complete.

    A folder gets the curve of pretraining, and with ``pictures`` also crops of its scans, if they are beside it.
    For foreign checkpoints the origin (address, file name, SHA-256) and the assumptions and repairs are stored.

    Raises MFMError: those of :func:`read_checkpoint`, E_EXISTS if the output exists, E_CONFIG if ``licence`` differs
    from the checkpoint's or ``layout`` cannot express the network, E_DISK_FULL.
    """
    if output.exists() and (layout == "pth" or not output.is_dir() or any(output.iterdir())):
        raise MFMError("E_EXISTS", f"{output}: this already exists. Choose another name.")
    reading = read_checkpoint(place, token_order)
    require_plan(reading, *DESCRIBED)
    content = {"network_weights": reading.content["network_weights"], "mfm": {**reading.mfm}}
    if reading.layout != "mfm_nnunet":
        known: dict[str, Any] = {key: reading.origin[key] for key in ("address", "sha256") if key in reading.origin}
        origin = {**known, "file": reading.origin["name"], "notes": list(reading.notes)}
        content["mfm"]["source"] = {**reading.mfm["source"], **origin}
    if licence is not None:
        _require_same_licence(reading.mfm.get("licence"), licence)
        content["mfm"]["licence"] = licence
    require_complete(content)
    beside = place if place.is_dir() else place.parent
    if layout == "folder":
        write_hub_folder(content, output, read_pictures(beside, pictures))
    elif layout == "nnssl":
        write_nnssl(content, output, read_pictures(beside, pictures))
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(content, output)


def _require_same_licence(known: str | None, given: str) -> None:
    """Refuse a change of licence, so that conversion cannot drop a share-alike licence."""
    if known and known != UNKNOWN_LICENCE and known.casefold() != given.casefold():
        raise MFMError(
            "E_CONFIG",
            f"its licence is {known}, and --licence {given} would replace it. Leave --licence out: converted weights "
            "keep their licence. If it is wrong, correct the model card beside the original.",
        )


def _recognised(raw: Mapping[str, Any], place: Path, token_order: TokenOrder | None) -> Reading:
    if name := next((name for name in WEIGHTS_BY_OTHERS if isinstance(raw.get(name), dict)), None):
        raw = {"network_weights": raw[name], **raw}
    if (bare := bare_weights(raw)) is not None:
        return from_timm(bare, place.parent)
    if not isinstance(raw.get("network_weights"), dict):
        keys = ", ".join(map(str, list(raw)[:5])) or "nothing"
        raise MFMError(
            "E_MODEL_CORRUPT",
            f"unknown checkpoint layout: there is no 'network_weights', only {keys}. Known layouts: {KNOWN}.",
        )
    mfm, init_args = raw.get("mfm"), raw.get("init_args")
    if isinstance(mfm, dict) and mfm.get("kind") == "pretrained":
        return ours(raw)
    if raw.get(nnssl.KEY) is None and isinstance(init_args, Mapping) and isinstance(init_args.get("plans"), Mapping):
        return from_nnunet(raw, token_order)
    if isinstance(mfm, dict):
        raise MFMError("E_MODEL_MISMATCH", "this file of mfm_nnunet lacks the plan of its network. Copy it again.")
    return from_nnssl(_with_side_plan(raw, place), token_order)


def _with_side_plan(raw: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """Complete a file without plan or trainer from ``adaptation_plan.json``.

    Hub repositories have it beside the file. nnssl's trainers write it to the run folder, one level above the
    checkpoints in ``fold_all``.
    """
    folder = place.absolute().parent
    folders = [folder, folder.parent] if folder.name.startswith("fold_") else [folder]
    side = next((parent / SIDE_PLAN for parent in folders if (parent / SIDE_PLAN).is_file()), None)
    lacking = [key for key in (nnssl.KEY, "trainer_name") if raw.get(key) is None]
    if not lacking or side is None:
        return dict(raw)
    plan = read_json(side, "Copy it again, or move it away.", "E_MODEL_CORRUPT")
    told = {nnssl.KEY: plan, "trainer_name": plan.get("trainer_name")}
    return {**raw, **{key: told[key] for key in lacking}}
