"""Published pretrained weights by name: where they are, what identifies them, their licence, paper and memory need.

``sha256`` and ``commit`` are given where they are publicly known (decision 57). Other entries are pinned at the first
download: see :func:`mfm_nnunet.interchange.hub.fetch`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mfm_nnunet.errors import MFMError, nearest

OPENMIND = ("cc-by-4.0", "arXiv:2412.17041")
"""Licence and paper of OpenMind's weights."""


@dataclass(frozen=True)
class Published:
    """Weights in a repository of the hub."""

    name: str
    repository: str
    about: str
    licence: str
    paper: str
    memory_gb: int
    """Estimate for fine-tuning at the recommended patch: batch of 2, one channel, mixed precision."""
    sha256: str | None = None
    """SHA-256 of the weights file."""
    commit: str | None = None

    @property
    def pinned_by(self) -> str:
        """Say what identifies the weights."""
        known = {"commit": self.commit, "SHA-256": self.sha256}
        return ", ".join(name for name, value in known.items() if value) or "first download"


def _openmind() -> Iterator[Published]:
    known = {
        "resencl-mae": "7a847af785635335c00e711d16ff4d225d86ecd5992b14c059df2b520e3ee933",
        "primusm-mae": "b866ac5f61d7e90d3a6cbb00a759ffc9d73beb5e63baa6b3cd654671ebc9a552",
    }
    networks = {
        "ResEncL": ("MAE", "S3D", "VF", "MG", "SimCLR", "VoCo", "SwinUNETR"),
        "PrimusM": ("MAE", "SimMIM", "MG"),
    }
    for network, tasks in networks.items():
        for task in tasks:
            name = f"{network}-{task}".lower()
            owner = "MIC-DKFZ" if name in (*known, "resencl-voco") else "AnonRes"
            about = f"{task}, {network}, patch 160, brain MR"
            memory_gb = 12 if network == "ResEncL" else 14
            repository = f"{owner}/{network}-OpenMind-{task}"
            yield Published(f"openmind-{name}", repository, about, *OPENMIND, memory_gb, known.get(name))


PUBLISHED = {
    entry.name: entry
    for entry in (
        *_openmind(),
        Published(
            "nnfoundation-cnn",
            "MIC-DKFZ/nnFoundationCNN",
            "MAE, ResEncL, patch 192, CT MR PET",
            "cc-by-sa-4.0",
            "arXiv:2609.26924",
            19,
            "ac262d3e8c226c79f9567fddc34d38e011284730ddf2294b5c6c319ce2f22bbd",
            "8edba046f01d09771b8204b9d3e7a6c06d6e1adc",
        ),
    )
}


def published_weights() -> list[dict[str, str]]:
    """Return the table for people, a dict per row."""
    return [
        {
            "name": entry.name,
            "weights": entry.about,
            "licence": entry.licence,
            "GB": str(entry.memory_gb),
            "paper": entry.paper,
            "pinned by": entry.pinned_by,
            "repository": entry.repository,
        }
        for entry in PUBLISHED.values()
    ]


def find_published(name: str) -> Published:
    """Return the entry of a name. Raises MFMError (E_NOT_FOUND) with the nearest name."""
    if name not in PUBLISHED:
        raise MFMError(
            "E_NOT_FOUND",
            f"{name}: neither a file nor the name of published weights. {nearest(name, PUBLISHED)} "
            "See: mfm_checkpoint list.",
        )
    return PUBLISHED[name]
