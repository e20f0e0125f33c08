"""Send the numbers of each epoch to TensorBoard or Weights & Biases, where the variable ``MFM_TRACKER`` names one."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mfm_nnunet.errors import MFMError, nearest

logger = logging.getLogger(__name__)

VARIABLE = "MFM_TRACKER"
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
Record = Callable[[int, Mapping[str, Any]], None]
"""Record the results of an epoch, by name; a list has a number per label."""


@contextlib.contextmanager
def open_tracker(folder: Path, first_epoch: int) -> Iterator[Record]:
    """Yield the function that records an epoch of the run in ``folder``; without a tracker it does nothing.

    A resumed run continues its curves at ``first_epoch``. A tracker that fails is left with a warning: it never costs a
    training. Raises MFMError (E_CONFIG), before any step, if the tracker is unknown or not installed.
    """
    module = _import()
    if module is None:
        yield lambda epoch, results: None
        return
    with contextlib.ExitStack() as stack:
        try:
            send = _open(module, folder, first_epoch, stack)
        except Exception as error:
            _warn(error)
            send = None

        def record(epoch: int, results: Mapping[str, Any]) -> None:
            nonlocal send
            if send is not None:
                try:
                    send(flatten(results), epoch)
                except Exception as error:
                    _warn(error)
                    send = None

        yield record


def flatten(results: Mapping[str, Any]) -> dict[str, float]:
    """Return a number per name; the numbers of a list are named ``name/0``, ``name/1`` ..."""
    found: dict[str, float] = {}
    for name, value in results.items():
        values = value if hasattr(value, "__len__") else [value]
        names = [f"{name}/{index}" for index in range(len(values))] if hasattr(value, "__len__") else [name]
        found |= dict(zip(names, map(float, values)))
    return found


def _import() -> Any:
    """Return the module of the tracker, or None."""
    name = os.environ.get(VARIABLE, "")
    if not name:
        return None
    if name not in MODULES:
        raise MFMError("E_CONFIG", f"{VARIABLE}={name}: there is no such tracker. {nearest(name, MODULES)}")
    try:
        return importlib.import_module(MODULES[name])
    except ImportError as error:
        reason = f"{VARIABLE}={name} needs a package that is missing ({error}): pip install {name}."
        raise MFMError("E_CONFIG", reason) from error


def _open(module: Any, folder: Path, first_epoch: int, stack: contextlib.ExitStack) -> Callable:
    if module.__name__ == "wandb":
        # The same name and id continue the same curves after a stop.
        name = "__".join(folder.parts[-3:])
        run = stack.enter_context(
            module.init(project="mfm_nnunet", id=name[-64:], name=name, dir=str(folder), resume="allow")
        )
        return lambda values, epoch: run.log(values, step=epoch)
    writer = stack.enter_context(module.SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch))

    def send(values: Mapping[str, float], epoch: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, epoch)
        writer.flush()

    return send


def _warn(error: Exception) -> None:
    logger.warning("%s=%s failed and is left out: %s", VARIABLE, os.environ[VARIABLE], error)
