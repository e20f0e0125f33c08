"""Requests: the arguments of each job. See :mod:`mfm_nnunet.fields`."""

# ruff: noqa: RUF009 (option makes a dataclass field)
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mfm_nnunet.errors import MFMError
from mfm_nnunet.fields import (
    PartRequest,
    Request,
    assignments,
    at_least_one,
    each,
    flag,
    matching,
    number_between,
    one_of,
    option,
    to_file_name,
    to_fold,
    to_spacing,
)
from mfm_nnunet.settings import SliceSettings, override, to_dict

CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")
"""All configurations of nnU-Net; those of a dataset are known only after reading its images."""
DEVICES = ("auto", "cpu", "cuda", "mps")
HEADS = ("linear", "attentive", "mil", "probe")
"""Heads of classifiers."""

# Flags of several commands: their spellings and help
SERIES = "--series", "of DICOM images take these series: all, modalities such as CT, or names"
KEY_FILE = (
    "--dicom-key",
    "write a CSV from the names of DICOM series to their UIDs and folders, which identify patients",
)
DEVICE = "-device --device", "auto (default) uses a GPU if there is one; choose it with CUDA_VISIBLE_DEVICES"
DATASET = "-d --dataset", "name or number of the dataset"
CONFIGURATION = "-c --configuration", "configuration, e.g. 3d_fullres or 2d"
DRY_RUN = "--dry-run", "print what would be done and what it costs, and write nothing"
PLANS = (
    "-p --plans",
    "name of the plan (default: the one made like the given checkpoint, else the only one, else mfmPlans)",
)
TRAINER = "-tr --trainer", "trainer class"
UNLABELLED = "--unlabelled", "also learn from images of this corpus or dataset, without labels; --set semi.method=NAME"
TEACHERS = "--teachers", "semi.method=student: models, each fold of which is a teacher (default: they are trained)"
PSEUDO_LABELS = "--pseudo-labels", "semi.method=student: a folder of pseudo labels, or of corrected masks alone"
WEIGHTS = "-pretrained_weights --pretrained-weights", "start from these weights (default: from scratch)"
WORD = matching(r"[A-Za-z0-9][A-Za-z0-9 _-]*", "expected a word like CT, MR, PET, Xray or US")
LICENCE = "--accept-licence", "accept a licence that restricts the use of weights, by its name, e.g. cc-by-nc-4.0"


def _slices(value: Any) -> dict[str, Any]:
    words = [f"{key}={word}" for key, word in value.items()] if isinstance(value, Mapping) else value
    try:
        return to_dict(override(SliceSettings(), words))
    except MFMError as error:
        raise ValueError(error.message.removeprefix("--set ")) from None


@dataclass(frozen=True)
class PlanRequest(PartRequest):
    """Plan and preprocess datasets; what is not given is derived from the data."""

    datasets: Sequence[str | int] = field(
        metadata=flag("-d --dataset", "numbers or names of datasets", nargs="+", metavar="ID")
    )
    _: KW_ONLY
    images: str | Path | None = option(
        None,
        "--images",
        "register images as dataset ID, without labels unless --labels is given: a folder tree of NIfTI, NRRD, MHA, "
        "PNG or DICOM files, a zip archive of DICOM, a BIDS dataset or a folder of several, a CSV (columns image or "
        "image_0, image_1 ...; optional case, label, subject, modality, dataset, anonymisation_mask), nnssl's "
        "pretrain_data.json, or an nnU-Net raw folder without labels",
        metavar="SOURCE",
    )
    labels: str | Path | None = option(
        None,
        "--labels",
        "folder of masks with the names of the images in --images (_0000, _seg, _label, _mask do not count)",
        metavar="FOLDER",
    )
    label_names: Sequence[str] | None = option(
        None,
        "--label-names",
        "names of the values in the masks, e.g. 1=liver 2=tumour (default: label_1, label_2 ...)",
        nargs="+",
        metavar="VALUE=NAME",
        check=each(matching(r"[0-9]{1,5}=[^=]*[^=\s][^=]*", "expected value=name, e.g. 1=liver")),
    )
    series: Sequence[str] | None = option(None, *SERIES, nargs="+", metavar="SERIES")
    key_file: str | Path | None = option(None, *KEY_FILE, metavar="FILE")
    name: str | None = option(
        None, "--name", "name of the dataset that --images registers (default: Corpus, with labels Labelled)"
    )
    modality: str | None = option(
        None,
        "--modality",
        "modality of scans whose source names none, or of a labelled dataset: CT, MR, PET, Xray, US ...",
        metavar="WORD",
        check=WORD,
    )
    pet: Literal["suv", "percentile"] | None = option(
        None,
        "--pet",
        "normalisation of PET: one window of uptake values for all (suv), or percentiles of each image (default: by "
        "the values of the images)",
        choices=("suv", "percentile"),
    )
    slices: Sequence[str] | Mapping[str, Any] | None = option(
        None,
        "--slices",
        "plan slices of volumes, and pictures, in 2D; settings: axis=0 every=1 foreground=0",
        nargs="*",
        metavar="NAME=VALUE",
        check=_slices,
    )
    colour: Literal["grey", "rgb"] | None = option(
        None,
        "--colour",
        "one channel (grey: colours become luminance) or three (rgb: grey is repeated)",
        choices=("grey", "rgb"),
    )
    universal: Sequence[str | int] | None = option(
        None,
        "--universal",
        "make dataset ID of these labelled datasets, for one model of all their classes; nothing is copied but labels",
        nargs="+",
        metavar="DATASET",
    )
    add_to: str | Path | None = option(
        None,
        "--add-to",
        "with --universal: extend this model by further datasets. Its classes keep their numbers; those whose dataset "
        "is not listed are learned from the model's own predictions",
        metavar="MODEL_FOLDER",
    )
    configurations: Sequence[str] | None = option(
        None,
        "-c --configuration",
        "configurations to preprocess (default: all that are planned; for a corpus 3d_fullres, or 2d for 2D images)",
        nargs="+",
        metavar="CONFIG",
        check=each(one_of(*CONFIGURATIONS)),
    )
    network: str = option(
        "resenc",
        "--network",
        "residual encoder U-Net (default), Primus transformer (V2, V3: convolutional stem), Swin U-Net, PCT-Net "
        "(convolutions and window attention in parallel), timm:NAME (an encoder for natural images, such as DINOv2), "
        "or your own",
    )
    memory_gb: float | None = option(
        None,
        "--memory-gb -gpu_memory_target",
        "memory for training (default: the GPU's, or a small preset for the CPU)",
        metavar="G",
        check=number_between(0, 1e6, "of GB above 0 and at most 1000000"),
    )
    spacing: Literal["median", "onemm", "original"] | tuple[float, float, float] = option(
        "median",
        "--spacing",
        "median (default), onemm, original, or three lengths in mm, slices first as in nnU-Net (Z Y X)",
        nargs="+",
        metavar="S",
        check=to_spacing,
    )
    like: str | Path | None = option(
        None,
        "--like",
        "use network, spacing, normalisation and axis order of a pretrained checkpoint",
        metavar="CHECKPOINT",
    )
    plans_name: str | None = option(
        None,
        "-pl --plans-name",
        "name of the plan (default: mfmPlans, mfmPrimusPlans, mfmPrimusV2Plans ..., or after the checkpoint)",
        metavar="NAME",
        check=matching(r"mfm[A-Za-z0-9_-]*", "start with 'mfm', e.g. mfmPlans; then letters, digits, _ or -"),
    )
    num_processes: int | None = option(
        None, "-np --num-processes", "number of processes (default: the CPU cores)", metavar="N", check=at_least_one
    )
    preprocess: bool = option(True, "--no_pp --no-preprocessing", "plan only")
    dry_run: bool = option(False, *DRY_RUN)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_parts > 1 and (not self.preprocess or self.images or self.universal or self.like):
            text = (
                "-num_parts: parts only preprocess what was planned before. Plan once, with --no_pp and without parts."
            )
            raise MFMError("E_CONFIG", text)
        if self.images is not None and len(self.datasets) != 1:
            raise MFMError("E_CONFIG", "--images registers one dataset: give exactly one -d ID with it.")
        for name in ("name", "slices", "colour", "labels", "label_names", "series", "key_file"):
            is_new = self.images is not None or (name == "name" and self.universal is not None)
            if not is_new and getattr(self, name) is not None:
                flag_name = {"key_file": "dicom-key"}.get(name, name.replace("_", "-"))
                raise MFMError("E_CONFIG", f"--{flag_name} belongs to --images: it is of a new dataset.")
        for name in ("slices", "colour"):
            if self.labels is not None and getattr(self, name) is not None:
                raise MFMError("E_CONFIG", f"--{name} is of corpora without labels. Leave it or --labels out.")
        self._check_union()
        for name, is_given in (("spacing", self.spacing != "median"), ("pet", self.pet is not None)):
            if self.like is not None and is_given:
                raise MFMError("E_CONFIG", f"--{name} and --like: the checkpoint decides that. Leave --{name} out.")

    def _check_union(self) -> None:
        if self.add_to is not None and (self.universal is None or self.like is not None):
            raise MFMError("E_CONFIG", "--add-to belongs to --universal, and takes the place of --like.")
        if self.universal is not None and len(self.datasets) != 1:
            raise MFMError("E_CONFIG", "--universal makes one dataset: give exactly one -d ID with it.")
        if self.universal is not None and (self.images is not None or self.modality is not None):
            raise MFMError("E_CONFIG", "--universal is for labelled datasets: leave --images and --modality out.")


@dataclass(frozen=True)
class ConfigurationRequest(Request):
    """Base of the requests that train one configuration of a dataset."""

    dataset: str | int = field(metadata=flag(*DATASET, metavar="DATASET", position=True))
    configuration: str = field(metadata=flag(*CONFIGURATION, metavar="CONFIG", position=True))


@dataclass(frozen=True)
class RunRequest(ConfigurationRequest):
    """Base of the pretraining and training requests."""

    _: KW_ONLY
    plans_name: str | None = option(None, *PLANS, metavar="PLANS")
    recipe: str | Path | None = option(
        None,
        "--recipe",
        "settings of a run: the name of a shipped recipe, or a .json file; --set overrides them",
        metavar="NAME|FILE",
    )
    settings: Sequence[str] | Mapping[str, Any] = ()
    continue_training: bool = option(
        False, "--c", "resume a stopped or killed run with its own settings; more epochs also continue a finished one"
    )
    device: str = option("auto", *DEVICE, choices=DEVICES)
    num_gpus: int = option(1, "-num_gpus --num-gpus", "number of GPUs", metavar="N", check=at_least_one)
    pretrained_weights: str | Path | None = option(None, *WEIGHTS, metavar="CHECKPOINT")
    accept_licence: str | None = option(None, *LICENCE, metavar="NAME")
    dry_run: bool = option(False, *DRY_RUN)


@dataclass(frozen=True)
class PretrainRequest(RunRequest):
    """Pretrain the network of a plan without labels."""

    _: KW_ONLY
    pretext: str = option(
        "mae", "--pretext", "pretext task (default: mae); see --list, or the dotted name of your module", metavar="TASK"
    )
    run_name: str | None = option(
        None,
        "--run-name",
        "suffix of the run folder's name, for several runs of the same task and plan",
        metavar="NAME",
        check=matching(r"[A-Za-z0-9._+-]+", "expected a name of letters, digits, _ . + and -"),
    )
    probe: str | int | None = option(
        None,
        "--probe",
        "labelled dataset; every few epochs a linear probe on it logs a Dice (off by default)",
        metavar="DATASET",
    )
    settings: Sequence[str] | Mapping[str, Any] = assignments(
        "pretrain.epochs=300 pretrain.batch_size=4 seed=1", "pretrain"
    )


@dataclass(frozen=True)
class TrainRequest(RunRequest):
    """Train and validate one fold of a labelled dataset: masks, or labels of whole images."""

    fold: int | str = field(
        metadata=flag("-f --fold", "number of the fold, or all", metavar="FOLD", position=True, check=to_fold)
    )
    _: KW_ONLY
    trainer: str = option("MFMTrainer", *TRAINER, metavar="NAME")
    head: str | None = option(
        None,
        "--head",
        "for a dataset with labels.csv: linear (default), attentive, mil (volumes larger than the patch), or probe "
        "(frozen encoder and logistic regression: seconds)",
        metavar="HEAD",
        check=one_of(*HEADS),
    )
    unlabelled: str | int | None = option(None, *UNLABELLED, metavar="CORPUS")
    teachers: Sequence[str | Path] | None = option(None, *TEACHERS, nargs="+", metavar="MODEL_FOLDER")
    pseudo_labels: str | Path | None = option(None, *PSEUDO_LABELS, metavar="DIR")
    only_validate: bool = option(False, "--val", "only validate a finished run")
    save_probabilities: bool = option(False, "--npz", "save the probabilities of the validation")
    settings: Sequence[str] | Mapping[str, Any] = assignments(
        "finetune.epochs=200 semi.method=consistency seed=1", "finetune", "semi"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.continue_training and self.only_validate:
            raise MFMError("E_CONFIG", "--c continues a training, --val validates a finished one: give one of them.")
        if self.num_gpus > 1 and self.device not in ("auto", "cuda"):
            raise MFMError(
                "E_CONFIG", f"-num_gpus {self.num_gpus} takes the first GPUs that are seen, not -device {self.device}."
            )


@dataclass(frozen=True)
class PredictRequest(PartRequest):
    """Segment images with a trained model."""

    input_folder: Any = field(
        metadata=flag(
            "-i --input",
            "folder of images, named as for nnU-Net (case_0000.nii.gz, case_0001.nii.gz ...: one file per channel), "
            "one image, or a folder tree or zip archive of DICOM series",
            metavar="IN",
        )
    )
    output_folder: str | Path = option(  # None only for an image in memory
        None, "-o --output", "folder for the masks", metavar="OUT", required=True
    )
    _: KW_ONLY
    spacing: Sequence[float] | None = field(
        default=None, metadata={"help": "in Python, for an image as an array: lengths of its voxels in mm, by axis"}
    )
    model_folder: str | Path | None = option(
        None, "-m --model", "model folder, with fold_* in it; or give -d -c -f instead", metavar="MODEL_FOLDER"
    )
    dataset: str | int | None = option(None, *DATASET, metavar="DATASET")
    configuration: str | None = option(None, *CONFIGURATION, metavar="CONFIG")
    folds: Sequence[int | str] | None = option(
        None,
        "-f --folds",
        "folds whose predictions are averaged, or all (default: all trained folds)",
        nargs="+",
        metavar="FOLD",
        check=each(to_fold),
    )
    plans_name: str | None = option(None, *PLANS, metavar="PLANS")
    trainer: str = option("MFMTrainer", *TRAINER, metavar="NAME")
    checkpoint_name: str = option(
        "checkpoint_final.pth", "-chk --checkpoint", "checkpoint in the fold folders", metavar="FILE",
        check=to_file_name,
    )  # fmt: skip
    step_size: float = option(
        0.5, "-step_size --step-size", "step of the sliding window as a share of the patch", metavar="SHARE",
        check=number_between(0, 1, "above 0 and at most 1"),
    )  # fmt: skip
    mirroring: bool = option(
        True,
        "--disable_tta --disable-tta",
        "do not average over mirrored images: up to eight times faster, less accurate",
    )
    fast: bool = option(
        False, "--fast", "predict without mirroring, on a CPU also in bf16 if it computes in it: masks differ a little"
    )
    save_probabilities: bool = option(
        False, "--save_probabilities --save-probabilities", "also save the probabilities (.npz)"
    )
    series: Sequence[str] | None = option(None, *SERIES, nargs="+", metavar="SERIES")
    key_file: str | Path | None = option(None, *KEY_FILE, metavar="FILE")
    dicom_seg: bool = option(
        False,
        "--dicom-seg",
        "also write a DICOM segmentation for each DICOM series, which refers to its slices and names the patient",
    )
    overwrite: bool = option(False, "--overwrite", "replace existing masks in OUT")
    resume: bool = option(
        False,
        "--resume --continue_prediction --c",
        "keep masks in OUT that this model made from these images, and predict the rest",
    )
    previous_stage: str | Path | None = option(
        None, "-prev_stage_predictions --previous-stage", "masks of the previous stage, for a cascade", metavar="DIR"
    )
    references: str | Path | None = option(
        None, "--references", "folder of reference masks, to compare the masks with in the report", metavar="DIR"
    )
    report: bool = option(True, "--no-report", "do not write report.html beside the masks")
    classes: Sequence[str] | None = option(
        None,
        "--classes",
        "classes to predict (default: all); the rest is background, and takes no memory behind the network",
        nargs="+",
        metavar="NAME",
    )
    classes_of: str | int | None = option(
        None, "--classes-of", "of a model of several datasets: the classes that this dataset annotates, and its "
        "normalisation", metavar="DATASET",
    )  # fmt: skip
    modality: str | None = option(
        None, "--modality", "of a model that normalises by modality: that of these images", metavar="WORD", check=WORD
    )
    dry_run: bool = option(False, *DRY_RUN)
    device: str = option("auto", *DEVICE, choices=DEVICES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.input_folder, (str, Path)) == (self.output_folder is None):
            raise MFMError("E_CONFIG", "-o OUT is needed for a folder, and left out for an image in memory.")
        object.__setattr__(self, "mirroring", self.mirroring and not self.fast)
        names = (self.dataset, self.configuration)
        if self.model_folder is not None and names != (None, None):
            raise MFMError("E_CONFIG", "give the model as -m MODEL_FOLDER or as -d DATASET -c CONFIG, not both.")
        if self.model_folder is None and None in names:
            raise MFMError("E_CONFIG", "which model? Give -m MODEL_FOLDER, or -d DATASET -c CONFIG.")
        if self.overwrite and self.resume:
            raise MFMError("E_CONFIG", "--overwrite replaces the masks and --resume keeps them: give one of them.")
