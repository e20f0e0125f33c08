"""Registry of built-in pretext tasks, for ``--list`` and the citations in checkpoints. Does not import torch.

A built-in task has a file in this folder and an entry here, both under its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mfm_nnunet.models.families import MEETING, Need

_WALD_2025 = (
    "Wald, T., Ulrich, C., Lukyanenko, S., Goncharov, A., Paderno, A., Miller, M., Maerkisch, L., Jaeger, P., & "
    "Maier-Hein, K. (2025). Revisiting MAE Pre-training for 3D Medical Image Segmentation. CVPR, 5186-5196."
)


@dataclass(frozen=True)
class TaskInfo:
    """Facts about a built-in pretext task."""

    name: str
    """Value of ``--pretext``."""
    hides: str
    """Short description of what is hidden, mixed or compared."""
    recipe: str
    """Batch and patch of the published recipe, e.g. "8 x 160x160x160"."""
    paper: str
    """"arXiv 2111.06377" or a DOI."""
    method: str
    """Name of the method in the literature."""
    apa_citations: tuple[str, ...]
    needs: Need = "any"

    @property
    def backbones(self) -> tuple[str, ...]:
        """Built-in network families that the task supports."""
        return MEETING[self.needs]

    @property
    def citations(self) -> list[dict[str, Any]]:
        """Citations in the format of checkpoints."""
        return [{"type": "Pretraining Method", "name": self.method, "apa_citations": list(self.apa_citations)}]


TASKS = {
    task.name: task
    for task in (
        TaskInfo(
            "mae",
            hides="75 % of the cells of a grid",
            recipe="8 x 160x160x160",
            paper="arXiv 2410.23132",
            method="MAE",
            apa_citations=(
                "He, K., Chen, X., Xie, S., Li, Y., Dollár, P., & Girshick, R. (2022). Masked Autoencoders Are "
                "Scalable Vision Learners. CVPR, 16000-16009.",
                _WALD_2025,
            ),
        ),
        TaskInfo(
            "models_genesis",
            hides="shuffled voxels, bent intensities, painted boxes",
            recipe="8 x 160x160x160",
            paper="arXiv 2004.07882",
            method="Models Genesis",
            apa_citations=(
                "Zhou, Z., Sodha, V., Rahman Siddiquee, M. M., Feng, R., Tajbakhsh, N., Gotway, M. B., & Liang, J. "
                "(2019). Models Genesis: Generic Autodidactic Models for 3D Medical Image Analysis. MICCAI, 384-393.",
                "Zhou, Z., Sodha, V., Pang, J., Gotway, M. B., & Liang, J. (2021). Models Genesis. Medical Image "
                "Analysis, 67, 101840.",
            ),
        ),
        TaskInfo(
            "simclr",
            hides="pairs of shifted crops are found among all others",
            recipe="32 x 192x192x64",
            paper="arXiv 2002.05709",
            method="SimCLR",
            apa_citations=(
                "Chen, T., Kornblith, S., Norouzi, M., & Hinton, G. (2020). A Simple Framework for Contrastive "
                "Learning of Visual Representations. ICML, 1597-1607.",
            ),
        ),
        TaskInfo(
            "simmim",
            hides="75 % of the tokens, replaced by a learned one",
            recipe="8 x 160x160x160",
            paper="arXiv 2111.09886",
            method="SimMIM",
            apa_citations=(
                "Xie, Z., Zhang, Z., Cao, Y., Lin, Y., Bao, J., Yao, Z., Dai, Q., & Hu, H. (2022). SimMIM: A Simple "
                "Framework for Masked Image Modeling. CVPR, 9653-9663.",
            ),
            needs="tokens",
        ),
        TaskInfo(
            "spark3d",
            hides="75 % of the cells of a grid, in every layer of the encoder",
            recipe="8 x 160x160x160",
            paper="arXiv 2410.23132",
            method="S3D",
            apa_citations=(
                "Tian, K., Jiang, Y., Diao, Q., Lin, C., Wang, L., & Yuan, Z. (2023). Designing BERT for Convolutional "
                "Networks: Sparse and Hierarchical Masked Modeling. ICLR.",
                _WALD_2025,
            ),
            needs="sparse encoder",
        ),
        TaskInfo(
            "swin_unetr",
            hides="boxes cut out or mixed in, rotation, views told apart",
            recipe="8 x 160x160x160",
            paper="arXiv 2111.14791",
            method="SwinUNETR",
            apa_citations=(
                "Tang, Y., Yang, D., Li, W., Roth, H. R., Landman, B., Xu, D., Nath, V., & Hatamizadeh, A. (2022). "
                "Self-Supervised Pre-Training of Swin Transformers for 3D Medical Image Analysis. CVPR, 20730-20740.",
            ),
        ),
        TaskInfo(
            "voco",
            hides="where a crop lies in the grid of base crops",
            recipe="8 x 256x256x64",
            paper="arXiv 2402.17300",
            method="VoCo",
            apa_citations=(
                "Wu, L., Zhuang, J., & Chen, H. (2024). VoCo: A Simple-yet-Effective Volume Contrastive Learning "
                "Framework for 3D Medical Image Analysis. CVPR, 22873-22882.",
            ),
        ),
        TaskInfo(
            "volume_fusion",
            hides="two crops are mixed in blocks of five strengths",
            recipe="2 x 64x128x128",
            paper="doi 10.1109/TIP.2025.3610249",
            method="Volume Fusion",
            apa_citations=(
                "Wang, G., Fu, J., Wu, J., Luo, X., Zhou, Y., Liu, X., Li, K., Lin, J., Shen, B., & Zhang, S. (2025). "
                "Volume Fusion-Based Self-Supervised Pretraining for 3D Medical Image Segmentation. IEEE Transactions "
                "on Image Processing, 34, 6041-6052. https://doi.org/10.1109/TIP.2025.3610249",
            ),
        ),
    )
}


def list_tasks() -> list[TaskInfo]:
    """Return the built-in pretext tasks in alphabetical order."""
    return list(TASKS.values())
