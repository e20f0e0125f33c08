"""A fold of a dataset with labels of whole images: its batches, the run that the engine trains, and its results."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch.utils.data import Dataset, default_collate

from mfm_nnunet import checkpoint, metrics
from mfm_nnunet.data.label_table import LabelTable
from mfm_nnunet.data.loading import read_in_order
from mfm_nnunet.data.views import Kind, choose_places, list_places, read_views
from mfm_nnunet.data.volumes import open_volume
from mfm_nnunet.device import finetuning_dtype
from mfm_nnunet.engine.engine import Batch, Engine, Optimisation, Pictures
from mfm_nnunet.engine.optim import WeightAverage, make_optimizer
from mfm_nnunet.engine.state import STATE_FILES, RunState, load_state, save_state
from mfm_nnunet.errors import report_foreign_state
from mfm_nnunet.files import digest_of, to_plain, write_csv, write_json
from mfm_nnunet.finetune import groups
from mfm_nnunet.finetune.groups import EpochSchedule, Group, Phases
from mfm_nnunet.finetune.loading import make_deterministic, seed_everything, seed_of, seeded
from mfm_nnunet.finetune.splits import Split
from mfm_nnunet.models.classifier import Classifier
from mfm_nnunet.processes import ALONE
from mfm_nnunet.reports import progress as reports
from mfm_nnunet.settings import FORMAT, MFMBlock, to_dict
from mfm_nnunet.tasks.classification import ClassificationTask

FINAL = "checkpoint_final.pth"
INHERITED = ("licence", "citations")
"""Fields of a checkpoint that the model trained from it keeps."""
ROTATION = (-np.pi / 6, np.pi / 6)
FLAT = 3
"""Patches flatter than this are augmented slice by slice, as by nnU-Net."""
NUM_VIEWS = {2: 8, 3: 4}
"""Most views of a case in a training batch, by the axes of the patch."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledImages:
    """The preprocessed images of a fold, their labels, and what a classifier sees of them."""

    table: LabelTable
    split: Split
    files: Mapping[str, Path]
    patch_size: tuple[int, ...]
    kind: Kind

    @functools.cached_property
    def scale(self) -> tuple[float, float]:
        """Mean and deviation of the training cases' numbers; (0, 1) for classes."""
        if self.table.task != "regression":
            return 0.0, 1.0
        numbers = self.table.array(self.split["train"])
        return float(numbers.mean()), float(numbers.std()) or 1.0

    def target(self, case: str) -> torch.Tensor:
        """Return the target (T) of a case for the loss, float32."""
        mean, deviation = self.scale
        return torch.tensor([(value - mean) / deviation for value in self.table.targets[case]], dtype=torch.float32)

    def views(self, case: str, rng: np.random.Generator | None = None) -> torch.Tensor:
        """Return all views (N, C, *patch) of a case; with a generator, those of a training batch."""
        volume = open_volume(str(self.files[case]))
        places = list_places(volume.shape[1:], self.patch_size, self.kind)
        if rng is not None:
            places = choose_places(places, self.num_views, rng)
        return read_views(volume, places, self.patch_size)

    @functools.cached_property
    def num_views(self) -> int:
        """Number of views of a case in a training batch, the same for all cases."""
        shapes = [open_volume(str(self.files[case])).shape[1:] for case in self.split["train"]]
        most = max(len(list_places(shape, self.patch_size, self.kind)) for shape in shapes)
        return min(most, NUM_VIEWS[len(self.patch_size)])


@dataclass(frozen=True)
class TrainingCases(Dataset):
    """The endless stream of augmented training cases; each pass over them is in another order."""

    images: LabelledImages
    transforms: Any
    seed: int

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        case = self.case(index)
        with seeded(seed_of(self.seed, "training", index)):
            views = self.images.views(case, np.random.default_rng([self.seed, 1, index]))
            data = torch.stack([self.transforms(image=view)["image"] for view in views])
        return {"data": data, "target": self.images.target(case)}

    def case(self, index: int) -> str:
        """Return the name of the case of an item."""
        cases = self.images.split["train"]
        order = np.random.default_rng([self.seed, 0, index // len(cases)]).permutation(len(cases))
        return cases[order[index % len(cases)]]


@dataclass(frozen=True)
class ValidationCases(Dataset):
    """All views of each of some cases."""

    images: LabelledImages
    cases: Sequence[str]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        case = self.cases[index]
        return {"data": self.images.views(case), "target": self.images.target(case)}


def make_transforms(patch_size: Sequence[int], mirroring: bool) -> Any:
    """Make nnU-Net's augmentation with rotations up to 30 degrees, and without mirroring if sides matter."""
    is_flat = len(patch_size) == 3 and max(patch_size) / patch_size[0] > FLAT
    axes = tuple(range(len(patch_size))) if mirroring else None
    transforms = nnUNetTrainer.get_training_transforms(tuple(patch_size), ROTATION, None, axes, is_flat)
    make_deterministic(transforms)
    return transforms


@dataclass
class ClassificationRun:
    """The run of a fold, in the form the engine trains. Its state is saved after each epoch and on a stop."""

    task: ClassificationTask
    images: LabelledImages
    block: MFMBlock
    folder: Path
    device: torch.device
    init_args: dict[str, Any]
    """Plan, configuration, fold and dataset.json, as nnU-Net's checkpoints have them."""
    new_weights: set[str] | None = None
    """Names of the network's parameters that learn first; None from scratch."""
    num_workers: int = 0
    _last_plot: float = field(default=-reports.SECONDS_BETWEEN_PLOTS, init=False)

    def __post_init__(self) -> None:
        """Prepare everything up to the first step."""
        self.settings = self.block.finetune
        self.task.to(self.device)
        if self.settings.compile and self.device.type == "cuda":
            self.task.classifier.backbone.compile_blocks()
        self._prepare(self.new_weights)
        self._training = TrainingCases(
            self.images, make_transforms(self.images.patch_size, self.settings.mirroring), self.block.seed
        )

    def _prepare(self, new_weights: set[str] | None) -> None:
        """Make optimizer, rates, average and engine, which depend on where the weights came from."""
        settings, task, self.new_weights = self.settings, self.task, new_weights
        described = _groups(task, self.block, new_weights)
        parameters = dict(task.classifier.named_parameters())
        rate = settings.learning_rate
        assert rate is not None, "the settings are resolved"
        optimizer = make_optimizer(
            [{"params": [parameters[name] for name in group.names]} for group in described],
            settings.optimizer, rate, settings.weight_decay,
        )  # fmt: skip
        self._schedule = EpochSchedule(optimizer, described, rate, Phases.of(settings, new_weights is not None))
        dtype = finetuning_dtype(settings.precision, self.device)
        scaler = torch.amp.GradScaler(self.device.type, enabled=dtype is torch.float16)
        trained = self._schedule.all_trained_names()
        average = WeightAverage(task.classifier, settings.ema_decay, trained) if settings.ema_decay else None
        self.optimisation = Optimisation(optimizer, scaler, dtype, average)
        self.engine = Engine(task, self, self.optimisation, ALONE, RunState())
        learn = sum(parameters[name].numel() for name in trained)
        logger.info("%s parameters are trained", f"{learn:,}")

    def train(self, continue_training: bool) -> None:
        """Train to the last epoch. Raises StoppedError after a stop signal, and as :meth:`Engine.train`."""
        if continue_training:
            self._load()
        self.engine.train()
        (self.folder / STATE_FILES[1]).unlink(missing_ok=True)

    def rehearse(self) -> None:
        """Take a few steps and say what the run costs."""
        self.engine.rehearse()

    # The Run protocol

    @property
    def batch_size(self) -> int:
        """Cases per step."""
        configuration = self.init_args["plans"]["configurations"][self.init_args["configuration"]]
        return self.settings.batch_size or int(configuration["batch_size"])

    def training_batches(self, first_step: int) -> Iterator[Batch]:
        """Return the batches of all steps from ``first_step`` on."""
        total, size = self.settings.epochs * self.settings.iterations_per_epoch, self.batch_size
        indices = [list(range(step * size, (step + 1) * size)) for step in range(first_step, total)]
        return self._read(self._training, default_collate, batch_sampler=indices)

    def validation_batches(self, epoch: int) -> Iterator[Batch]:
        """Return validation cases one by one: all, or as many as ``finetune.validation_iterations`` batches hold."""
        cases = self.images.split["val"]
        order = np.random.default_rng(self.block.seed).permutation(len(cases))
        most = self.settings.validation_iterations * self.batch_size
        return self.read_cases([cases[index] for index in sorted(order[:most])])

    def read_cases(self, cases: Sequence[str]) -> Iterator[Batch]:
        """Return the batch of each case, in order."""
        return self._read(ValidationCases(self.images, cases), default_collate, sampler=range(len(cases)))

    def begin_epoch(self, epoch: int) -> None:
        """Set the rates and freeze what does not learn yet."""
        self._schedule.step(epoch)
        trained = self._schedule.trained_names(epoch)
        self.optimisation.frozen = groups.freeze(self.task.classifier, trained, False, self.new_weights is not None)
        self.task.is_frozen = not any(name.startswith("backbone.") for name in trained)
        self.task.train()

    def begin_step(self, step: int) -> None:
        """Seed the random numbers of dropout and drop path from the step."""
        seed_everything(seed_of(self.block.seed, "step", step))

    def end_epoch(self, epoch: int, results: dict[str, Any], pictures: Pictures) -> list[str]:
        """Append the epoch to the history, save the state, and write the files derived from it."""
        history, rate = self.engine.state.history, self.optimisation.optimizer.param_groups[0]["lr"]
        row = {"epoch": epoch, **to_plain(results), "learning_rate": rate}
        history.append({name: None if value != value else value for name, value in row.items()})
        self._save()
        reports.write_log(history, self.folder / "log.jsonl")
        is_last = epoch + 1 == self.settings.epochs
        if is_last or time.monotonic() - self._last_plot > reports.SECONDS_BETWEEN_PLOTS:
            self._last_plot = time.monotonic()
            reports.plot_progress(history, self.folder / "progress.png", self.folder.parent.name)
        name = next(name for name in row if name in ("validation_auroc", "validation_r2"))
        return [
            f"epoch {epoch + 1}/{self.settings.epochs} done  training loss {row['train_loss']:.4f}  validation loss "
            f"{row['validation_loss']:.4f}  {name.replace('_', ' ')} {row[name]:.3f}  {row['seconds']:.1f} s"
        ]

    def save_early(self) -> str:
        """Save the state within an epoch."""
        self._save()
        return f"saved at step {self.engine.state.step}. Continue with --c."

    def name_cases(self, step: int, batch: Batch) -> Iterator[str]:
        """Yield the names of the cases in the batch of a step."""
        for index in range(step * self.batch_size, (step + 1) * self.batch_size):
            yield self._training.case(index)

    # Files

    def _read(self, source: Dataset, collate: Any, **how: Any) -> Iterator[Batch]:
        return read_in_order(source, self.num_workers, self.device.type == "cuda", collate, **how)

    def _save(self) -> None:
        new_weights = None if self.new_weights is None else sorted(self.new_weights)
        modules = {**self.optimisation.state_dicts(self.task), "new_weights": new_weights}
        save_state(self.folder, self.engine.state, modules, self._resume_settings())

    def _load(self) -> None:
        state, modules = load_state(self.folder, self._resume_settings())
        with report_foreign_state(self.folder):
            names = modules["new_weights"]
            self._prepare(None if names is None else set(names))
            self.optimisation.load_state_dicts(self.task, modules)
        self.engine.state = state
        logger.info("continuing at step %d", state.step)

    def _resume_settings(self) -> dict[str, Any]:
        """Collect what a resumed run must share."""
        names = {part: list(cases) for part, cases in self.images.split.items()}
        finetune = to_dict(self.settings)
        finetune.pop("checkpoint")
        described = {"seed": self.block.seed, "finetune": finetune, "head": self.task.classifier.head.kind}
        return {**described, "cases": _digest_cases(names, self.images.table)}


def _digest_cases(names: Mapping[str, Sequence[str]], table: LabelTable) -> str:
    """Hash the cases of a fold and their labels."""
    labels = {case: [str(value) for value in table.targets[case]] for part in names.values() for case in part}
    return digest_of({"names": {part: sorted(cases) for part, cases in names.items()}, "labels": labels})


def _groups(task: ClassificationTask, block: MFMBlock, new: set[str] | None) -> list[Group]:
    """Group the parameters of head and encoder by their learning rate; the decoder never learns."""
    settings, network = block.finetune, task.network
    head = Group(tuple(f"head.{name}" for name, _ in task.classifier.head.named_parameters()))
    if settings.train == "head":
        return [head]
    encoder = task.classifier.backbone.family.encoder_names(network)
    kept = groups.adapter_names(network) if settings.train == "lora" else encoder
    found = [head]
    for group in groups.group_parameters(network, settings, new):
        if names := tuple(
            f"backbone.network.{name}" for name in group.names if name in kept | (set(new or ()) & encoder)
        ):
            found.append(Group(names, group.waits, group.scale))
    return found


# Results


@torch.no_grad()
def predict_validation(run: ClassificationRun) -> np.ndarray:
    """Return the outputs (N, K) of the shipped weights for the fold's validation cases, in their order."""
    run.task.eval()
    with run.optimisation.averaged():
        outputs = [run.engine.forward(batch).metrics["logits"] for batch in run.read_cases(run.images.split["val"])]
    return torch.stack(outputs).double().cpu().numpy()


def write_model(
    folder: Path,
    images: LabelledImages,
    classifier: Classifier,
    block: MFMBlock,
    init_args: dict[str, Any],
    logits: np.ndarray,
) -> dict[str, Any]:
    """Write ``checkpoint_final.pth``, the metrics and predictions of the validation cases, and the reliability plot.

    Returns the metrics. The temperature is fitted to the validation cases, unless these trained too (fold ``all``).
    """
    table, cases, (mean, deviation) = images.table, images.split["val"], images.scale
    target, temperature = table.array(cases), None
    if not set(cases) & set(images.split["train"]):  # of cases that were trained on it would be too low
        temperature = metrics.fit_temperature(table.task, target, logits)
    _write_checkpoint(folder, images, classifier, block, init_args, temperature)
    predicted = metrics.to_probabilities(table.task, logits * deviation + mean)
    subjects = [table.subjects[case] for case in cases]
    result = metrics.evaluate_labels(table.task, table.classes, target, predicted, subjects)
    if temperature is not None:
        calibrated = metrics.to_probabilities(table.task, logits, temperature)
        result["temperature"] = temperature
        result["ece_calibrated"] = metrics.calibration_error(table.task, target, calibrated)
    write_json(folder / "metrics.json", result)
    rows = [[case, *values] for case, values in zip(cases, predicted.tolist())]
    write_csv(folder / "predictions.csv", ["case", *(table.classes or ("prediction",))], rows)
    if table.task == "regression":
        reports.plot_agreement(target[:, 0], predicted[:, 0], folder / "agreement.png", folder.parent.name)
    else:
        bins = metrics.reliability(table.task, target, predicted)
        reports.plot_reliability(bins, folder / "reliability.png", folder.parent.name)
    for line in metrics.describe_scores(result):
        logger.info("%s", line)
    return result


def _write_checkpoint(
    folder: Path,
    images: LabelledImages,
    classifier: Classifier,
    block: MFMBlock,
    init_args: dict[str, Any],
    temperature: float | None,
) -> None:
    """Write the model: readable as pretrained encoder, and as classifier by ``mfm_predict``."""
    states = classifier.backbone.encoder_state()
    names = {name.replace(".parametrizations.weight.original", ".weight") for name in states}
    merged = groups.merged_state(classifier.backbone.network)
    content = {
        "network_weights": checkpoint.cpu_weights({name: merged[name] for name in merged if name in names}),
        "head_weights": checkpoint.cpu_weights(classifier.head.state_dict()),
        "trainer_name": f"MFMTrainer_{classifier.head.kind}",
        "init_args": init_args,
        "inference_allowed_mirroring_axes": None,
        "mfm": {
            "format": FORMAT,
            "kind": "pretrained",
            "pretext": ClassificationTask.name,
            "trained": "encoder",
            "plans": init_args["plans"],
            "configuration": init_args["configuration"],
            "patch_size": list(images.patch_size),
            "num_inputs": classifier.backbone.num_inputs,
            "num_outputs": 1,
            "head": classifier.head.kind,
            "task": images.table.task,
            "classes": list(images.table.classes),
            "scale": list(images.scale),
            "temperature": temperature,
            "seed": block.seed,
            "finetune": to_dict(block.finetune),
            "source": block.source or {},
            # A licence also binds weights that were derived from others.
            **{name: value for name, value in (block.finetune.checkpoint or {}).items() if name in INHERITED},
            "versions": {package: version(package) for package in ("mfm_nnunet", "nnunetv2", "torch")},
        },
    }
    checkpoint.save(to_plain(content), folder / FINAL)
