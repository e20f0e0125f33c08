"""The public functions stay what they are whatever was imported before."""

from __future__ import annotations

import importlib
import inspect

import mfm_nnunet


def test_a_folder_hides_no_function_of_its_name() -> None:
    importlib.import_module("mfm_nnunet.predict.model")
    names = [name for name in mfm_nnunet.__all__ if name != "__version__"]
    assert all(inspect.isfunction(getattr(mfm_nnunet, name)) for name in names)
