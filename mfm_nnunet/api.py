"""Earlier names of the jobs; new code uses the package itself, e.g. ``mfm_nnunet.train``."""

from mfm_nnunet.jobs.checkpoint import convert_checkpoint, describe_checkpoint
from mfm_nnunet.jobs.plan import plan_and_preprocess
from mfm_nnunet.jobs.predict import predict
from mfm_nnunet.jobs.pretrain import pretrain
from mfm_nnunet.jobs.train import train

__all__ = ["convert_checkpoint", "describe_checkpoint", "plan_and_preprocess", "predict", "pretrain", "train"]
