"""A fold in the form the engine trains, with nnU-Net's loaders and log, and the content of its checkpoints."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from mfm_nnunet.checkpoint import cpu_weights
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.device import default_workers
from mfm_nnunet.engine.engine import Optimisation, Pictures
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import report_full_disk, to_plain
from mfm_nnunet.finetune import groups, semi, watch
from mfm_nnunet.finetune.augmentation import TightLoader
from mfm_nnunet.finetune.loading import Batch, SeededBatches, make_loaders, read_batches, seed_everything, seed_of
from mfm_nnunet.finetune.mixing import mix_batches
from mfm_nnunet.finetune.student import finish_rates
from mfm_nnunet.finetune.universal import UnionLoader
from mfm_nnunet.models.transfer import unwrapped
from mfm_nnunet.reports.progress import write_log
from mfm_nnunet.settings import FinetuneSettings

if TYPE_CHECKING:
    from mfm_nnunet.finetune.trainer import MFMTrainer

SECONDS_BETWEEN_PLOTS = 300.0


class FoldRun:
    """The :class:`mfm_nnunet.engine.engine.Run` of a trainer. Its state is saved at the end of each epoch."""

    def __init__(self, trainer: MFMTrainer) -> None:
        self.settings = trainer.settings
        self.device = trainer.device
        self.folder = Path(trainer.output_folder)
        self._trainer = trainer
        self._validation: Iterator[Batch] = iter(())
        self._last_plot = -SECONDS_BETWEEN_PLOTS
        self._trained: set[str] | None = None

    def training_batches(self, first_step: int) -> Iterator[Batch]:
        """Start the readers of both streams and return the batches of all steps from ``first_step`` on."""
        trainer = self._trainer
        world_size = torch.distributed.get_world_size() if trainer.is_ddp else 1
        wanted = trainer.block.num_workers
        num_workers = default_workers(world_size) if wanted is None else wanted
        trainer.print_to_log_file(f"{num_workers} background processes read and augment")
        epoch, streams = first_step // self.settings.iterations_per_epoch, []
        parts = (
            ("training", self.settings.iterations_per_epoch, num_workers),
            ("validation", self.settings.validation_iterations, (num_workers + 1) // 2),
        )
        is_mixed, union = self.settings.mix != "none", trainer.union
        make = TightLoader if union is None else partial(UnionLoader, union.sampling)
        for loader, (name, per_epoch, workers) in zip(make_loaders(trainer, is_mixed, make), parts):
            source = SeededBatches(loader, trainer.block.seed, f"{name} {trainer.local_rank}")
            if is_mixed and name == "training":
                source = mix_batches(source, trainer)
            first, last = epoch * per_epoch, self.settings.epochs * per_epoch
            streams.append(read_batches(source, first, last, workers, self.device.type == "cuda"))
        if trainer.block.semi.method is not None:
            streams = list(semi.join(trainer, streams[0], streams[1], first_step, num_workers))
        self._validation = streams[1]
        return streams[0]

    def validation_batches(self, epoch: int) -> Iterator[Batch]:
        """Return the next validation batches; each epoch has its own."""
        return itertools.islice(self._validation, self.settings.validation_iterations)

    def begin_epoch(self, epoch: int) -> None:
        """Set rates, freeze parameters, and seed the random numbers of training (drop path, dropout) from the epoch."""
        trainer = self._trainer
        seed_everything(seed_of(trainer.block.seed, f"epoch {trainer.local_rank}", epoch))
        trainer.lr_scheduler.step(epoch)
        finish_rates(trainer, epoch)
        rate = trainer.optimizer.param_groups[0]["lr"]
        trainer.logger.log("epoch_start_timestamps", time.time(), epoch)
        trainer.logger.log("lrs", rate, epoch)
        trainer.print_to_log_file(f"Epoch {epoch}, learning rate {rate:.5g}", also_print_to_console=False)
        trained = trainer.lr_scheduler.trained_names(epoch)
        if hasattr(trainer.network, "_orig_mod") and self._trained is not None and trained != self._trained:
            # Compiled code may miss that parameters were unfrozen, and would give them no gradients
            # (https://github.com/pytorch/pytorch/issues/139476).
            torch.compiler.reset()
        self._trained = trained
        is_pretrained = trainer.new_weights is not None
        trainer.optimisation.frozen = groups.freeze(unwrapped(trainer.network), trained, trainer.is_ddp, is_pretrained)

    def begin_step(self, step: int) -> None:
        """Do nothing: rates and seeds are set at each epoch."""

    def end_epoch(self, epoch: int, results: dict[str, Any], pictures: Pictures) -> list[str]:
        """Log the epoch, save ``checkpoint_best`` like nnU-Net, and ``checkpoint_latest`` or ``checkpoint_final``."""
        trainer, logger, dice = self._trainer, self._trainer.logger, results["validation_dice"]
        logger.log("train_losses", results["train_loss"], epoch)
        logger.log("mean_fg_dice", np.nanmean(dice), epoch)
        logger.log("dice_per_class_or_region", dice, epoch)
        logger.log("val_losses", results["validation_loss"], epoch)
        logger.log("epoch_end_timestamps", time.time(), epoch)
        # Plain floats, as a resumed run reads them: NumPy's float32 would round nnU-Net's moving average of the Dice.
        logger.load_checkpoint(to_plain(logger.get_checkpoint()))
        ema = float(logger.get_checkpoint()["ema_fg_dice"][-1])
        left = timedelta(seconds=round(results["seconds"] * (self.settings.epochs - 1 - epoch)))
        lines = [
            f"epoch {epoch + 1}/{self.settings.epochs} done  training loss {results['train_loss']:.4f}  validation "
            f"loss {results['validation_loss']:.4f}  pseudo Dice {np.round(dice, 4).tolist()}  "
            f"{results['seconds']:.1f} s  ETA {left}"
        ]
        lines += self._watch(epoch, results)
        lines += trainer.task.describe_epoch()
        folder, is_last = Path(trainer.output_folder), epoch + 1 == self.settings.epochs
        if trainer._best_ema is None or ema > trainer._best_ema:
            trainer._best_ema = ema
            lines.append(f"new best EMA pseudo Dice: {ema:.4f}")
            trainer.save_checkpoint(str(folder / "checkpoint_best.pth"))
        # Saved after 'best', so that a resumed run has the best value.
        trainer.save_checkpoint(str(folder / f"checkpoint_{'final' if is_last else 'latest'}.pth"))
        if trainer.local_rank == 0:
            write_log(self._history(), folder / "log.jsonl")
            if is_last:
                (folder / "checkpoint_latest.pth").unlink(missing_ok=True)
            # A picture takes more than a second, as long as an epoch on small data.
            if is_last or time.monotonic() - self._last_plot > SECONDS_BETWEEN_PLOTS:
                self._last_plot = time.monotonic()
                with report_full_disk(folder / "progress.png"):
                    logger.plot_progress_png(trainer.output_folder)
                    if trainer.watch.history:
                        trainer.watch.draw(folder, pictures)
        for line in lines:
            trainer.print_to_log_file(line, also_print_to_console=False)
        trainer.watch.require_no_collapse(folder)
        trainer.current_epoch = epoch + 1
        return lines

    def _watch(self, epoch: int, results: dict[str, Any]) -> list[str]:
        """Log how the network does on unlabelled images, if there are any; return lines for the console."""
        trainer, per_epoch = self._trainer, self.settings.iterations_per_epoch
        if trainer.block.semi.method is None:
            return []
        weight = semi.weight_at(trainer.block.semi, (epoch + 1) * per_epoch - 1, self.settings.epochs * per_epoch)
        lines = trainer.watch.add(epoch, weight, results)
        if trainer.local_rank == 0:
            write_log(trainer.watch.history, Path(trainer.output_folder) / watch.LOG)
        return lines

    def _history(self) -> list[dict[str, Any]]:
        """Return the epochs of nnU-Net's log as rows, with the pseudo Dice of each label by name."""
        manager, log = self._trainer.label_manager, self._trainer.logger.get_checkpoint()
        outputs = manager.foreground_regions if manager.has_regions else manager.foreground_labels
        by_values = {values: name for name, values in DatasetJson.of(self._trainer.dataset_json).foreground.items()}
        names = [by_values[label if isinstance(label, tuple) else (int(label),)] for label in outputs]
        columns = zip(
            log["train_losses"], log["val_losses"], log["lrs"], log["mean_fg_dice"], log["dice_per_class_or_region"]
        )
        return [
            {"epoch": epoch, "train_loss": train, "validation_loss": validation, "learning_rate": rate,
             "dice_mean": None if mean != mean else mean,
             **{f"dice_{name}": None if dice != dice else dice for name, dice in zip(names, each)}}
            for epoch, (train, validation, rate, mean, each) in enumerate(columns)
        ]  # fmt: skip

    def save_early(self) -> str:
        """Save nothing: nnU-Net's checkpoints contain whole epochs."""
        if not self._trainer.current_epoch:
            return "no epoch was finished, so nothing is saved. Start it again."
        return f"all finished epochs are saved in {self._trainer.output_folder}. Continue with --c."

    def name_cases(self, step: int, batch: Batch) -> Iterable[str]:
        """Return the names of the cases in a batch."""
        return batch.get("keys", ())


# The content of a checkpoint


def ships_other_weights(settings: FinetuneSettings) -> bool:
    """Check if the validated and shipped weights differ from those the optimizer steps."""
    return settings.ema_decay is not None or settings.train == "lora"


def collect_weights(
    network: nn.Module, how: Optimisation, settings: FinetuneSettings
) -> dict[str, dict[str, torch.Tensor]]:
    """Return the weights to ship, plus the trained weights and averages if training uses others.

    ``network`` is unwrapped. A tensor in several of them is stored once in the file.
    """
    with how.averaged():
        states = {"network_weights": groups.merged_state(network)}
    if ships_other_weights(settings):
        states["trained_weights"] = network.state_dict()
    if how.average is not None:
        states["averaged_weights"] = how.average.state_dict()
    flat = cpu_weights({f"{part}/{name}": tensor for part, state in states.items() for name, tensor in state.items()})
    return {part: {name: flat[f"{part}/{name}"] for name in state} for part, state in states.items()}


def require_state(content: Mapping[str, Any], settings: FinetuneSettings, folder: str) -> None:
    """Raise MFMError (E_MODEL_CORRUPT) unless a checkpoint contains the whole state of a run with these settings."""
    wanted = {"network_weights", "optimizer_state", "logging", "_best_ema", "current_epoch", "init_args"}
    wanted |= {"trained_weights"} if ships_other_weights(settings) else set()
    wanted |= {"averaged_weights"} if settings.ema_decay is not None else set()
    missing = wanted - set(content)
    names = names_of_new(content)
    needs_names = settings.schedule == "sawtooth" or settings.train != "all"
    if names is None and settings.checkpoint is not None and needs_names:
        missing.add("mfm.new_weights")
    reason = f"{', '.join(sorted(missing))} missing" if missing else ""
    if not missing and (wrong := _find_wrong_part(content, names)):
        reason = f"{wrong} is damaged"
    if reason:
        raise MFMError(
            "E_MODEL_CORRUPT",
            f"a checkpoint in {folder} does not belong to this run: {reason}. Copy it again, or move the folder away "
            "and train again.",
        )


def names_of_new(content: Mapping[str, Any]) -> Any:
    """Return the names of the parameters that learn first, as listed in a checkpoint; None from scratch."""
    ours = content.get("mfm")
    return ours.get("new_weights") if isinstance(ours, Mapping) else None


def rows_of_watch(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what a run with unlabelled images logged about them; empty for other runs."""
    ours = content.get("mfm")
    return list(ours.get("unlabelled_history", [])) if isinstance(ours, Mapping) else []


def require_same_groups(before: Mapping[str, Any], now: Mapping[str, Any], folder: str) -> None:
    """Raise MFMError (E_CONFIG) unless the groups of two optimizer states have equal sizes."""
    old, new = ([len(group["params"]) for group in state["param_groups"]] for state in (before, now))
    if old != new:
        raise MFMError(
            "E_CONFIG",
            f"{folder} was trained by a version that trained other weights ({sum(old)} tensors in {len(old)} "
            f"groups, here {sum(new)} in {len(new)}), so it cannot be resumed. Use it as it is, or train again under "
            "another plan name.",
        )


def _find_wrong_part(content: Mapping[str, Any], names: Any) -> str:
    """Name a part of a checkpoint that has the wrong type; "" if there is none."""
    tables = ("init_args", "logging", "optimizer_state", "network_weights")
    axes = content.get("inference_allowed_mirroring_axes")
    is_right = {
        **{name: isinstance(content[name], Mapping) for name in tables},
        "current_epoch": type(content["current_epoch"]) is int and content["current_epoch"] >= 0,
        "_best_ema": isinstance(content["_best_ema"], (int, float, type(None))),
        "new_weights": names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names)),
        "inference_allowed_mirroring_axes": axes is None
        or (isinstance(axes, (list, tuple)) and all(axis in (0, 1, 2) for axis in axes)),
    }
    return next((name for name, holds in is_right.items() if not holds), "")
