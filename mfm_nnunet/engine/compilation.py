"""torch.compile of a task's network, tried before the first step: it holds, or the run ends with a reason."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from mfm_nnunet.errors import MFMError, is_out_of_memory
from mfm_nnunet.tasks.base import PretextTask

logger = logging.getLogger(__name__)


def compile_network(task: PretextTask, loss: Callable[[], torch.Tensor]) -> None:
    """Compile the network's blocks and run ``loss``, a training pass of ``task``, through them, forward and backward.

    Raises MFMError (E_CONFIG) when the compiler is missing or cannot compile this network or task.
    """
    logger.info("compiling the network; this takes minutes")
    task.backbone.compile_blocks()
    task.train()
    try:
        loss().backward()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise MFMError(
            "E_CONFIG",
            f"pretrain.compile=true: torch.compile cannot compile this network here ({reason}). Install a C++ "
            "compiler (on GPUs also Triton), or leave the setting out.",
        ) from error
    task.zero_grad(set_to_none=True)
