"""mfm_nnunet: nnU-Net with weights learned without labels.

The jobs are functions, imported on first use so that ``import mfm_nnunet`` is fast. They raise exceptions and never
exit the process.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from mfm_nnunet.version import __version__

if TYPE_CHECKING:
    from mfm_nnunet.errors import MFMError
    from mfm_nnunet.jobs.checkpoint import convert_checkpoint, describe_checkpoint
    from mfm_nnunet.jobs.doctor import doctor
    from mfm_nnunet.jobs.info import info
    from mfm_nnunet.jobs.plan import plan_and_preprocess
    from mfm_nnunet.jobs.predict import predict
    from mfm_nnunet.jobs.pretrain import pretrain
    from mfm_nnunet.jobs.rank import rank_unlabelled
    from mfm_nnunet.jobs.train import train
    from mfm_nnunet.settings import FinetuneSettings, PretrainSettings, SemiSettings
    from mfm_nnunet.study.run import run_study

__all__ = [
    "FinetuneSettings",
    "MFMError",
    "PretrainSettings",
    "SemiSettings",
    "__version__",
    "convert_checkpoint",
    "describe_checkpoint",
    "doctor",
    "info",
    "plan_and_preprocess",
    "predict",
    "pretrain",
    "rank_unlabelled",
    "run_study",
    "train",
]

_HOMES = {
    **dict.fromkeys(("FinetuneSettings", "PretrainSettings", "SemiSettings"), "settings"),
    "MFMError": "errors",
    "convert_checkpoint": "jobs.checkpoint",
    "describe_checkpoint": "jobs.checkpoint",
    "doctor": "jobs.doctor",
    "info": "jobs.info",
    "plan_and_preprocess": "jobs.plan",
    "predict": "jobs.predict",
    "pretrain": "jobs.pretrain",
    "rank_unlabelled": "jobs.rank",
    "run_study": "study.run",
    "train": "jobs.train",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        home = f"mfm_nnunet.{_HOMES[name]}"
        is_new = home not in sys.modules
        module = importlib.import_module(home)
        if is_new:
            _restore_backend()
        return getattr(module, name)
    raise AttributeError(f"module 'mfm_nnunet' has no attribute '{name}'")


def _restore_backend() -> None:
    """Undo nnU-Net's switch to a backend without a display, so that later figures of a notebook appear."""
    backend, matplotlib = os.environ.get("MPLBACKEND"), sys.modules.get("matplotlib")
    if backend and matplotlib and matplotlib.get_backend() != backend:
        matplotlib.rcParams["backend"] = backend  # first: a notebook's backend asks for it while it is loaded
        if pyplot := sys.modules.get("matplotlib.pyplot"):
            pyplot.switch_backend(backend)


def __dir__() -> list[str]:
    return __all__
