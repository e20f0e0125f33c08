"""Classification, multi-label classification and regression of whole images.

Legend: B batch, N views of a case, C channels, D H W voxels, K outputs, T targets of a case.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfm_nnunet.metrics import quick_score
from mfm_nnunet.models.classifier import Classifier
from mfm_nnunet.tasks.base import Task, TaskOutput


class ClassificationTask(Task):
    """Predict the label of a case from its views.

    ``kind`` is the dataset's task. ``weights`` (K) are those of the classes, or of the positives of each class.
    Unknown targets are NaN and count in no loss; numbers come with mean 0 and deviation 1.
    """

    name = "classification"
    trains_decoder = False
    weights: Tensor

    def __init__(self, classifier: Classifier, kind: str, weights: Tensor) -> None:
        super().__init__()
        self.classifier = classifier
        self.kind = kind
        self.register_buffer("weights", weights.float(), persistent=False)
        self.is_frozen = False
        """True while the encoder does not learn: its norms and drop path are then those of prediction."""

    @property
    def network(self) -> nn.Module:
        return self.classifier.backbone.network

    def train(self, mode: bool = True) -> ClassificationTask:
        super().train(mode)
        if self.is_frozen:
            self.classifier.backbone.eval()
        return self

    def forward(self, batch: dict[str, Any]) -> TaskOutput:
        """Compute the loss of a batch; in eval mode also return the outputs and targets of its single case."""
        logits_BK, target_BT = self.classifier(batch["data"]), batch["target"]
        loss = self.loss(logits_BK, target_BT)
        if self.training:
            return TaskOutput(loss)
        return TaskOutput(loss, {"logits": logits_BK[0].detach(), "target": target_BT[0]})

    def loss(self, logits_BK: Tensor, target_BT: Tensor) -> Tensor:
        """Return the mean loss over the known targets: weighted cross-entropy, or Huber for numbers."""
        known = target_BT.isfinite()
        target = target_BT.nan_to_num()
        if self.kind == "classification":
            index_B = target[:, 0].long()
            each = functional.cross_entropy(logits_BK, index_B, reduction="none")[:, None] * self.weights[index_B, None]
        elif self.kind == "multilabel":
            each = functional.binary_cross_entropy_with_logits(
                logits_BK, target, pos_weight=self.weights, reduction="none"
            )
        else:
            each = functional.smooth_l1_loss(logits_BK, target, reduction="none")
        return torch.where(known, each, 0).sum() / known.sum().clamp(min=1)

    def summarise(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the mean loss, and the AUROC (R2 of numbers) over all validation cases."""
        logits, target = values["logits"].double().numpy(), values["target"].double().numpy()
        name, score = quick_score(self.kind, target, logits)
        return {"loss": values["loss"].mean().item(), name: score}
