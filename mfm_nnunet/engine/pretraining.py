"""A pretraining run: streams of crops from a corpus, ``resume.pth``, ``log.jsonl``, pictures and checkpoints."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from mfm_nnunet import checkpoint
from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.crops import (
    CropStream,
    StreamSettings,
    batches,
    case_weights,
    describe_shares,
    require_legal_balance,
)
from mfm_nnunet.data.volumes import masked_cases, read_properties, volume_shape
from mfm_nnunet.data.warp import Order
from mfm_nnunet.device import require_sound_bf16, warn_of_slow_bf16
from mfm_nnunet.engine.engine import Batch, Engine, Optimisation, Pictures, split
from mfm_nnunet.engine.optim import WeightAverage, learning_rate_factor, make_optimizer
from mfm_nnunet.engine.probe import Probe, in_words, others_waiting
from mfm_nnunet.engine.state import RunState, load_state, save_state
from mfm_nnunet.errors import MFMError, is_out_of_memory, report_foreign_state
from mfm_nnunet.files import digest_of, to_plain
from mfm_nnunet.images.geometry import letters_of
from mfm_nnunet.plan import Plan
from mfm_nnunet.processes import ALONE, World
from mfm_nnunet.reports import examples
from mfm_nnunet.reports import progress as reports
from mfm_nnunet.settings import PretrainSettings, resolved_warmup
from mfm_nnunet.tasks.base import Augmentation, PretextTask

logger = logging.getLogger(__name__)


@dataclass
class Pretraining:
    """A run of one pretext task, in the form the engine trains. The state is saved after each epoch and on a stop."""

    task: PretextTask
    settings: PretrainSettings
    training: CropStream
    validation: CropStream
    folder: Path
    device: torch.device
    description: dict[str, Any]
    """The ``mfm`` entry of the checkpoint (plans, task, corpus without subjects), in plain values."""
    seed: int = 0
    num_workers: int = 0
    world: World = ALONE
    probe: Probe | None = None
    _last_plot: float = field(default=-math.inf, init=False)

    def __post_init__(self) -> None:
        """Prepare everything up to the first step."""
        settings, task = self.settings, self.task.to(self.device)
        if settings.activation_checkpointing:
            task.backbone.recompute_activations()
        optimizer = make_optimizer(
            [parameter for parameter in task.parameters() if parameter.requires_grad],
            settings.optimizer, settings.learning_rate, settings.weight_decay,
        )  # fmt: skip
        dtype = choose_dtype(settings.precision, self.device)
        if dtype is torch.bfloat16:
            size = self.training[0]["image"].shape[-len(task.backbone.patch_size) :]
            require_sound_bf16(task.backbone.network, size, self.device, "pretrain.precision")
            warn_of_slow_bf16(self.device, "pretrain.precision")
        scaler = torch.amp.GradScaler(self.device.type, enabled=dtype is torch.float16)
        average = WeightAverage(task, settings.ema_decay) if settings.ema_decay is not None else None
        self._optimisation = Optimisation(optimizer, scaler, dtype, average, settings.accumulation)
        module: nn.Module = task
        if self.world.size > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            module = nn.parallel.DistributedDataParallel(task, device_ids=ids)
        self._engine = Engine(task, self, self._optimisation, self.world, RunState(), module)

    def train(self, continue_training: bool = False) -> Path:
        """Train to the end and return the final checkpoint.

        Raises StoppedError after a clean save on a signal, MFMError (E_CONFIG, E_NOT_FOUND, E_MODEL_CORRUPT) when the
        run cannot be resumed, and FloatingPointError before an update with a non-finite loss.
        """
        if continue_training:
            self._load()
        if self.settings.compile:
            batch = next(self.training_batches(self._engine.state.step, num_workers=0))
            part = split(batch, self.settings.accumulation)[0]
            _compile_network(self.task, lambda: self._engine.forward(part, self.task).loss)
        self._engine.train()
        final = self.folder / "checkpoint_final.pth"
        if self.world.is_main:
            self._save_weights(final.name)
            (self.folder / "checkpoint_latest.pth").unlink(missing_ok=True)
            (self.folder / "resume_previous.pth").unlink(missing_ok=True)
        return final

    def rehearse(self, continue_training: bool = False) -> None:
        """Take a few steps and say what the run costs; nothing is written."""
        if continue_training:
            self._load()
        self._engine.rehearse()

    # The Run protocol

    def training_batches(self, first_step: int, num_workers: int | None = None) -> Iterator[Batch]:
        """Return the batches of all steps from ``first_step`` on."""
        return self._batches(self.training, first_step, self._engine.total_steps, num_workers)

    def validation_batches(self, epoch: int) -> Iterator[Batch]:
        """Return the same batches of held-out subjects in every epoch, so that epochs can be compared."""
        self._seed(-1)
        return self._batches(self.validation, 0, max(1, self.settings.validation_iterations))

    def begin_epoch(self, epoch: int) -> None:
        """Do nothing: rates and seeds are set at each step."""

    def begin_step(self, step: int) -> None:
        """Set the learning rate, and seed dropout and drop path from (seed, step, rank)."""
        settings = self.settings
        warmup = resolved_warmup(settings.warmup_epochs, settings.epochs)
        factor = learning_rate_factor(step / settings.iterations_per_epoch, settings.epochs, warmup)
        for group in self._optimisation.optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        self._seed(step)

    def end_epoch(self, epoch: int, results: dict[str, Any], pictures: Pictures) -> list[str]:
        """Append the epoch to the history, save the state, then write the files derived from it."""
        history, rate = self._engine.state.history, self._optimisation.optimizer.param_groups[0]["lr"]
        losses = {name: results.pop(name) for name in ("train_loss", "validation_loss")}
        row = {"epoch": epoch, **losses, "learning_rate": rate, **results, **self._measure_probe(epoch)}
        history.append(row)
        if not self.world.is_main:
            return []
        self._save()
        reports.write_log(history, self.folder / "log.jsonl")
        if pictures:
            volumes = {name: volume.detach().float().cpu().numpy() for name, volume in pictures.items()}
            title, file = f"{self.description['pretext']}, epoch {epoch + 1}", self.folder / "examples.png"
            examples.plot_examples(volumes, file, title, frame=self._frame())
            if epoch == 0:
                shutil.copyfile(file, self.folder / "examples_first.png")
        is_last = epoch + 1 == self.settings.epochs
        if is_last or time.monotonic() - self._last_plot > reports.SECONDS_BETWEEN_PLOTS:
            self._last_plot = time.monotonic()
            reports.plot_progress(history, self.folder / "progress.png", self.folder.name)
        line = (
            f"epoch {epoch + 1}/{self.settings.epochs} done  training loss {row['train_loss']:.4f}  "
            f"validation loss {row['validation_loss']:.4f}  {row['seconds']:.1f} s"
        )
        return [line, in_words(row)] if "probe_dice" in row else [line]

    def save_early(self) -> str:
        """Save the state within an epoch."""
        if self.world.is_main:
            self._save()
        return f"saved at step {self._engine.state.step} of {self._engine.total_steps}. Continue with --c."

    def name_cases(self, step: int, batch: Batch) -> Iterator[str]:
        """Yield the names of the cases in the batch of a step."""
        size = self.settings.batch_size
        for item in range(step * size, (step + 1) * size):
            yield from self.training.case_names(item)

    # Helpers

    def _batches(self, stream: CropStream, first: int, last: int, num_workers: int | None = None) -> Iterator[Batch]:
        workers = self.num_workers if num_workers is None else num_workers
        return batches(
            stream, self.settings.batch_size, first, last, workers, self.world.rank, self.world.size,
            pin=self.device.type == "cuda",
        )  # fmt: skip

    def _seed(self, step: int) -> None:
        torch.manual_seed((self.seed * 1_000_003 + (step + 1) * 65_537 + self.world.rank) % (1 << 63))

    def _frame(self) -> examples.Frame | None:
        """Return the position of the first validation item's pictures; None if it is unknown, or they are no crop."""
        kind, plan = self.task.pictures_are, Plan.of(self.description["plans"])
        name = self.validation.case_names(0)[0]
        file = next(Path(file) for file in self.validation.files if Path(file).stem == name).with_suffix(".pkl")
        if kind == "changed" or not file.is_file():
            return None
        letters = letters_of(read_properties(file))
        if letters is None:
            return None
        spacing = tuple(plan.configuration(self.description["configuration"]).spacing or (1.0, 1.0, 1.0))
        spacing = spacing if len(spacing) == 3 else (1.0, *spacing)
        directions = "".join(letters[axis] for axis in plan.content["transpose_forward"])
        return examples.Frame(directions, spacing, has_letters=kind == "scan")

    def _measure_probe(self, epoch: int) -> dict[str, float | None]:
        """Probe the shipped weights and return the columns for the log; empty when no probe is due."""
        probe, done = self.probe, epoch + 1
        if probe is None or (done % probe.settings.every and done != self.settings.epochs):
            return {}
        with others_waiting(self.world), self._optimisation.averaged():
            backbone, dtype = self.task.backbone, self._optimisation.dtype
            return probe.measure(backbone, self.device, dtype) if self.world.is_main else {}

    def _save(self) -> None:
        modules = self._optimisation.state_dicts(self.task)
        save_state(self.folder, self._engine.state, modules, self._resume_settings())
        self._save_weights("checkpoint_latest.pth")

    def _save_weights(self, name: str) -> None:
        epoch = self._engine.state.step // self.settings.iterations_per_epoch
        with self._optimisation.averaged():
            content = {
                "network_weights": checkpoint.cpu_weights(self.task.shipped_weights()),
                "mfm": {**self.description, "epoch": epoch},
            }
            checkpoint.save(content, self.folder / name)

    def _load(self) -> None:
        state, modules = load_state(self.folder, self._resume_settings())
        with report_foreign_state(self.folder):
            self._optimisation.load_state_dicts(self.task, modules)
        self._engine.state = state
        logger.info("continuing at step %d of %d", state.step, self._engine.total_steps)

    def _resume_settings(self) -> dict[str, Any]:
        """Collect the settings that a resumed run must share; the number of workers and the device may change."""
        about = self.description
        described = {name: about[name] for name in ("pretext", "pretext_config", "corpus", "pretrain")}
        plan = digest_of(about["plans"]["configurations"])
        others = {"seed": self.seed, "world_size": self.world.size, "plan_sha256": plan}
        if self.probe is not None:
            others["probe"] = self.probe.description()
        return to_plain({**described, **others})


def choose_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype of the setting ``pretrain.precision``, None for float32."""
    if precision == "auto":
        if device.type != "cuda":
            return None
        # Older GPUs emulate bf16, which is slower than float32.
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _compile_network(task: PretextTask, loss: Callable[[], torch.Tensor]) -> None:
    """Compile the network's blocks and try a training pass before the first step."""
    logger.info("compiling the network; this takes minutes")
    task.backbone.compile_blocks()
    task.train()
    try:
        loss().backward()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise MFMError(
            "E_CONFIG",
            f"pretrain.compile=true: torch.compile cannot compile this network here ({reason}). Install a C++ "
            "compiler (on GPUs also Triton), or leave the setting out.",
        ) from error
    task.zero_grad(set_to_none=True)


# Streams


@dataclass(frozen=True)
class Corpus:
    """The source of the streams: preprocessed cases, their volumes, and the names of training and validation cases."""

    cases: Sequence[Case]
    files: Mapping[str, Path]
    training: set[str]
    validation: set[str]


@dataclass(frozen=True)
class Streams:
    """Training and validation items, and notes for the user, one line each."""

    training: CropStream
    validation: CropStream
    notes: list[str]


def make_streams(
    corpus: Corpus,
    task_class: type[PretextTask],
    config: Any,
    patch_size: tuple[int, ...],
    settings: PretrainSettings,
    seed: int,
) -> Streams:
    """Make the two streams of a run of ``task_class`` with the resolved ``config``.

    Raises MFMError: E_CONFIG (settings that do not fit the corpus, volumes too small for the task), E_NOT_FOUND (masks
    registered after the volumes were preprocessed).
    """
    balance = settings.balance_by
    require_legal_balance(balance, corpus.cases)
    _require_large_enough(corpus.files, task_class.smallest_volume(config))
    with_valid, notes = _use_masks(corpus, task_class, settings)
    transform = task_class.transform(config, patch_size)
    weaker = min(settings.augmentation, task_class.augmentation(config), key=get_args(Augmentation).index)
    kinds: tuple[Augmentation, ...] = (weaker, "none")
    order: Order = 3 if settings.interpolation == "cubic" else 1
    streams = []
    for number, (names, augmentation) in enumerate(zip((corpus.training, corpus.validation), kinds)):
        drawn = StreamSettings(task_class.volumes_per_item(config), augmentation, seed, number, with_valid, order)
        cases = [case for case in corpus.cases if case.name in names]
        if balance and number == 0:
            notes.append(describe_shares(cases, balance))
        weights = case_weights(cases, balance) if balance else None
        streams.append(CropStream([corpus.files[name] for name in names], transform, drawn, weights))
    return Streams(streams[0], streams[1], notes)


def _use_masks(corpus: Corpus, task_class: type[PretextTask], settings: PretrainSettings) -> tuple[bool, list[str]]:
    """Decide whether transforms get ``valid``, and describe the use of the corpus's masks in a line, if it has any."""
    named = {case.name for case in corpus.cases if case.anonymisation_mask is not None}
    folders = {file.parent for file in corpus.files.values()}
    there = set(corpus.files) & {name for folder in folders for name in masked_cases(folder)}
    num_masks = len(there | named)
    if not num_masks:
        return False, []
    if not task_class.uses_valid or not settings.leave_out_anonymised:
        reason = f"{task_class.name} does not use them"
        if task_class.uses_valid:
            reason = "pretrain.leave_out_anonymised=false"
        return False, [f"the anonymisation masks of {num_masks} cases are not used: {reason}"]
    if missing := sorted(named - there):
        raise MFMError(
            "E_NOT_FOUND",
            f"{len(missing)} cases, e.g. {missing[0]}, got anonymisation masks after they were preprocessed. Run "
            "mfm_plan_and_preprocess again; it makes only what is missing.",
        )
    return True, [f"anonymised voxels of {num_masks} cases are left out of the loss"]


def _require_large_enough(files: Mapping[str, Path], smallest: tuple[int, ...] | None) -> None:
    """Check sizes from the file headers alone. In 2D the size of a slice counts."""
    if smallest is None:
        return
    shapes = {name: volume_shape(file)[-len(smallest) :] for name, file in files.items()}
    small = [name for name, shape in shapes.items() if any(n < least for n, least in zip(shape, smallest))]
    if small:
        shown = "".join(f"\n  {name}: {'x'.join(map(str, shapes[name]))}" for name in small[:5])
        more = f"\n  ... and {len(small) - 5} more" if len(small) > 5 else ""
        raise MFMError(
            "E_CONFIG",
            f"{len(small)} of {len(files)} preprocessed volumes are smaller than the {'x'.join(map(str, smallest))} "
            f"voxels that this pretext task needs. Lower pretext.crop_size, or leave these scans out:{shown}{more}",
        )
