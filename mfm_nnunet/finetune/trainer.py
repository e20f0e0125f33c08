"""MFMTrainer, the only fine-tuning trainer: nnU-Net's, with settings from the plan and a pretrained start.

All settings come from ``plans["mfm"]``; a stock plan without that block trains with the defaults. A run is a pure
function of the seed: the network starts under it, and every epoch and every batch has a seed of its own. So a run
that was killed and continued ends in the same weights as an unbroken one, bit for bit on the CPU.
"""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from mfm_nnunet import checkpoint
from mfm_nnunet.device import autocast, default_workers
from mfm_nnunet.errors import StoppedError
from mfm_nnunet.finetune import state, validation
from mfm_nnunet.finetune.loading import Batch, SeededBatches, batches, nnunet_loaders, seed_everything, seed_of
from mfm_nnunet.finetune.preprocessed import forget_cases, preprocessed_cases, require_fingerprint, shareable
from mfm_nnunet.finetune.pretrained import transfer_from
from mfm_nnunet.finetune.splits import require_fold
from mfm_nnunet.models.precision import require_sound_bf16
from mfm_nnunet.models.transfer import unwrapped
from mfm_nnunet.optim import learning_rate_factor, make_optimizer
from mfm_nnunet.plans.schema import block_of, resolved_warmup
from mfm_nnunet.stopping import StopFlag

CUDA = torch.device("cuda")
SECONDS_BETWEEN_PLOTS = 300.0


class EpochSchedule:
    """Sets the learning rate as a pure function of the epoch, so it needs no state in checkpoints."""

    def __init__(self, optimizer: torch.optim.Optimizer, peak: float, epochs: int, warmup_epochs: int) -> None:
        self.optimizer = optimizer
        self.peak = peak
        self.epochs = epochs
        self.warmup_epochs = warmup_epochs

    def step(self, epoch: int) -> None:
        """Linear warm-up, then nnU-Net's polynomial decay."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak * learning_rate_factor(epoch, self.epochs, self.warmup_epochs)


class MFMTrainer(nnUNetTrainer):
    """Fine-tunes the network of a plan; ``pretrained_checkpoint`` is set before :meth:`initialize`, None is scratch.

    ``stop_flag`` is set by whoever catches signals; training then ends after the current step with StoppedError.
    """

    pretrained_checkpoint: Path | None = None
    stop_flag: StopFlag | None = None
    _best_ema: float | None

    def __init__(
        self, plans: dict, configuration: str, fold: int | str, dataset_json: dict, device: torch.device = CUDA
    ) -> None:
        block = block_of(plans)
        super().__init__(plans, configuration, fold, shareable(dataset_json), device)
        self.block = block
        self.settings = block.finetune
        self.initial_lr = self.settings.learning_rate
        self.weight_decay = self.settings.weight_decay
        self.num_epochs = self.settings.epochs
        self.num_iterations_per_epoch = self.settings.iterations_per_epoch
        self.num_val_iterations_per_epoch = self.settings.validation_iterations
        self.save_every = 1
        self.autocast_dtype = _autocast_dtype(self.settings.precision, self.device)
        if self.autocast_dtype is not torch.float16:  # only fp16 needs its losses scaled
            self.grad_scaler = None
        self._last_plot = -SECONDS_BETWEEN_PLOTS
        # Two stages have a single output, whose weight nnU-Net sets to zero: the loss would be zero by zero.
        has_pyramid = len(self.configuration_manager.network_arch_init_kwargs.get("strides", ())) > 2
        self.enable_deep_supervision = self.settings.deep_supervision and has_pyramid
        if self.settings.deep_supervision and not has_pyramid:
            self.print_to_log_file("deep supervision is off: this network has no decoder pyramid")

    def initialize(self) -> None:
        """Build the network under the seed, then move the pretrained weights into it.

        Raises MFMError when the checkpoint cannot be read or belongs to another network, or bf16 cannot be had.
        """
        seed_everything(seed_of(self.block.seed, "network", 0))
        super().initialize()
        if self.autocast_dtype is torch.bfloat16:
            patch_size = self.configuration_manager.patch_size
            require_sound_bf16(unwrapped(self.network), patch_size, self.device, "finetune.precision")
        if self.pretrained_checkpoint is not None:
            report = transfer_from(self.pretrained_checkpoint, self.network, Path(self.output_folder))
            self.print_to_log_file(f"weights from {self.pretrained_checkpoint.name}:\n{report.summary()}")
            self.print_to_log_file(report.details(), also_print_to_console=False)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, EpochSchedule]:
        """One optimizer for all parameters, and the schedule of its learning rate."""
        settings = self.settings
        optimizer = make_optimizer(
            self.network.parameters(), settings.optimizer, settings.learning_rate, settings.weight_decay
        )
        warmup = resolved_warmup(settings.warmup_epochs, settings.epochs)
        return optimizer, EpochSchedule(optimizer, settings.learning_rate, settings.epochs, warmup)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Networks without a decoder pyramid, and runs without deep supervision, stay as they are."""
        if self.enable_deep_supervision:
            decoder: Any = unwrapped(self.network).decoder
            decoder.deep_supervision = enabled

    def do_split(self) -> tuple[list[str], list[str]]:
        """As nnU-Net, with defined folds for few cases; MFMError (E_CONFIG) for a fold that does not exist."""
        cases = preprocessed_cases(Path(self.preprocessed_dataset_folder))
        raw = Path(nnUNet_raw) / self.plans_manager.dataset_name if nnUNet_raw.is_set() else None
        require_fold(self.fold, Path(self.preprocessed_dataset_folder_base), cases, raw)
        return super().do_split()

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Seeded streams of training and validation batches that start at the current epoch."""
        world_size = torch.distributed.get_world_size() if self.is_ddp else 1
        wanted = self.block.num_workers
        num_workers = default_workers(world_size) if wanted is None else wanted
        self.print_to_log_file(f"{num_workers} background processes read and augment")
        parts = (("training", self.num_iterations_per_epoch), ("validation", self.num_val_iterations_per_epoch))
        streams = []
        for loader, (name, per_epoch) in zip(nnunet_loaders(self), parts):
            source = SeededBatches(loader, self.block.seed, f"{name} {self.local_rank}")
            first, last = self.current_epoch * per_epoch, self.num_epochs * per_epoch
            workers = num_workers if name == "training" else (num_workers + 1) // 2
            streams.append(batches(source, first, last, workers, self.device.type == "cuda"))
        return streams[0], streams[1]

    def print_plans(self) -> None:
        """Nothing: the plan is in the model folder, and on the console it would bury the rest."""

    def _save_debug_information(self) -> None:
        """Nothing: stock's debug.json names the computer, its paths and the cases in the model folder."""

    def plot_network_architecture(self) -> None:
        """Nothing: the drawing package that nnU-Net tries is not maintained."""

    def on_train_start(self) -> None:
        """As nnU-Net; MFMError (E_NOT_FOUND) without the fingerprint that goes into the model folder."""
        require_fingerprint(Path(self.preprocessed_dataset_folder_base))
        super().on_train_start()
        if self.local_rank == 0:
            forget_cases(Path(self.output_folder_base) / "dataset_fingerprint.json")

    def on_train_epoch_start(self) -> None:
        """Seed what draws during training (drop path, dropout) from the epoch, so resuming needs no random state."""
        seed_everything(seed_of(self.block.seed, f"epoch {self.local_rank}", self.current_epoch))
        super().on_train_epoch_start()

    def train_step(self, batch: Batch) -> dict[str, np.ndarray]:
        """One gradient step, clipped as the settings say; StoppedError after it when a signal came.

        Raises FloatingPointError when the loss is not finite and no loss scaling would skip the step.
        """
        x_BCDHW = batch["data"].to(self.device, non_blocking=True)
        target = batch["target"]
        if isinstance(target, list):
            target = [scale.to(self.device, non_blocking=True) for scale in target]
        else:
            target = target.to(self.device, non_blocking=True)
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.autocast_dtype):
            loss = self.loss(self.network(x_BCDHW), target)
        if self.grad_scaler is None and not torch.isfinite(loss):
            cases = ", ".join(sorted({str(name) for name in batch.get("keys", ())}))
            raise FloatingPointError(
                f"the loss became {loss.item()} in epoch {self.current_epoch} before the update; the weights saved "
                f"last are good. Cases of the batch: {cases}. Check these images, or lower finetune.learning_rate "
                f"({self.settings.learning_rate})."
            )
        self._update(loss)
        self._stop_if_asked()
        return {"loss": loss.detach().cpu().numpy()}

    def validation_step(self, batch: Batch) -> dict[str, Any]:
        """As nnU-Net; StoppedError after it when a signal came."""
        result = super().validation_step(batch)
        self._stop_if_asked()
        return result

    def on_epoch_end(self) -> None:
        """Log the epoch, save ``checkpoint_best`` as nnU-Net and ``checkpoint_latest`` always, plot now and then."""
        self.logger.log("epoch_end_timestamps", time.time(), self.current_epoch)
        last = {key: values[-1] for key, values in self.logger.get_checkpoint().items()}
        dice = np.round(last["dice_per_class_or_region"], 4).tolist()
        seconds = last["epoch_end_timestamps"] - last["epoch_start_timestamps"]
        losses = f"train_loss {last['train_losses']:.4f}  val_loss {last['val_losses']:.4f}"
        left = timedelta(seconds=round(seconds * (self.num_epochs - 1 - self.current_epoch)))
        self.print_to_log_file(f"{losses}  pseudo dice {dice}  {seconds:.1f} s  ETA {left}")
        folder, ema = Path(self.output_folder), float(last["ema_fg_dice"])
        if self._best_ema is None or ema > self._best_ema:
            self._best_ema = ema
            self.print_to_log_file(f"new best EMA pseudo dice: {self._best_ema:.4f}")
            self.save_checkpoint(str(folder / "checkpoint_best.pth"))
        is_last = self.current_epoch == self.num_epochs - 1
        # After 'best', so that a continued run knows the best value.
        if (self.current_epoch + 1) % self.save_every == 0 and not is_last:
            self.save_checkpoint(str(folder / "checkpoint_latest.pth"))
        # A picture takes more than a second, as long as an epoch on small data.
        if self.local_rank == 0 and (is_last or time.monotonic() - self._last_plot > SECONDS_BETWEEN_PLOTS):
            self._last_plot = time.monotonic()
            self.logger.plot_progress_png(self.output_folder)
        self.current_epoch += 1

    def on_train_end(self) -> None:
        """As nnU-Net; ends the background readers."""
        super().on_train_end()
        self.dataloader_train = self.dataloader_val = None

    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint atomically, of tensors and plain values only, without subjects and paths.

        It keeps the optimizer, also in ``checkpoint_final.pth``: nnU-Net's --c reads it from there.
        """
        if self.local_rank == 0 and not self.disable_checkpointing:
            checkpoint.save(state.content_of(self), filename)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Continue from a checkpoint, which is read without running code that it may carry.

        Raises MFMError: as :func:`mfm_nnunet.checkpoint.load`, and E_MODEL_MISMATCH for another network.
        """
        if not self.was_initialized:
            self.initialize()
        content = filename_or_checkpoint
        state.restore(self, content if isinstance(content, dict) else checkpoint.load_weights(content))

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Predict the fold's validation cases and write ``validation/summary.json``, in this process.

        Cascades and several GPUs are left to nnU-Net's own way.
        """
        has_next_stage = self.configuration_manager.next_stage_names is not None
        if self.is_ddp or self.is_cascaded or has_next_stage:
            super().perform_actual_validation(save_probabilities)
            return
        folder = Path(self.output_folder) / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        _, cases = self.do_split()
        self.set_deep_supervision_enabled(False)
        self.network.eval()
        for case in validation.predict_cases(self, cases, folder, save_probabilities):
            self.print_to_log_file(f"validated {case}")
            self._stop_if_asked()
        self.set_deep_supervision_enabled(True)
        summary = validation.evaluate(self, cases, folder)
        self.print_to_log_file(f"Mean Validation Dice: {validation.mean_dice(summary)}")

    def _update(self, loss: torch.Tensor) -> None:
        """Backward, clip and step, with loss scaling where there is any."""
        if self.grad_scaler is None:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.gradient_clip)
            self.optimizer.step()
            return
        self.grad_scaler.scale(loss).backward()
        self.grad_scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.gradient_clip)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _stop_if_asked(self) -> None:
        if self.stop_flag is not None and self.stop_flag.exit_code is not None:
            raise StoppedError(
                self.stop_flag.exit_code,
                f"stopped in epoch {self.current_epoch}; all finished epochs are saved in {self.output_folder}. "
                "Continue with --c.",
            )


def _autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    if precision == "auto":
        return torch.float16 if device.type == "cuda" else None
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
