"""MFMTrainer, the only fine-tuning trainer: nnU-Net's, with settings from the plan and a pretrained start.

All settings come from ``plans["mfm"]``; a stock plan without that block trains with the defaults. A run is a pure
function of the seed: the network starts under it, and every epoch and every batch has a seed of its own. So a run
that was killed and continued ends in the same weights as an unbroken one, bit for bit on the CPU.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Collection
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from mfm_nnunet import checkpoint
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.device import autocast, default_autocast_dtype, default_workers
from mfm_nnunet.engine.optim import SMALLEST_LOSS_SCALE, WeightAverage, make_optimizer
from mfm_nnunet.errors import StoppedError
from mfm_nnunet.files import to_plain
from mfm_nnunet.finetune import groups, lora, state, validation
from mfm_nnunet.finetune.groups import EpochSchedule, Phases, describe_training
from mfm_nnunet.finetune.loading import (
    Batch,
    SeededBatches,
    check_next_stage,
    find_dataset_class,
    make_loaders,
    read_batches,
    read_fingerprint,
    seed_everything,
    seed_of,
    select_labelled,
)
from mfm_nnunet.finetune.pretrained import transfer_into, untrained_names
from mfm_nnunet.finetune.splits import Split, choose_split
from mfm_nnunet.models.families import NetworkFamily, family_named, family_of
from mfm_nnunet.models.networks import check_architecture
from mfm_nnunet.models.precision import finetuning_dtype, require_scaled_fp16, require_sound_bf16, warn_of_slow_bf16
from mfm_nnunet.models.transfer import unwrapped
from mfm_nnunet.processes import StopFlag
from mfm_nnunet.settings import block_of

CUDA = torch.device("cuda")
SECONDS_BETWEEN_PLOTS = 300.0


class MFMTrainer(nnUNetTrainer):
    """Fine-tunes the network of a plan; ``pretrained_checkpoint`` is set before :meth:`initialize`, None is scratch.

    ``stop_flag`` is set when a signal comes; training then ends after the current step with StoppedError.
    """

    pretrained_checkpoint: Path | None = None
    stop_flag: StopFlag | None = None
    new_weights: Collection[str] | None = None
    """Names of the parameters that learn first (:func:`groups.first_names`); None from scratch.

    It is saved, so a run goes on with those that it began with.
    """
    average: WeightAverage | None = None
    """The averaged weights, where they are validated and shipped."""
    split: Split | None = None
    """The cases that train and validate; None until they are chosen."""
    dataset_class: Any
    _best_ema: float | None

    def __init__(
        self, plans: dict, configuration: str, fold: int | str, dataset_json: dict, device: torch.device = CUDA
    ) -> None:
        block = block_of(plans)
        super().__init__(plans, configuration, fold, DatasetJson.of(dataset_json).shared(), device)
        self.block = block
        self.settings = block.finetune
        self.initial_lr = family_named(block.network).learning_rate(self.settings)
        self.weight_decay = self.settings.weight_decay
        self.num_epochs = self.settings.epochs
        self.num_iterations_per_epoch = self.settings.iterations_per_epoch
        self.num_val_iterations_per_epoch = self.settings.validation_iterations
        self.save_every = 1
        if self.settings.batch_size is not None:
            # In the trainer's own view of the configuration; the plan that is saved stays as it is.
            changed = {**self.configuration_manager.configuration, "batch_size": self.settings.batch_size}
            self.configuration_manager.configuration = changed
        self._frozen: list[torch.nn.Parameter] = []
        self._trained: set[str] | None = None
        self._num_steps = 0
        self.autocast_dtype = finetuning_dtype(self.settings.precision, self.device)
        if self.autocast_dtype is not torch.float16:  # only fp16 needs its losses scaled
            self.grad_scaler = None
        self._last_plot = -SECONDS_BETWEEN_PLOTS
        manager = self.configuration_manager
        has_pyramid = _family(manager).has_pyramid(manager.network_arch_init_kwargs)
        self.enable_deep_supervision = self.settings.deep_supervision and has_pyramid
        if self.settings.deep_supervision and not has_pyramid:
            self.print_to_log_file("deep supervision is off: this network has no decoder pyramid")

    def initialize(self) -> None:
        """Build the network under the seed, then move the pretrained weights into it.

        Raises MFMError when the checkpoint cannot be read or belongs to another network, when bf16 cannot be had, and
        when the settings do not fit the network or what the checkpoint holds.
        """
        seed_everything(seed_of(self.block.seed, "network", 0))
        super().initialize()
        self.dataset_class: Any = find_dataset_class(self.preprocessed_dataset_folder, self.dataset_class)
        if self.batch_size == 1 and not self.is_ddp:
            # nnU-Net centres the last third of a batch on foreground, which rounds to none of one crop.
            self.probabilistic_oversampling = True
        if self.autocast_dtype is torch.bfloat16:
            patch_size = self.configuration_manager.patch_size
            require_sound_bf16(unwrapped(self.network), patch_size, self.device, "finetune.precision")
            warn_of_slow_bf16(self.device, "finetune.precision")
        network = unwrapped(self.network)
        groups.require_fitting(self.settings, network, self.is_ddp)
        new = self._transfer() if self.pretrained_checkpoint is not None else None
        if self.settings.train == "lora":
            seed_everything(seed_of(self.block.seed, "adapters", 0))
            lora.add_adapters(network, self.settings.lora_rank, self.settings.lora_alpha)
        self.prepare(new)
        self._first_weight = next(network.parameters()).detach().clone()

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> torch.nn.Module:
        """nnU-Net's; without deep supervision the output layers that nothing uses do not learn.

        DistributedDataParallel would wait for their gradients.
        """
        pyramid: Any = enable_deep_supervision
        if not _family(configuration_manager).takes_deep_supervision(configuration_manager.network_arch_class_name):
            pyramid = None  # which nnU-Net's factory does not pass on
        network = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, pyramid
        )
        for weight in family_of(network).unused_outputs(network):
            weight.requires_grad_(False)
        return network

    def _do_i_compile(self) -> bool:
        return self.settings.compile and super()._do_i_compile()

    def _transfer(self) -> set[str]:
        """Move the pretrained weights into the network and report it; names of what learns first."""
        assert self.pretrained_checkpoint is not None, "there is a checkpoint"
        parts = "all_but_heads" if self.settings.parts == "auto" else self.settings.parts
        report = transfer_into(self, self.pretrained_checkpoint, parts, self.settings.transfer)
        groups.require_no_random_rest(self.settings, unwrapped(self.network), [entry.name for entry in report.new])
        return groups.first_names(unwrapped(self.network), self.settings, untrained_names(report, self.network))

    def prepare(self, new_weights: Collection[str] | None) -> None:
        """Make what depends on where the weights came from: optimizer, schedule, average; before the first step.

        ``new_weights`` names the parameters that learn first (:func:`groups.first_names`); None from scratch.
        """
        self.new_weights = new_weights
        self.optimizer, self.lr_scheduler = self.configure_optimizers()
        network = unwrapped(self.network)
        trained = self.lr_scheduler.all_trained_names()
        self._frozen = groups.freeze(network, trained, self.is_ddp)
        decay = self.settings.ema_decay
        self.average = WeightAverage(network, decay, trained) if decay is not None else None

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, EpochSchedule]:
        """One optimizer for all parameters that ever learn, in groups, and the schedule of their learning rates."""
        settings, network = self.settings, unwrapped(self.network)
        described = groups.group_parameters(network, settings, self.new_weights)
        parameters = dict(network.named_parameters())
        optimizer = make_optimizer(
            [{"params": [parameters[name] for name in group.names]} for group in described],
            settings.optimizer,
            self.initial_lr,
            settings.weight_decay,
        )
        phases = Phases.of(settings, self.new_weights is not None)
        return optimizer, EpochSchedule(optimizer, described, self.initial_lr, phases)

    def averaged(self) -> contextlib.AbstractContextManager:
        """Inside, the network holds what is validated and shipped: the averaged weights, where there are any."""
        return self.average.in_place() if self.average is not None else contextlib.nullcontext()

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, ...]:
        """As nnU-Net; without mirroring where the settings say so, in prediction neither."""
        rotation, do_dummy_2d, initial_patch, axes = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        if not self.settings.mirroring:
            axes = self.inference_allowed_mirroring_axes = None
        return rotation, do_dummy_2d, initial_patch, axes

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Networks without a decoder pyramid, and runs without deep supervision, stay as they are."""
        if self.enable_deep_supervision:
            network = unwrapped(self.network)
            family_of(network).set_deep_supervision(network, enabled)

    def do_split(self) -> tuple[list[str], list[str]]:
        """Return the training and the validation cases: of those that the dataset has now, and the same in one run.

        Raises MFMError (E_CONFIG) for a fold that does not exist, and as :func:`choose_split`.
        """
        if self.split is None:  # nobody chose before: stock nnU-Net's command
            raw = Path(nnUNet_raw) / self.plans_manager.dataset_name if nnUNet_raw.is_set() else None
            base = Path(self.preprocessed_dataset_folder_base)
            self.split = choose_split(
                self.fold, base, select_labelled(raw, base, Path(self.preprocessed_dataset_folder))
            )
        if self.dataset_class is None:
            self.dataset_class = find_dataset_class(self.preprocessed_dataset_folder)
        training, validation_cases = self.split["train"], self.split["val"]
        self.print_to_log_file(f"{len(training)} training and {len(validation_cases)} validation cases")
        return list(training), list(validation_cases)

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Seeded streams of training and validation batches that start at the current epoch."""
        world_size = torch.distributed.get_world_size() if self.is_ddp else 1
        wanted = self.block.num_workers
        num_workers = default_workers(world_size) if wanted is None else wanted
        self.print_to_log_file(f"{num_workers} background processes read and augment")
        parts = (("training", self.num_iterations_per_epoch), ("validation", self.num_val_iterations_per_epoch))
        streams = []
        for loader, (name, per_epoch) in zip(make_loaders(self), parts):
            source = SeededBatches(loader, self.block.seed, f"{name} {self.local_rank}")
            first, last = self.current_epoch * per_epoch, self.num_epochs * per_epoch
            workers = num_workers if name == "training" else (num_workers + 1) // 2
            streams.append(read_batches(source, first, last, workers, self.device.type == "cuda"))
        return streams[0], streams[1]

    def print_plans(self) -> None:
        """Nothing: the plan is in the model folder, and on the console it would bury the rest."""

    def _save_debug_information(self) -> None:
        """Nothing: stock's debug.json names the computer, its paths and the cases in the model folder."""

    def plot_network_architecture(self) -> None:
        """Nothing: the drawing package that nnU-Net tries is not maintained."""

    def on_train_start(self) -> None:
        """As nnU-Net, and say what learns.

        Raises MFMError: E_NOT_FOUND without the fingerprint that goes into the model folder, E_CONFIG when random
        weights would never learn, and for fp16 without CUDA.
        """
        require_scaled_fp16(self.settings.precision, self.device)
        if not self.was_initialized:
            self.initialize()
        groups.require_pretrained(self.settings, self.new_weights is not None)
        fingerprint = read_fingerprint(Path(self.preprocessed_dataset_folder_base))
        state.write_descriptions(self)
        super().on_train_start()
        is_new_scratch = self.new_weights is None and self.current_epoch == 0
        if is_new_scratch and not torch.equal(next(self.network.parameters()), self._first_weight):
            self.print_to_log_file(
                "WARNING: something else put weights into the network, e.g. nnUNetv2_train -pretrained_weights. To "
                f"this run they are random ones: the learning rate is that from scratch ({self.initial_lr:g}), and no "
                "transfer is reported. Use mfm_train -pretrained_weights."
            )
        for line in describe_training(self.lr_scheduler, self.settings, unwrapped(self.network)):
            self.print_to_log_file(line)
        if self.is_ddp:
            torch.distributed.barrier()  # each process copies the file, and none may after this
        if self.local_rank == 0:
            with checkpoint.atomic_write(Path(self.output_folder_base) / "dataset_fingerprint.json") as file:
                file.write(json.dumps(fingerprint, indent=1).encode())

    def on_train_epoch_start(self) -> None:
        """Seed what draws during training (drop path, dropout) from the epoch, so resuming needs no random state.

        Which parameters learn follows from the epoch too.
        """
        seed_everything(seed_of(self.block.seed, f"epoch {self.local_rank}", self.current_epoch))
        super().on_train_epoch_start()
        trained = self.lr_scheduler.trained_names(self.current_epoch)
        if hasattr(self.network, "_orig_mod") and self._trained is not None and trained != self._trained:
            # Compiled code may not notice that parameters learn from now on, and would give them no gradients
            # (https://github.com/pytorch/pytorch/issues/139476).
            torch.compiler.reset()
        self._trained = trained
        self._frozen = groups.freeze(unwrapped(self.network), trained, self.is_ddp)
        self._num_steps = self.current_epoch * self.num_iterations_per_epoch

    def train_step(self, batch: Batch) -> dict[str, np.ndarray]:
        """One gradient step, clipped as the settings say; StoppedError after it when a signal came.

        Raises FloatingPointError when the loss is not finite, or, where loss scaling skips such steps, when too many
        were skipped.
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
            self._refuse_nonfinite(f"the loss became {loss.item()}", batch)
        self._update(loss)
        if self.grad_scaler is not None and self.grad_scaler.get_scale() < SMALLEST_LOSS_SCALE:
            reason = f"steps with gradients that are not finite (the last loss was {loss.item()}) were skipped until"
            self._refuse_nonfinite(f"{reason} their scale fell below {SMALLEST_LOSS_SCALE:g}", batch)
        if self.average is not None:
            self.average.update(self._num_steps)
        self._num_steps += 1
        self._stop_if_asked()
        return {"loss": loss.detach().cpu().numpy()}

    def validation_step(self, batch: Batch) -> dict[str, Any]:
        """As nnU-Net, with the weights that are shipped; StoppedError after it when a signal came.

        In half precision on GPUs, or in bf16 where that is what is trained in.
        """
        with self.averaged(), default_autocast_dtype(self.autocast_dtype):
            result = super().validation_step(batch)
        self._stop_if_asked()
        return result

    def on_epoch_end(self) -> None:
        """Log the epoch, save ``checkpoint_best`` as nnU-Net and ``checkpoint_latest`` always, plot now and then."""
        self.logger.log("epoch_end_timestamps", time.time(), self.current_epoch)
        # As a continued run reads it: NumPy's float32 would round nnU-Net's moving average of the Dice otherwise.
        self.logger.load_checkpoint(to_plain(self.logger.get_checkpoint()))
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
            with checkpoint.full_disk_named(folder / "progress.png"):
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
        """Predict the fold's validation cases with the shipped weights and write ``validation/summary.json``."""
        with self.averaged():
            self._validate(save_probabilities)

    def _validate(self, save_probabilities: bool) -> None:
        """In this process; cascades and several GPUs are left to nnU-Net's own way. A signal stops it at once."""
        self._stop_if_asked()
        has_next_stage = self.configuration_manager.next_stage_names is not None
        stopped = "stopped in the final validation; the training is saved. Go on with --c."
        with self.stop_flag.at_once(stopped) if self.stop_flag is not None else contextlib.nullcontext():
            if self.is_ddp or self.is_cascaded or has_next_stage:
                with default_autocast_dtype(self.autocast_dtype), check_next_stage():
                    super().perform_actual_validation(save_probabilities)
                return
            for case in validation.validate_fold(self, save_probabilities):
                self.print_to_log_file(f"validated {case}")

    def _refuse_nonfinite(self, what: str, batch: Batch) -> None:
        cases = ", ".join(sorted({str(name) for name in batch.get("keys", ())}))
        raise FloatingPointError(
            f"{what} in epoch {self.current_epoch} before the update; the weights saved last are good. Cases of the "
            f"batch: {cases}. Check these images, or lower finetune.learning_rate ({self.initial_lr})."
        )

    def _update(self, loss: torch.Tensor) -> None:
        """Backward, clip and step, with loss scaling where there is any."""
        if self.grad_scaler is None:
            loss.backward()
            self._drop_frozen_gradients()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.gradient_clip)
            self.optimizer.step()
            return
        self.grad_scaler.scale(loss).backward()
        self._drop_frozen_gradients()
        self.grad_scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.gradient_clip)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _drop_frozen_gradients(self) -> None:
        """On several GPUs they are computed all the same, see :func:`mfm_nnunet.finetune.groups.freeze`."""
        for parameter in self._frozen:
            parameter.grad = None

    def _stop_if_asked(self) -> None:
        exit_code = (self.stop_flag.exit_code if self.stop_flag is not None else None) or 0
        if self.is_ddp:  # all processes stop after the same step, else one waits for the others
            asked = torch.tensor(exit_code, device=self.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            exit_code = int(asked)
        if exit_code:
            saved = f"all finished epochs are saved in {self.output_folder}. Continue with --c."
            left = saved if self.current_epoch else "no epoch was finished, so nothing is saved. Start it again."
            raise StoppedError(exit_code, f"stopped in epoch {self.current_epoch}; {left}")


def _family(manager: ConfigurationManager) -> NetworkFamily:
    kwargs, to_import = manager.network_arch_init_kwargs, manager.network_arch_init_kwargs_req_import
    return check_architecture(manager.network_arch_class_name, kwargs, to_import)
