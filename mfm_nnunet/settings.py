"""Settings of a run: frozen dataclasses, read from and written as JSON, and changed by ``--set name=value``.

Each field defines its type, its legal range and its meaning. ``plans["mfm"]`` in a plans file is :class:`MFMBlock`. An
unknown name is an error that suggests the nearest legal one.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_type_hints

from mfm_nnunet.errors import MFMError, nearest
from mfm_nnunet.values import LARGEST, REMOVED, parse_value, ranged, require_in_range

FORMAT = 1
"""Version of the plan block and of the checkpoint's ``mfm`` key."""

logger = logging.getLogger(__name__)
NEUTRAL = {"pretrain.anatomy_fraction": 0.0, "pretrain.balance_temperature": None}
"""Removed settings in older plans and runs, with the value that had no effect."""

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of every training. Lengths of warm-up are in epochs; learning rates are peaks.

    Open values (None, auto) are resolved at the start of a run, printed and saved.
    """

    epochs: int = ranged(1000, 1, 10**6)
    iterations_per_epoch: int = ranged(250, 1, 10**6)
    validation_iterations: int = ranged(50, 1, 10**6)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with Nesterov momentum 0.99, or AdamW with betas (0.9, 0.98)."""
    weight_decay: float = ranged(3e-5, 0, 10)
    warmup_epochs: int | None = ranged(None, 0, 10**6)
    """Linear warm-up. None: 5 % of the epochs from 300 epochs on, else 10 %."""
    gradient_clip: float = ranged(12.0, 0, LARGEST, above=True)
    ema_decay: float | None = ranged(None, 0, 1, above=True, below=True)
    """Between 0 and 1: an exponential moving average of the weights is validated and shipped. None: the weights."""


@dataclass(frozen=True)
class PretrainSettings(TrainingSettings):
    """Settings of pretraining."""

    batch_size: int = ranged(2, 1, 2**16)
    """Items per step over all GPUs together."""
    learning_rate: float = ranged(1e-2, 0, 10, above=True)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on GPUs that have it, fp16 with loss scaling on others, fp32 on CPU."""
    augmentation: Literal["spatial", "mirror", "none"] = "spatial"
    """spatial: rotation, scaling and mirroring; mirror: mirroring only."""
    interpolation: Literal["linear", "cubic"] = "linear"
    """Of rotated and scaled crops: linear as in nnU-Net, or by a cubic spline, which keeps edges sharper and is several
    times slower."""
    validation_fraction: float = ranged(0.05, 0, 1, below=True)
    """Share of the subjects held out for the validation loss (at least one subject)."""
    accumulation: int = ranged(1, 1, 2**16)
    """Parts of a batch that are computed in turn, with summed gradients. Saves memory; contrastive losses compare
    within a part."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third slower."""
    compile: bool = False
    """torch.compile of the network's blocks."""
    leave_out_anonymised: bool = True
    """Leave voxels that were anonymised out of the loss, where the corpus has such masks and the task restores
    voxels."""
    balance_by: tuple[str, ...] = ()
    """subject, dataset, modality or several of them: each combination is drawn equally often. Empty: each case is."""


@dataclass(frozen=True)
class FinetuneSettings(TrainingSettings):
    """Settings of MFMTrainer, with or without a pretrained checkpoint: the schedule is the same."""

    learning_rate: float | None = ranged(None, 0, 10, above=True)
    """None: the published rate of this network, optimizer and start, see the family's ``rates``."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: as nnU-Net, fp16 with loss scaling on GPUs, fp32 elsewhere. bf16 pays on CPUs with AVX512-BF16 or AMX."""
    deep_supervision: bool = True
    """Ignored, and reported as off, for networks without a decoder pyramid (Primus)."""
    schedule: Literal["warmup", "sawtooth"] = "warmup"
    """warmup: the whole network from the start. sawtooth: first all but the encoder that came from the checkpoint, then
    all (arXiv 2410.23132); where nothing came from one, the plain warm-up."""
    decoder_epochs: int | None = ranged(None, 2, 10**6)
    """sawtooth: epochs of its first phase. None: 5 % of the epochs from 300 epochs on, else 10 %, at least 2."""
    train: Literal["auto", "all", "decoder", "head", "lora"] = "all"
    """Trained part of the network. auto: as the family advises, else all. decoder: the encoder is frozen; head: all but
    the output layers is (a linear probe); lora: the decoder and low-rank adapters in the encoder are trained (arXiv
    2106.09685, transformers only). A stem that was adapted to several other channels is always trained."""
    lora_rank: int = ranged(8, 1, 2**16)
    """lora: rank of the adapters."""
    lora_alpha: float = ranged(16.0, 0, LARGEST, above=True)
    """lora: the adapters are scaled by ``lora_alpha / lora_rank``."""
    layer_decay: float | None = ranged(None, 0, 1, above=True)
    """Primus: each block of the encoder learns at this fraction of the rate of the block after it (arXiv 2106.08254).
    None: see ``finetune.advice``."""
    parts: Literal["auto", "encoder", "encoder_decoder", "all_but_heads"] = "auto"
    """Part of the checkpoint that is transferred. auto: see ``finetune.advice``."""
    transfer: Literal["fit", "adapt"] = "fit"
    """fit: the plan was made like the checkpoint. adapt: the dataset keeps a plan of its own, and kernels of another
    size are resized."""
    compile: bool = True
    """torch.compile of the network on CUDA GPUs, as nnU-Net; needs a C compiler."""
    mirroring: bool = True
    """Mirror crops in training and images in prediction, along all axes as nnU-Net does."""
    batch_size: int | None = ranged(None, 1, 2**16)
    """Crops per step over all GPUs together. None: as the plan's configuration says."""
    mix: Literal["none", "cutmix", "copy_paste", "lesion_paste"] = "none"
    """Mixing of the labelled crops of a step, images and masks alike. cutmix: a box comes from another crop (arXiv
    1905.04899); copy_paste: its foreground is pasted at the same place (arXiv 2012.07177); lesion_paste: one connected
    component of it is pasted at a random place in the other labels, or in the body (TumorCP, MICCAI 2021)."""
    mix_probability: float = ranged(0.5, 0, 1)
    """Probability that a crop is mixed with another one."""
    mix_box: float = ranged(0.667, 0, 1, above=True, below=True)
    """cutmix: length of the box's sides as a share of the crop's."""
    mix_labels: tuple[int, ...] = ranged((), 1, 2**15)
    """copy_paste, lesion_paste: label values that are pasted; with regions their places in dataset.json, from 1. Empty
    (none): all."""
    mix_draw: Literal["all", "one"] = "all"
    """copy_paste, lesion_paste: paste these labels together, or one of them, drawn anew for each crop."""
    mix_start: int = ranged(0, 0, LARGEST)
    """Step of the training from which crops are mixed."""
    partial_labels: Literal["auto", "heads", "background"] = "auto"
    """Union of datasets: what a class is where it is not annotated. auto: unknown (marginal softmax, or masked
    sigmoids); heads: as if each dataset had an output layer of its own; background: as the label map says."""
    checkpoint: dict[str, Any] | None = None
    """Origin of the weights: {"name", "sha256", "pretext"}; None for training from scratch. Never a path."""


@dataclass(frozen=True)
class ProbeSettings:
    """Settings of the probe, which measures the weights on a few labelled cases while pretraining."""

    every: int = ranged(10, 1, 10**6)
    """Epochs from one probe to the next; the last epoch is always probed."""
    kind: Literal["linear"] = "linear"
    """Voxels are classified from the frozen encoder's features."""
    max_cases: int = ranged(20, 2, 10**6)
    """Most labelled cases that are used; one subject in three is held out for the Dice."""


@dataclass(frozen=True)
class SliceSettings:
    """Slices that a corpus for 2D plans takes out of its volumes (``--slices``)."""

    axis: int = ranged(0, 0, 2)
    """Axis that is cut into slices, in the order of nnU-Net's readers: 0 is Z of a NIfTI file, 1 is Y, 2 is X."""
    every: int = ranged(1, 1, 10**6)
    """Every n-th slice."""
    foreground: float = ranged(0.0, 0, 1)
    """Smallest share of a slice's voxels that must be brighter than the mean of its volume."""


@dataclass(frozen=True)
class SemiSettings:
    """Settings of training with unlabelled images beside the labelled ones (``--unlabelled``)."""

    method: Literal["consistency", "mean_teacher", "student"] | None = None
    """consistency: the network labels an unlabelled crop, and learns these labels on a stronger view of it.
    mean_teacher: the averaged weights label it, and it exchanges a box with a labelled crop (arXiv 2305.00673).
    student: several teachers label the images first, and a new network learns from both."""
    weight: float | None = ranged(None, 0, 100)
    """Weight w of the unlabelled crops: the loss is (labelled + w unlabelled) / (1 + w). None: 1 for consistency and
    student, 0.5 for mean_teacher."""
    start: float | None = ranged(None, 0, 1)
    """Share of the steps that train on labels alone, before the unlabelled images come. None: 0.1; 0 for student, whose
    teachers have trained on them."""
    ramp: float | None = ranged(None, 0, 1)
    """Share of the steps, from ``start`` on, in which the weight rises. None: 0; 0.4 for mean_teacher."""
    strong: Literal["auto", "turn", "intensity"] = "auto"
    """consistency: the stronger view is turned by multiples of 90 degrees and mirrored, or has other intensities. auto:
    turned where nnU-Net itself turns crops fully and mirrors them (2D, flat patches), else other intensities."""
    box: float = ranged(2 / 3, 0, 1, above=True, below=True)
    """mean_teacher: sides of the exchanged box, as a share of the crop's."""
    largest_component: bool = False
    """mean_teacher: keep the largest component of each class of a pseudo label. For single organs, not for lesions."""
    teachers: int = ranged(3, 2, 20)
    """student: teachers that are trained, each under a seed of its own; from 8 labelled cases on, each without another
    eighth of them."""
    teacher_share: float = ranged(0.5, 0, 1, above=True)
    """student: epochs of a teacher as a share of ``finetune.epochs``, which are the student's."""
    rounds: int = ranged(1, 0, 2)
    """student: 1: teachers, labels, student. 2: the student becomes one of the teachers of a second student. 0: only
    label and rank the images."""
    drop: float = ranged(0.1, 0, 1, below=True)
    """student: share of the images, those on which the teachers agree least, that are not used."""
    sure: float = ranged(0.8, 0, 1)
    """student: a voxel counts fully if its likeliest class has at least this probability, ..."""
    unsure: float = ranged(0.3, 0, 1)
    """student: ... and with this weight otherwise."""
    cutmix: float = ranged(0.5, 0, 1)
    """student: probability that a box of a labelled crop is pasted into a pseudo-labelled one."""
    finish: float = ranged(0.1, 0, 1, below=True)
    """student: share of the steps, the last ones, on labels alone, at a tenth of the peak rate falling to 0."""
    corpus: dict[str, Any] | None = None
    """Unlabelled images of the run: {"name", "num_cases", "hash"}. Never a path."""


@dataclass(frozen=True)
class MFMBlock:
    """Our settings in a plan, ``plans["mfm"]``."""

    pretrain: PretrainSettings = field(default_factory=PretrainSettings)
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    source: dict[str, Any] | None = None
    """Checkpoint that the plan was made to fit (``--like``): {"name", "sha256", "pretext", "network"}."""
    seed: int = ranged(0, 0, 2**32 - 1)
    num_workers: int | None = ranged(None, 0, 1024)
    """Background processes that read and augment. None: by the number of CPU cores."""
    modalities: dict[str, Any] | None = None
    """Normalisation of each kind of image, in a corpus of several: {"ct": {"scheme", "intensities"}, ...}. A plan made
    ``--like`` its checkpoint contains the normalisation of its own kind alone."""
    corpus: dict[str, Any] | None = None
    """Settings of the corpus: {"slices": :class:`SliceSettings`, "colour": "grey" or "rgb"}, where it has them."""
    semi: SemiSettings = field(default_factory=SemiSettings)
    universal: dict[str, Any] | None = None
    """Classes of a union of datasets, see :mod:`mfm_nnunet.data.class_table`."""
    network: str = "resenc"
    """Family of the network, see :mod:`mfm_nnunet.models.families`."""
    format: int = FORMAT


def resolved_warmup(warmup_epochs: int | None, epochs: int) -> int:
    """Return the warm-up in epochs: the setting, or 5 % of 300 and more epochs, or 10 % of fewer."""
    if warmup_epochs is not None:
        return warmup_epochs
    return round(epochs * (0.05 if epochs >= 300 else 0.1))


def resolved_decoder_epochs(settings: FinetuneSettings) -> int | None:
    """Return the epochs of the sawtooth's first phase; the setting itself for the other schedule."""
    if settings.schedule != "sawtooth" or settings.decoder_epochs is not None:
        return settings.decoder_epochs
    return max(2, resolved_warmup(None, settings.epochs))


def require_legal(settings: TrainingSettings, prefix: str) -> None:
    """Raise MFMError (E_CONFIG) for the first setting that is out of range or conflicts with another."""
    require_in_range(settings, prefix)
    epochs, warmup = settings.epochs, resolved_warmup(settings.warmup_epochs, settings.epochs)
    name, problem = "", ""
    if warmup > epochs:
        name, problem = "warmup_epochs", f"must be from 0 to {prefix}epochs={epochs}"
    elif not isinstance(settings, FinetuneSettings):
        return
    elif settings.mix != "none" and settings.mix_start >= (steps := epochs * settings.iterations_per_epoch):
        name, problem = "mix_start", f"the training has {steps} steps, so nothing would be mixed; start earlier"
    elif settings.schedule != "sawtooth":
        if settings.decoder_epochs is not None:
            name = "decoder_epochs"
            problem = "needs finetune.schedule=sawtooth; set it, or leave this out"
    else:
        first = resolved_decoder_epochs(settings) or 0
        if first + max(warmup, 1) > epochs:
            name = "decoder_epochs"
            problem = f"the first phase ({first} epochs) and the warm-up ({warmup}) leave no epoch of finetune.epochs="
            problem += f"{epochs} to train the whole network; shorten them, or train longer"
        elif settings.train != "all":
            name = "train"
            problem = "the sawtooth trains everything in the end; use finetune.schedule=warmup, or finetune.train=all"
    if problem:
        raise MFMError("E_CONFIG", f"{prefix}{name}={getattr(settings, name)}: {problem}.")


def to_dict(settings: Any) -> dict[str, Any]:
    """Return a settings dataclass as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def from_dict(cls: type[Settings], values: Mapping[str, Any], where: str = "") -> Settings:
    """Make the dataclass ``cls`` from JSON values; ``where`` prefixes names in messages.

    Raises MFMError (E_CONFIG) for an unknown key, a value of the wrong type and a number out of its range.
    """
    if not isinstance(values, Mapping):
        raise MFMError("E_CONFIG", f"{where.rstrip('.') or 'settings'}={values}: expected a table of names and values.")
    hints = get_type_hints(cls)
    if cls is PretrainSettings:
        values = {name: value for name, value in values.items() if not _is_removed(name, value, where)}
    unknown = [str(key) for key in values if key not in hints]
    if unknown:
        raise MFMError("E_CONFIG", f"unknown setting '{where}{unknown[0]}'. {nearest(unknown[0], hints)}")
    settings = cls(**{key: _typed(value, hints[key], where + key) for key, value in values.items()})
    require_in_range(settings, where)
    return settings


def _is_removed(name: str, value: Any, where: str) -> bool:
    """Return whether a stored pretraining setting no longer exists; warn if it had an effect."""
    own = f"pretrain.{name}"
    if own in NEUTRAL and value != NEUTRAL[own]:
        logger.warning("%s%s=%s is ignored. %s", where, name, value, REMOVED[own])
    return own in NEUTRAL


def block_of(plans: Mapping[str, Any]) -> MFMBlock:
    """Read ``plans["mfm"]``; a stock plan without this block gives the defaults."""
    block = from_dict(MFMBlock, plans.get("mfm", {}), "mfm.")
    if block.format != FORMAT:
        raise MFMError(
            "E_CONFIG",
            f"the plan block has format {block.format}, but this version reads {FORMAT}. Plan again with this version.",
        )
    return block


def override(settings: Settings, assignments: Iterable[str]) -> Settings:
    """Apply ``name=value`` strings, typed by the fields; nested names are dotted (``pretrain.epochs=3``).

    Raises MFMError (E_CONFIG) that suggests the nearest legal setting.
    """
    for assignment in assignments:
        name, separator, value = assignment.partition("=")
        if not separator:
            raise MFMError("E_CONFIG", f"--set {assignment}: expected name=value, e.g. pretrain.epochs=100.")
        settings = _assign(settings, name.strip(), value.strip(), settings)
    require_in_range(settings)
    return settings


def changes(settings: Any) -> dict[str, Any]:
    """Return what a block, or one of its parts, has otherwise than the defaults, by dotted name.

    Raises ValueError for other classes.
    """
    parts = {type(part): name for name, part in vars(MFMBlock()).items() if dataclasses.is_dataclass(part)}
    if type(settings) in parts:
        settings = dataclasses.replace(MFMBlock(), **{parts[type(settings)]: settings})
    if not isinstance(settings, MFMBlock):
        known = ", ".join(cls.__name__ for cls in (*parts, MFMBlock))
        raise ValueError(f"expected name=value, a dict, or one of {known}")
    values = {name: operator.attrgetter(name) for name in setting_names(settings)}
    return {name: get(settings) for name, get in values.items() if get(settings) != get(MFMBlock())}


def setting_names(settings: Any, prefix: str = "") -> list[str]:
    """List all dotted names that ``--set`` accepts for ``settings``."""
    names: list[str] = []
    for name, value in vars(settings).items():
        is_nested = dataclasses.is_dataclass(value)
        names += setting_names(value, f"{prefix}{name}.") if is_nested else [prefix + name]
    return names


def _assign(settings: Any, name: str, value: str, root: Any, path: str = "") -> Any:
    head, _, rest = name.partition(".")
    hints = get_type_hints(type(settings))
    if head not in hints or bool(rest) != dataclasses.is_dataclass(getattr(settings, head)):
        advice = REMOVED.get(path + name) or nearest(path + name, setting_names(root))
        raise MFMError("E_CONFIG", f"unknown setting '{path}{name}'. {advice}")
    if rest:
        new = _assign(getattr(settings, head), rest, value, root, f"{path}{head}.")
    else:
        new = _typed(value, hints[head], path + name)
    return dataclasses.replace(settings, **{head: new})


def _typed(value: Any, hint: Any, name: str) -> Any:
    """Convert ``value`` (JSON or a string from the command line) to the annotated type, also to nested settings."""
    if dataclasses.is_dataclass(hint):
        return value if dataclasses.is_dataclass(value) else from_dict(hint, value, name + ".")  # type: ignore[arg-type]
    return parse_value(value, hint, name)
