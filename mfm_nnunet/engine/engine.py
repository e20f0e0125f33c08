"""The only pretraining loop: step, precision, clipping, logging, saving, resuming, stopping, several GPUs.

It knows :class:`PretextTask`, never a concrete task. Everything random is a pure function of (seed, step), so a run
that was killed and continued ends in the same weights, bit for bit on the CPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mfm_nnunet import checkpoint
from mfm_nnunet.data.crops import CropStream, batches
from mfm_nnunet.device import autocast
from mfm_nnunet.engine.distributed import ALONE, World, any_true, mean
from mfm_nnunet.engine.optim import SMALLEST_LOSS_SCALE, WeightAverage, learning_rate_factor, make_optimizer
from mfm_nnunet.engine.probe import Probe, in_words, others_waiting
from mfm_nnunet.engine.state import RunState, load_state, save_state
from mfm_nnunet.errors import MFMError, StoppedError, is_out_of_memory
from mfm_nnunet.models.precision import require_sound_bf16, warn_of_slow_bf16
from mfm_nnunet.processes import StopFlag, name_of, stop_on_signal
from mfm_nnunet.reports import progress as reports
from mfm_nnunet.settings import PretrainSettings, resolved_warmup
from mfm_nnunet.tasks.base import PretextTask, TaskOutput

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What a run is made of besides its task: settings, data, place and what its checkpoint says about itself."""

    settings: PretrainSettings
    training: CropStream
    validation: CropStream
    folder: Path
    device: torch.device
    description: dict[str, Any]
    """The ``mfm`` entry of the checkpoint (plans, task, corpus without subjects); plain values."""
    seed: int = 0
    num_workers: int = 0
    world: World = ALONE
    probe: Probe | None = None


class Pretrainer:
    """Pretrains one task; ``run`` is the only public method."""

    def __init__(self, task: PretextTask, run: Run) -> None:
        """Raises MFMError (E_CONFIG) when activations cannot be computed again, or bf16 cannot be had, as asked for."""
        self._run = run
        self._settings = run.settings
        self._task = task.to(run.device)
        if run.settings.activation_checkpointing:
            task.backbone.recompute_activations()
        self._optimizer = make_optimizer(
            [parameter for parameter in task.parameters() if parameter.requires_grad],
            run.settings.optimizer,
            run.settings.learning_rate,
            run.settings.weight_decay,
        )
        self._dtype = _autocast_dtype(run.settings.precision, run.device)
        if self._dtype is torch.bfloat16:
            image = run.training[0]["image"]
            size = image.shape[-len(task.backbone.patch_size) :]
            require_sound_bf16(task.backbone.network, size, run.device, "pretrain.precision")
            warn_of_slow_bf16(run.device, "pretrain.precision")
        self._scaler = torch.amp.GradScaler(run.device.type, enabled=self._dtype is torch.float16)
        self._average = WeightAverage(task, run.settings.ema_decay) if run.settings.ema_decay is not None else None
        self._state = RunState()
        self._module: nn.Module = self._task
        if run.world.size > 1:
            ids = [run.device.index] if run.device.type == "cuda" else None
            self._module = nn.parallel.DistributedDataParallel(self._task, device_ids=ids)

    def run(self, continue_training: bool = False) -> Path:
        """Train to the end; returns the final checkpoint.

        Raises StoppedError after a clean save when a signal came, MFMError (E_CONFIG, E_NOT_FOUND, E_MODEL_CORRUPT)
        when the run cannot be continued, and FloatingPointError on a non-finite loss, before the update.
        """
        if continue_training:
            self._load()
        if self._settings.compile:
            self._compile()
        with stop_on_signal("this step, or the validation of this epoch") as stop:
            self._train(stop)
        return self._finish()

    @property
    def _total_steps(self) -> int:
        return self._settings.epochs * self._settings.iterations_per_epoch

    def _train(self, stop: StopFlag) -> None:
        run, state, per_epoch = self._run, self._state, self._settings.iterations_per_epoch
        progress = reports.Progress(self._total_steps, state.step, is_silent=not run.world.is_main)
        last_plot = -math.inf
        stream = batches(
            run.training, self._settings.batch_size, state.step, self._total_steps, run.num_workers,
            run.world.rank, run.world.size, pin=run.device.type == "cuda",
        )  # fmt: skip
        while state.step < self._total_steps:
            start = time.monotonic()
            while True:
                state.loss_sum += self._step(next(stream))
                state.loss_count += 1
                state.step += 1
                epoch, in_epoch = divmod(state.step - 1, per_epoch)
                where = f"epoch {epoch + 1}/{self._settings.epochs}  step {in_epoch + 1}/{per_epoch}"
                progress.step(state.step, where, state.loss_sum / state.loss_count)
                if in_epoch + 1 == per_epoch or any_true(stop.exit_code is not None, run.world, run.device):
                    break
            state.epoch_seconds += time.monotonic() - start
            if in_epoch + 1 < per_epoch:
                self._stop(stop)
            self._end_epoch(epoch, progress)
            if run.world.is_main:
                is_last = state.step == self._total_steps
                if is_last or time.monotonic() - last_plot > reports.SECONDS_BETWEEN_PLOTS:
                    last_plot = time.monotonic()
                    reports.plot_progress(state.history, run.folder / "progress.png", run.folder.name)
            if any_true(stop.exit_code is not None, run.world, run.device) and state.step < self._total_steps:
                self._stop(stop)

    def _step(self, batch: dict[str, torch.Tensor]) -> float:
        """One optimiser step; returns the loss, averaged over all processes."""
        run, step = self._run, self._state.step
        epoch = step / self._settings.iterations_per_epoch
        warmup = resolved_warmup(self._settings.warmup_epochs, self._settings.epochs)
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * learning_rate_factor(epoch, self._settings.epochs, warmup)
        _seed_step(run.seed, step, run.world.rank)
        self._module.train()
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._backward(batch)
        self._scaler.unscale_(self._optimizer)
        norm = nn.utils.clip_grad_norm_(self._task.parameters(), self._settings.gradient_clip).item()
        if not self._scaler.is_enabled():  # with fp16 the scaler skips such a step and lowers its scale
            self._require_finite(norm, "gradient")
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._scaler.get_scale() < SMALLEST_LOSS_SCALE:  # the steps skipped last were too many
            self._require_finite(norm, "gradient")
        self._task.after_step((step + 1) / self._total_steps)
        if self._average is not None:
            self._average.update(step)
        return loss

    def _backward(self, batch: dict[str, torch.Tensor]) -> float:
        """Add up the gradients of the batch's parts; returns the mean of their losses over all processes."""
        parts, total = self._parts(batch), 0.0
        for number, part in enumerate(parts, start=1):
            with self._gradients_kept_here(number < len(parts)):
                output = self._forward(part)
                loss = mean(output.loss.detach().float(), self._run.world).item()
                self._require_finite(loss, "loss")
                self._scaler.scale(output.loss / len(parts)).backward()
            total += loss
        return total / len(parts)

    def _parts(self, batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """The batch of this process in ``accumulation`` parts of equally many items."""
        pieces = {name: tensor.chunk(self._settings.accumulation) for name, tensor in batch.items()}
        return [dict(zip(pieces, tensors)) for tensors in zip(*pieces.values())]

    def _gradients_kept_here(self, is_wanted: bool) -> contextlib.AbstractContextManager:
        """Processes exchange gradients once per step, with those of the last part."""
        is_shared = isinstance(self._module, nn.parallel.DistributedDataParallel)
        return self._module.no_sync() if is_wanted and is_shared else contextlib.nullcontext()  # type: ignore[operator]

    def _forward(self, batch: dict[str, torch.Tensor], module: nn.Module | None = None) -> TaskOutput:
        batch = {name: tensor.to(self._run.device, non_blocking=True) for name, tensor in batch.items()}
        with autocast(self._run.device, self._dtype):
            return (module or self._module)(batch)

    def _require_finite(self, value: float, what: str) -> None:
        if any_true(not math.isfinite(value), self._run.world, self._run.device):
            size = self._settings.batch_size
            items = range(self._state.step * size, (self._state.step + 1) * size)
            cases = sorted({name for item in items for name in self._run.training.case_names(item)})
            raise FloatingPointError(
                f"the {what} became non-finite at step {self._state.step} before the update; the weights saved last "
                f"are good. Cases of the batch: {', '.join(cases)}. Check these images, or lower "
                f"pretrain.learning_rate ({self._settings.learning_rate})."
            )

    @torch.no_grad()
    def _validate(self) -> tuple[dict[str, float], Mapping[str, torch.Tensor] | None]:
        """Loss and metrics on the held-out subjects, and pictures: the same items every epoch, so epochs compare."""
        run = self._run
        self._module.eval()
        _seed_step(run.seed, -1, run.world.rank)
        values: dict[str, list[torch.Tensor]] = {}
        pictures = None
        for part in (part for batch in self._validation_batches() for part in self._parts(batch)):
            output = self._forward(part)
            for name, value in {"loss": output.loss, **output.metrics}.items():
                values.setdefault(f"validation_{name}", []).append(value.detach().float())
            pictures = pictures or output.pictures
        return {name: mean(torch.stack(all_).mean(), run.world).item() for name, all_ in values.items()}, pictures

    def _averaged(self) -> contextlib.AbstractContextManager:
        """With an average of the weights, the task has it inside: to be validated and shipped."""
        return self._average.in_place() if self._average is not None else contextlib.nullcontext()

    def _validation_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        run, count = self._run, max(1, self._settings.validation_iterations)
        return batches(
            run.validation, self._settings.batch_size, 0, count, run.num_workers, run.world.rank, run.world.size,
            pin=run.device.type == "cuda",
        )  # fmt: skip

    def _end_epoch(self, epoch: int, progress: reports.Progress) -> None:
        """Validate, append to the history, save the state, then write what is derived from it."""
        state, folder = self._state, self._run.folder
        start = time.monotonic()
        with self._averaged():
            validation, pictures = self._validate()
        row = {
            "epoch": epoch,
            "train_loss": state.loss_sum / state.loss_count,
            "validation_loss": validation["validation_loss"],
            "learning_rate": self._optimizer.param_groups[0]["lr"],
            **validation,
            "seconds": round(state.epoch_seconds + time.monotonic() - start, 3),
        }
        row |= self._probed(epoch)
        state.history.append(row)
        state.loss_sum, state.loss_count, state.epoch_seconds = 0.0, 0, 0.0
        if not self._run.world.is_main:
            return
        self._save()
        reports.write_log(state.history, folder / "log.jsonl")
        if pictures:
            volumes = {name: volume.detach().float().cpu().numpy() for name, volume in pictures.items()}
            title = f"{folder.name}, epoch {epoch + 1}"
            reports.plot_examples(volumes, folder / "examples.png", title)
        progress.line(
            f"epoch {epoch + 1}/{self._settings.epochs} done  training loss {row['train_loss']:.4f}  "
            f"validation loss {row['validation_loss']:.4f}  {row['seconds']:.1f} s"
        )
        if "probe_dice" in row:
            progress.line(in_words(row))

    def _probed(self, epoch: int) -> dict[str, float | None]:
        """What a probe of the weights that would be shipped adds to the row of an epoch; nothing where none is due."""
        probe, run = self._run.probe, self._run
        if probe is None or not probe.is_due(epoch, self._settings.epochs):
            return {}
        with others_waiting(run.world), self._averaged():
            return probe.measure(self._task.backbone, run.device, self._dtype) if run.world.is_main else {}

    def _save(self) -> None:
        modules = {
            "task": checkpoint.cpu_weights(self._task.state_dict()),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }
        if self._average is not None:
            modules["average"] = checkpoint.cpu_weights(self._average.state_dict())
        save_state(self._run.folder, self._state, modules, self._resume_settings())
        self._save_weights("checkpoint_latest.pth")

    def _save_weights(self, name: str) -> Path:
        backbone = self._task.backbone
        file = self._run.folder / name
        epoch = self._state.step // self._settings.iterations_per_epoch
        description = {**self._run.description, "epoch": epoch}
        with self._averaged():
            state = backbone.network.state_dict() if self._task.trains_decoder else backbone.encoder_state()
            weights = checkpoint.cpu_weights(state)
            checkpoint.save({"network_weights": weights, "mfm": description}, file)
        return file

    def _compile(self) -> None:
        run, step, size = self._run, self._state.step, self._settings.batch_size
        batch = next(batches(run.training, size, step, step + 1, 0, run.world.rank, run.world.size))
        _compile_network(self._task, lambda: self._forward(self._parts(batch)[0], self._task).loss)

    def _load(self) -> None:
        self._state, modules = load_state(self._run.folder, self._resume_settings())
        try:
            self._task.load_state_dict(modules["task"])
            self._optimizer.load_state_dict(modules["optimizer"])
            if modules["scaler"]:  # empty where the run had no loss scaling so far, on another device
                self._scaler.load_state_dict(modules["scaler"])
            if self._average is not None:
                self._average.load_state_dict(modules["average"])
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:200]
            raise MFMError(
                "E_MODEL_CORRUPT",
                f"{self._run.folder}: the saved state is not of this network and task ({reason}). Put the resume.pth "
                "of this run back, or move the folder away and start anew.",
            ) from error
        logger.info("continuing at step %d of %d", self._state.step, self._total_steps)

    def _resume_settings(self) -> dict[str, Any]:
        """What a continued run must agree with; the number of workers and the device are free."""
        about = self._run.description
        described = {name: about[name] for name in ("pretext", "pretext_config", "corpus", "pretrain")}
        plan = hashlib.sha256(json.dumps(about["plans"]["configurations"], sort_keys=True).encode()).hexdigest()
        others = {"seed": self._run.seed, "world_size": self._run.world.size, "plan_sha256": plan}
        if self._run.probe is not None:
            others["probe"] = self._run.probe.description()
        return json.loads(json.dumps({**described, **others}))

    def _stop(self, stop: StopFlag) -> None:
        if self._run.world.is_main:
            self._save()
        exit_code = stop.exit_code or 143
        where = f"saved at step {self._state.step} of {self._total_steps}"
        raise StoppedError(exit_code, f"stopped by {name_of(exit_code - 128)}; {where}. Continue with --c.")

    def _finish(self) -> Path:
        final = self._run.folder / "checkpoint_final.pth"
        if self._run.world.is_main:
            self._save_weights(final.name)
            (self._run.folder / "checkpoint_latest.pth").unlink(missing_ok=True)
            (self._run.folder / "resume_previous.pth").unlink(missing_ok=True)
        return final


def _seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout and drop path of a step depend on (seed, step, rank) only."""
    torch.manual_seed((seed * 1_000_003 + (step + 1) * 65_537 + rank) % (1 << 63))


def _autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    if precision == "auto":
        if device.type != "cuda":
            return None
        # Older GPUs emulate bf16, which is slower than float32.
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _compile_network(task: PretextTask, loss: Callable[[], torch.Tensor]) -> None:
    """Compile the network's blocks and run ``loss``, a training pass of ``task``, through them, forward and backward.

    Raises MFMError (E_CONFIG) when the compiler is missing or cannot compile this network or task.
    """
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
