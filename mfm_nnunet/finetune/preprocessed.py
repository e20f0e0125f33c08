"""What training needs from a preprocessed dataset, checked before it starts, and what of it may leave the house."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mfm_nnunet.checkpoint import atomic_write
from mfm_nnunet.data.corpus import Selection, select
from mfm_nnunet.data.storage import require_whole, stored_cases
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import read_json


def shareable(dataset_json: Mapping[str, Any]) -> dict[str, Any]:
    """dataset.json without case names and file paths."""
    return DatasetJson.of(dataset_json).shared()


def select_cases(raw: Path | None, preprocessed_folder: Path, data: Path) -> Selection:
    """Choose the labelled cases that the dataset has now in a folder ``data`` (blosc2, or nnU-Net's older npz).

    ``raw`` and ``preprocessed_folder`` are the dataset's. Raises MFMError: E_CONFIG when files of a case are missing,
    E_SHORT_DATA when one is damaged, and as :func:`mfm_nnunet.data.corpus.select`.
    """
    images = stored_cases(data)
    selection = select(raw, preprocessed_folder, images or {file.stem for file in data.glob("*.npz")})
    used = images & set(selection.names)
    needed = ("_seg.b2nd", ".pkl")
    unusable = sorted(case for case in used if not all((data / (case + ending)).is_file() for ending in needed))
    if unusable:
        raise MFMError(
            "E_CONFIG",
            f"{data}: {len(unusable)} of {len(used)} preprocessed cases have no label or are not whole, e.g. "
            f"{', '.join(unusable[:5])}. A corpus without labels can only be pretrained on (mfm_pretrain); for a "
            "labelled dataset run mfm_plan_and_preprocess again, which makes what is missing.",
        )
    require_whole(data, used)
    return selection


def require_fingerprint(preprocessed_folder: Path) -> None:
    """Raise MFMError (E_NOT_FOUND, E_FORMAT) without a whole fingerprint; nnU-Net copies it into the model folder."""
    advice = "It belongs into the model folder. Make it again with: mfm_plan_and_preprocess -d "
    read_json(preprocessed_folder / "dataset_fingerprint.json", advice + preprocessed_folder.name)


def forget_cases(fingerprint_file: Path) -> None:
    """Drop our own part of a copied fingerprint: it names cases, and model folders are shared."""
    fingerprint = read_json(fingerprint_file, "Run mfm_plan_and_preprocess again, and train again.")
    if fingerprint.pop("mfm", None) is not None:
        with atomic_write(fingerprint_file) as handle:
            handle.write(json.dumps(fingerprint, indent=1).encode())
