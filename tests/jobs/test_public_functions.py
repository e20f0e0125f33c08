"""The public functions: found on the package, whatever was imported before."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import mfm_nnunet
from mfm_nnunet.requests import PretrainRequest
from mfm_nnunet.settings import MFMBlock, override


def test_no_folder_has_the_name_of_a_public_function() -> None:
    """The import of a subpackage of that name would replace the function."""
    assert not [name for name in mfm_nnunet.__all__ if (Path(mfm_nnunet.__file__).parent / name).exists()]


def test_public_functions_are_functions() -> None:
    others = {"__version__", "MFMError"}
    assert all(inspect.isfunction(getattr(mfm_nnunet, name)) for name in mfm_nnunet.__all__ if name not in others)
    assert dir(mfm_nnunet) == sorted(mfm_nnunet.__all__)


@pytest.mark.parametrize(
    "settings",
    [
        {"pretrain": {"epochs": 3, "balance_by": ["subject", "modality"]}, "num_workers": None},
        {"pretrain.epochs": 3, "pretrain.balance_by": ("subject", "modality"), "num_workers": None},
        ["pretrain.epochs=3", "pretrain.balance_by=subject,modality", "num_workers=none"],
    ],
)
def test_settings_are_words_or_tables(settings: Any) -> None:
    block = override(MFMBlock(), PretrainRequest(701, "2d", settings=settings).settings)
    assert (block.pretrain.epochs, block.pretrain.balance_by, block.num_workers) == (3, ("subject", "modality"), None)
