"""The only training loop: step, precision, clipping, averaged weights, stopping, several processes.

It trains any :class:`Task`. A :class:`Run` supplies the data, rates and seeds, and writes the results. Everything
random is a pure function of (seed, step or epoch), so a run that was killed and resumed ends in the same weights, bit
for bit on the CPU.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mfm_nnunet import checkpoint
from mfm_nnunet.device import autocast, memory_in_use
from mfm_nnunet.engine.optim import SMALLEST_LOSS_SCALE, WeightAverage
from mfm_nnunet.engine.state import RunState
from mfm_nnunet.errors import StoppedError
from mfm_nnunet.processes import World, any_true, gather, largest, mean
from mfm_nnunet.reports.progress import say, track
from mfm_nnunet.reports.tracking import Record, open_tracker
from mfm_nnunet.settings import PretrainSettings, TrainingSettings
from mfm_nnunet.signals import StopFlag, name_of, stop_on_signal
from mfm_nnunet.tasks.base import Task, TaskOutput

TIMED_STEPS = 3
"""First steps of a run, from which its time and memory are told."""
VALIDATION_COST = 1 / 3
"""Time of a validation batch as a share of a training step: the forward pass alone."""
Batch = dict[str, Any]
"""Tensors, or lists of them. Other values are passed through unchanged."""
Pictures = Mapping[str, Tensor] | None


class Run(Protocol):
    """The data, rates and records of a training run, in the order in which the engine asks for them.

    ``end_epoch`` records whole epochs only; ``save_early`` may save the steps after the last one.
    """

    @property
    def settings(self) -> TrainingSettings:
        """Return the settings of the run."""

    device: torch.device
    folder: Path
    """Folder of the run's files."""

    def training_batches(self, first_step: int) -> Iterator[Batch]:
        """Return the batches of all steps from ``first_step`` on."""

    def begin_epoch(self, epoch: int) -> None:
        """Prepare an epoch, including a resumed one. The task is in training mode."""

    def begin_step(self, step: int) -> None:
        """Set the learning rates and seed the random numbers of the step."""

    def validation_batches(self, epoch: int) -> Iterable[Batch]:
        """Return the batches that validate an epoch."""

    def end_epoch(self, epoch: int, results: dict[str, Any], pictures: Pictures) -> list[str]:
        """Record and save a finished epoch, and return lines for the console."""

    def save_early(self) -> str:
        """Save what can be saved before stopping within an epoch. Return what is saved and what to do next."""

    def name_cases(self, step: int, batch: Batch) -> Iterable[str]:
        """Return the names of the cases in the batch of a step."""


@dataclass
class Optimisation:
    """The parts of an optimisation step: optimizer, loss scaling, precision, averaging, accumulation and freezing."""

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    dtype: torch.dtype | None = None
    """Precision of the forward pass; None is float32."""
    average: WeightAverage | None = None
    accumulation: int = 1
    """Number of parts of a batch, computed one after the other."""
    frozen: Sequence[nn.Parameter] = ()
    """Frozen parameters. DistributedDataParallel computes their gradients, which are dropped."""

    def averaged(self) -> contextlib.AbstractContextManager:
        """Put the averaged weights, if any, into the task: they are the ones validated and shipped."""
        return self.average.in_place() if self.average is not None else contextlib.nullcontext()

    def state_dicts(self, task: Task) -> dict[str, Any]:
        """Return the state dicts of the task and of everything here that a step changes, on the CPU."""
        found = {
            "task": checkpoint.cpu_weights(task.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        if self.average is not None:
            found["average"] = checkpoint.cpu_weights(self.average.state_dict())
        return found

    def load_state_dicts(self, task: Task, found: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dicts` returned."""
        task.load_state_dict(found["task"])
        self.optimizer.load_state_dict(found["optimizer"])
        if found["scaler"]:  # empty if the run had no loss scaling so far, e.g. on another device
            self.scaler.load_state_dict(found["scaler"])
        if self.average is not None:
            self.average.load_state_dict(found["average"])


class Engine:
    """Train ``task`` with the data of ``run`` and the ``optimisation``, starting from ``state``.

    ``module`` is the callable: the task itself (default), or the task wrapped in DistributedDataParallel.
    """

    def __init__(
        self,
        task: Task,
        run: Run,
        optimisation: Optimisation,
        world: World,
        state: RunState | None = None,
        module: nn.Module | None = None,
    ) -> None:
        self.state = state or RunState()
        self._task, self._run, self._optimisation, self._world = task, run, optimisation, world
        self._module = module if module is not None else task
        self._settings = run.settings
        self._section = "pretrain" if isinstance(run.settings, PretrainSettings) else "finetune"
        self.total_steps = run.settings.epochs * run.settings.iterations_per_epoch

    def train(self) -> None:
        """Train to the end.

        Raises StoppedError between two steps after a stop signal, and FloatingPointError before an update with a loss
        or gradient that is not finite.
        """
        run, state, settings = self._run, self.state, self._settings
        first, per_epoch, seconds = state.step, settings.iterations_per_epoch, list[float]()
        stream = run.training_batches(first)
        name, silent = "pretraining" if self._section == "pretrain" else "training", not self._world.is_main
        with (
            stop_on_signal("this step, or the validation of this epoch") as stop,
            track(name, self.total_steps, "steps", first, is_silent=silent) as advance,
            self._open_tracker() as record,
        ):
            for step in range(first, self.total_steps):
                start = time.monotonic()
                epoch, in_epoch = divmod(step, per_epoch)
                state.loss_sum += self._next_step(stream, step, is_first=step == first)
                state.loss_count += 1
                state.step = step + 1
                seconds.append(time.monotonic() - start)
                state.epoch_seconds += seconds[-1]
                if len(seconds) == TIMED_STEPS and self._world.is_main:
                    say(self._describe_cost(seconds))
                advance(f"epoch {epoch + 1}/{settings.epochs}, loss {state.loss_sum / state.loss_count:.4f}")
                if in_epoch + 1 == per_epoch:
                    self._end_epoch(epoch, record)
                if state.step < self.total_steps:
                    self._stop_if_asked(stop)

    def rehearse(self) -> None:
        """Take the first steps and say how long the run takes and how much memory. Nothing is validated or saved."""
        first, seconds = self.state.step, []
        stream = self._run.training_batches(first)
        for step in range(first, min(first + TIMED_STEPS, self.total_steps)):
            start = time.monotonic()
            self._next_step(stream, step, is_first=step == first)
            seconds.append(time.monotonic() - start)
        if seconds:
            say(self._describe_cost(seconds))

    def _next_step(self, stream: Iterator[Batch], step: int, is_first: bool) -> float:
        """Take the next step of the run, on the next batch of ``stream``, and return its loss."""
        epoch, in_epoch = divmod(step, self._settings.iterations_per_epoch)
        if in_epoch == 0 or is_first:
            self._module.train()
            self._run.begin_epoch(epoch)
        batch = next(stream)
        self._run.begin_step(step)
        return self.step(batch, step)

    def _describe_cost(self, seconds: Sequence[float]) -> str:
        """Return a line on the time and memory of the steps left, from the seconds of some steps."""
        settings, each = self._settings, statistics.median(seconds)
        validation = VALIDATION_COST * settings.validation_iterations / settings.iterations_per_epoch
        hours = each * (1 + validation) * (self.total_steps - self.state.step) / 3600
        used, available = memory_in_use(self._run.device)
        return (
            f"{len(seconds)} steps timed on {self._run.device}: {each:.2f} s each, so {self.total_steps} steps in "
            f"{settings.epochs} epochs need about {f'{hours:.1f} hours' if hours >= 1 else f'{hours * 60:.1f} minutes'}"
            f" from here; memory so far {used / 1e9:.1f} of {available / 1e9:.1f} GB"
        )

    def step(self, batch: Batch, number: int) -> float:
        """Take optimisation step ``number`` (0-based) and return its loss, the mean over all processes.

        Raises FloatingPointError before an update with a loss or gradient that is not finite. With loss scaling, such a
        step is skipped and the scale lowered, until a smaller scale cannot help.
        """
        how, losses = self._optimisation, []
        how.optimizer.zero_grad(set_to_none=True)
        parts = split(batch, how.accumulation)
        for index, part in enumerate(parts, start=1):
            with self._keep_gradients_here(index < len(parts)):
                output = self.forward(part)
                losses.append(mean(output.loss.detach().float(), self._world))
                if not how.scaler.is_enabled():
                    self._require_finite(losses[-1], "loss", number, batch)
                how.scaler.scale(output.loss / len(parts)).backward()
        for parameter in how.frozen:
            parameter.grad = None
        how.scaler.unscale_(how.optimizer)
        norm = nn.utils.clip_grad_norm_(self._task.parameters(), self._settings.gradient_clip)
        if not how.scaler.is_enabled():
            self._require_finite(norm, "gradient", number, batch)
        how.scaler.step(how.optimizer)
        how.scaler.update()
        if how.scaler.get_scale() < SMALLEST_LOSS_SCALE:  # too many steps in a row were skipped
            self._require_finite(norm, "gradient", number, batch)
        self._task.after_step((number + 1) / self.total_steps)
        if how.average is not None:
            how.average.update(number)
        return sum(loss.item() for loss in losses) / len(losses)

    def forward(self, batch: Batch, module: nn.Module | None = None) -> TaskOutput:
        """Run the forward pass on a batch, or a part of one, on the run's device and in its precision."""
        with autocast(self._run.device, self._optimisation.dtype):
            return (module or self._module)(_to_device(batch, self._run.device))

    @torch.no_grad()
    def validate(self, epoch: int) -> tuple[dict[str, Any], Pictures]:
        """Return the task's summary of an epoch's validation batches, and the first pictures."""
        self._module.eval()
        values: dict[str, list[Tensor]] = {}
        pictures = None
        title, total = f"validating epoch {epoch + 1}", self._settings.validation_iterations
        shown = track(title, total, "batches", is_silent=not self._world.is_main)
        with self._optimisation.averaged(), shown as advance:
            for batch in self._run.validation_batches(epoch):
                for part in split(batch, self._optimisation.accumulation):
                    output = self.forward(part)
                    for name, value in {"loss": output.loss, **output.metrics}.items():
                        values.setdefault(name, []).append(value.detach().float())
                    pictures = pictures or output.pictures
                advance()
        gathered = {name: gather(torch.stack(all_), self._world).cpu() for name, all_ in values.items()}
        return self._task.summarise(gathered), pictures

    def _open_tracker(self) -> contextlib.AbstractContextManager[Record]:
        if not self._world.is_main:
            return contextlib.nullcontext(lambda epoch, results: None)
        return open_tracker(self._run.folder, self.state.step // self._settings.iterations_per_epoch)

    def _end_epoch(self, epoch: int, record: Record) -> None:
        state, start = self.state, time.monotonic()
        summary, pictures = self.validate(epoch)
        results = {"train_loss": state.loss_sum / state.loss_count}
        results |= {f"validation_{name}": value for name, value in summary.items()}
        results["seconds"] = round(state.epoch_seconds + time.monotonic() - start, 3)
        state.loss_sum, state.loss_count, state.epoch_seconds = 0.0, 0, 0.0
        record(epoch, results)
        for line in self._run.end_epoch(epoch, results, pictures):
            if self._world.is_main:
                say(line)

    def _stop_if_asked(self, stop: StopFlag) -> None:
        """Stop all processes after the same step; otherwise one would wait for the others."""
        exit_code = largest(stop.exit_code or 0, self._world, self._run.device)
        if exit_code:
            raise StoppedError(exit_code, f"stopped by {name_of(exit_code - 128)}; {self._run.save_early()}")

    def _keep_gradients_here(self, is_wanted: bool) -> contextlib.AbstractContextManager:
        """Skip the gradient exchange for all parts but the last: processes exchange gradients once per step."""
        is_shared = isinstance(self._module, nn.parallel.DistributedDataParallel)
        return self._module.no_sync() if is_wanted and is_shared else contextlib.nullcontext()  # type: ignore[operator]

    def _require_finite(self, value: Tensor, what: str, step: int, batch: Batch) -> None:
        if any_true(not math.isfinite(value.item()), self._world, self._run.device):
            cases = sorted({str(name) for name in self._run.name_cases(step, batch)})
            raise FloatingPointError(
                f"the {what} became non-finite at step {step} before the update; the weights saved last are good. "
                f"Cases of the batch: {', '.join(cases)}. Check these images, or lower {self._section}.learning_rate."
            )


def split(batch: Batch, accumulation: int) -> list[Batch]:
    """Split a batch into parts of equal size."""
    if accumulation == 1:
        return [batch]
    pieces = {name: tensor.chunk(accumulation) for name, tensor in batch.items()}
    return [dict(zip(pieces, tensors)) for tensors in zip(*pieces.values())]


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: _to_device(item, device) for name, item in value.items()}
    return [_to_device(item, device) for item in value] if isinstance(value, list) else value
