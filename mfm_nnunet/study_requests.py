"""Requests of the study and the demo, which run other jobs. See :mod:`mfm_nnunet.fields`."""

# ruff: noqa: RUF009 (option makes a dataclass field)
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from mfm_nnunet.fields import Request, assignments, at_least_one, flag, option
from mfm_nnunet.requests import DEVICE, DEVICES, LICENCE, ConfigurationRequest


@dataclass(frozen=True)
class StudyRequest(ConfigurationRequest):
    """Train every arm with every number of labels and seed, and test all on one fixed split."""

    _: KW_ONLY
    labels: Sequence[str | int] = field(
        metadata=flag(
            "--labels",
            "numbers of labelled subjects, or shares of all but the test subjects, e.g. 5 10 20 100%",
            nargs="+",
            metavar="N",
            required=False,
        )
    )
    arms: Sequence[str] = field(
        metadata=flag(
            "--arms",
            "what to compare: scratch, CHECKPOINT or NAME=CHECKPOINT, each with settings: scratch,finetune.mix=cutmix",
            nargs="+",
            metavar="ARM",
            required=False,
        )
    )
    seeds: int = option(
        3,
        "--seeds",
        "trainings per arm and number of labels, each with its own subset",
        metavar="N",
        check=at_least_one,
    )
    test: str | int = option(
        "20%",
        "--test",
        "test subjects: a share, a number, or a file of case names, one per line",
        metavar="SHARE|N|FILE",
    )
    subjects: str | Path | None = option(
        None,
        "--subjects",
        "CSV with the columns case and subject (default: sub-XX in the name, else every case is a subject)",
        metavar="CSV",
    )
    order: str | Path | None = option(
        None,
        "--order",
        "file of subjects, one per line: the first seed labels them in this order (default: drawn, as for other seeds)",
        metavar="FILE",
    )
    unlabelled: str | int | None = option(
        None,
        "--unlabelled",
        "corpus for the arms with semi.method; the dataset itself: its cases that a subset leaves without label",
        metavar="CORPUS",
    )
    plans_name: str | None = option(
        None,
        "-p --plans",
        "plan that all arms share (default: a new one that fits the first checkpoint)",
        metavar="PLANS",
    )
    accept_licence: str | None = option(None, *LICENCE, metavar="NAME")
    settings: Sequence[str] | Mapping[str, Any] = assignments(
        "finetune.epochs=200 finetune.learning_rate=1e-3", "finetune"
    )
    tolerance_mm: float = option(
        1.0,
        "--tolerance-mm",
        "tolerance of the normalised surface distance in mm (in pixels for PNG and similar pictures)",
        metavar="MM",
        check=float,
    )
    mirroring: bool = option(True, "--disable_tta --disable-tta", "predict without mirroring: up to eight times faster")
    jobs: int | None = option(
        None,
        "--jobs",
        "trainings at a time (default: one per GPU, or one per CPU core without a GPU)",
        metavar="N",
        check=at_least_one,
    )
    device: str = option("auto", *DEVICE, choices=DEVICES)
    output: str | Path | None = option(
        None, "-o --output", "the study folder (default: mfm_study in the workspace)", metavar="DIR"
    )


@dataclass(frozen=True)
class DemoRequest(Request):
    """Plan, pretrain, fine-tune and predict real images in minutes."""

    _: KW_ONLY
    data: str | Path | None = option(
        None, "--data", "a labelled dataset in nnU-Net's raw format (2D or 3D); read in place", metavar="DIR"
    )
    overwrite: bool = option(
        False, "--overwrite", "remove the files of an earlier demo in the workspace and start again"
    )
    settings: Sequence[str] | Mapping[str, Any] = assignments(
        "pretrain.epochs=10 finetune.epochs=10", "pretrain", "finetune"
    )
    device: str = option("auto", *DEVICE, choices=DEVICES)
