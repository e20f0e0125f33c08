from mfm_nnunet.finetune.trainer import MFMTrainer  # noqa: F401
