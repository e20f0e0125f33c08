"""Old name of :mod:`mfm_nnunet.processes`, and the rule for batches that several processes share."""

from __future__ import annotations

from mfm_nnunet.errors import MFMError
from mfm_nnunet.processes import ALONE, World, any_true, join_world, leave_world, mean

__all__ = ["ALONE", "World", "any_true", "join_world", "leave_world", "mean", "require_divisible"]


def require_divisible(batch_size: int, accumulation: int, num_processes: int) -> None:
    """Raise MFMError (E_CONFIG) unless each part of a batch has equally many items, at least one, in each process."""
    if accumulation < 1 or batch_size < 1 or batch_size % (accumulation * num_processes):
        raise MFMError(
            "E_CONFIG",
            f"pretrain.batch_size={batch_size}: must be a multiple of pretrain.accumulation={accumulation} x the "
            f"{num_processes} process{'es' * (num_processes > 1)}, for parts of equal size. Change one of them.",
        )
