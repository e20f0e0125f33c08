"""mfm_nnunet: nnU-Net with weights learned without labels.

The jobs as functions, imported when first used so that ``import mfm_nnunet`` stays fast: ``plan_and_preprocess``,
``pretrain``, ``train``, ``predict``, ``describe_checkpoint``, ``convert_checkpoint``. They raise exceptions and never
exit the process.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mfm_nnunet.version import __version__

if TYPE_CHECKING:
    from mfm_nnunet.api import (
        convert_checkpoint,
        describe_checkpoint,
        plan_and_preprocess,
        predict,
        pretrain,
        train,
    )

__all__ = [
    "__version__",
    "convert_checkpoint",
    "describe_checkpoint",
    "plan_and_preprocess",
    "predict",
    "pretrain",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from mfm_nnunet import api

        return getattr(api, name)
    raise AttributeError(f"module 'mfm_nnunet' has no attribute '{name}'")


class _Package(ModuleType):
    """Keep ``mfm_nnunet.predict`` the function also after the folder of that name was imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
