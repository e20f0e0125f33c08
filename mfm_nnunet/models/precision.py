"""Old name of parts of :mod:`mfm_nnunet.device`."""

from mfm_nnunet.device import finetuning_dtype, require_scaled_fp16, require_sound_bf16, warn_of_slow_bf16

__all__ = ["finetuning_dtype", "require_scaled_fp16", "require_sound_bf16", "warn_of_slow_bf16"]
