"""A fold in the form the engine trains, with nnU-Net's loaders, log and checkpoints."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mfm_nnunet.device import default_workers
from mfm_nnunet.engine.engine import Pictures
from mfm_nnunet.files import report_full_disk, to_plain
from mfm_nnunet.finetune import groups
from mfm_nnunet.finetune.loading import Batch, SeededBatches, make_loaders, read_batches, seed_everything, seed_of
from mfm_nnunet.models.transfer import unwrapped

if TYPE_CHECKING:
    from mfm_nnunet.finetune.trainer import MFMTrainer

SECONDS_BETWEEN_PLOTS = 300.0


class FoldRun:
    """The :class:`mfm_nnunet.engine.engine.Run` of a trainer. Its state is saved at the end of each epoch."""

    def __init__(self, trainer: MFMTrainer) -> None:
        self.settings = trainer.settings
        self.device = trainer.device
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
        for loader, (name, per_epoch, workers) in zip(make_loaders(trainer), parts):
            source = SeededBatches(loader, trainer.block.seed, f"{name} {trainer.local_rank}")
            first, last = epoch * per_epoch, self.settings.epochs * per_epoch
            streams.append(read_batches(source, first, last, workers, self.device.type == "cuda"))
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
        trainer.optimisation.frozen = groups.freeze(unwrapped(trainer.network), trained, trainer.is_ddp)

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
        folder, is_last = Path(trainer.output_folder), epoch + 1 == self.settings.epochs
        if trainer._best_ema is None or ema > trainer._best_ema:
            trainer._best_ema = ema
            lines.append(f"new best EMA pseudo Dice: {ema:.4f}")
            trainer.save_checkpoint(str(folder / "checkpoint_best.pth"))
        # Saved after 'best', so that a resumed run has the best value.
        trainer.save_checkpoint(str(folder / f"checkpoint_{'final' if is_last else 'latest'}.pth"))
        if trainer.local_rank == 0:
            if is_last:
                (folder / "checkpoint_latest.pth").unlink(missing_ok=True)
            # A picture takes more than a second, as long as an epoch on small data.
            if is_last or time.monotonic() - self._last_plot > SECONDS_BETWEEN_PLOTS:
                self._last_plot = time.monotonic()
                with report_full_disk(folder / "progress.png"):
                    logger.plot_progress_png(trainer.output_folder)
        for line in lines:
            trainer.print_to_log_file(line, also_print_to_console=False)
        trainer.current_epoch = epoch + 1
        return lines

    def save_early(self) -> str:
        """Save nothing: nnU-Net's checkpoints contain whole epochs."""
        if not self._trainer.current_epoch:
            return "no epoch was finished, so nothing is saved. Start it again."
        return f"all finished epochs are saved in {self._trainer.output_folder}. Continue with --c."

    def name_cases(self, step: int, batch: Batch) -> Iterable[str]:
        """Return the names of the cases in a batch."""
        return batch.get("keys", ())
