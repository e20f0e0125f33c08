"""Old name of :mod:`mfm_nnunet.processes`."""

from mfm_nnunet.processes import SECONDS_TO_SAVE, call_recorded, no_child_left, raise_recorded, run_processes

__all__ = ["SECONDS_TO_SAVE", "call_recorded", "no_child_left", "raise_recorded", "run_processes"]
