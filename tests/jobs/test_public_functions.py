"""The public functions: found on the package, whatever was imported before."""

from __future__ import annotations

import inspect
from pathlib import Path

import mfm_nnunet


def test_no_folder_has_the_name_of_a_public_function() -> None:
    """The import of a subpackage of that name would replace the function."""
    assert not [name for name in mfm_nnunet.__all__ if (Path(mfm_nnunet.__file__).parent / name).exists()]


def test_public_functions_are_functions() -> None:
    assert all(inspect.isfunction(getattr(mfm_nnunet, name)) for name in mfm_nnunet.__all__ if name != "__version__")
