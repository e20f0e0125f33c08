"""Report on a registered corpus: read its fingerprint and an example of each modality, and write both files."""

from __future__ import annotations

import contextlib
import logging

import numpy as np

from mfm_nnunet.data import corpus
from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.slices import as_in_corpus, reader_of
from mfm_nnunet.errors import CaseFailure, MFMError
from mfm_nnunet.files import read_json
from mfm_nnunet.images.reading import read_image
from mfm_nnunet.modalities import kind_of
from mfm_nnunet.reports import corpus as reports
from mfm_nnunet.workspace import Workspace

logger = logging.getLogger(__name__)


def report_corpus(here: Workspace, dataset_name: str, cases: list[Case], failures: list[CaseFailure]) -> None:
    """Describe a corpus in ``corpus_report.json`` and ``corpus_report.png``, with an example of each modality."""
    folder = here.preprocessed / dataset_name
    file = folder / "corpus_report.json"
    measured = folder / "dataset_fingerprint.json"
    if file.is_file() and file.with_suffix(".png").is_file() and file.stat().st_mtime >= measured.stat().st_mtime:
        return
    fingerprint, settings = read_json(measured, "Plan the corpus again."), corpus.read_settings(here.raw / dataset_name)
    kinds = {case.name: kind_of(case.modality) for case in cases}
    content = reports.describe_corpus(fingerprint, kinds, failures, file)
    examples: dict[str, np.ndarray] = {}
    for case in cases:
        kind = kinds[case.name] or reports.UNNAMED
        if kind not in examples:
            with contextlib.suppress(MFMError):  # a file that vanished meanwhile is reported by preprocessing
                reader = reader_of(case, fingerprint["mfm"]["reader"], settings)
                image_CDHW, _ = as_in_corpus(*read_image(case.images, reader), case, settings)
                examples[kind] = image_CDHW[0, image_CDHW.shape[1] // 2]
    reports.draw_corpus(content, dict(sorted(examples.items())), file.with_suffix(".png"))
    logger.info("%s\n%s\nreport: %s", dataset_name, "\n".join(reports.summarise_corpus(content)), file)
