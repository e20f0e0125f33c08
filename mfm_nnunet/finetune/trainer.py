"""MFMTrainer, nnU-Net's entry point to the engine: constructor, checkpoints, and methods its commands call.

All settings come from ``plans["mfm"]``; a stock plan without that block trains with the defaults. A run is a pure
function of the seed, from which the network, every epoch and every batch get one of their own. So a run that was killed
and resumed ends in the same weights as an uninterrupted one, bit for bit on the CPU.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from mfm_nnunet import checkpoint
from mfm_nnunet.data.class_table import ClassTable, require_confirmed
from mfm_nnunet.data.loading import end_workers
from mfm_nnunet.data.unlabelled import Unlabelled
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.device import (
    default_autocast_dtype,
    finetuning_dtype,
    require_scaled_fp16,
    require_sound_bf16,
    warn_of_slow_bf16,
)
from mfm_nnunet.engine.engine import Engine, Optimisation
from mfm_nnunet.engine.optim import WeightAverage, make_optimizer
from mfm_nnunet.engine.state import RunState
from mfm_nnunet.errors import MFMError, StoppedError
from mfm_nnunet.files import to_plain, write_json
from mfm_nnunet.finetune import fold, groups, semi, universal, validation
from mfm_nnunet.finetune.groups import EpochSchedule, Phases
from mfm_nnunet.finetune.loading import (
    check_next_stage,
    find_dataset_class,
    read_fingerprint,
    seed_everything,
    seed_of,
    select_labelled,
)
from mfm_nnunet.finetune.pretrained import transfer_into, untrained_names
from mfm_nnunet.finetune.splits import Split, choose_split
from mfm_nnunet.finetune.watch import Watch
from mfm_nnunet.interchange.foreign import Reading
from mfm_nnunet.interchange.read import read_checkpoint
from mfm_nnunet.models.families import NetworkFamily, family_named, family_of
from mfm_nnunet.models.networks import check_architecture
from mfm_nnunet.models.transfer import unwrapped, without_wrapper_prefixes
from mfm_nnunet.plan import Plan
from mfm_nnunet.processes import ALONE, World, largest
from mfm_nnunet.settings import FORMAT, block_of, to_dict
from mfm_nnunet.signals import stop_on_signal
from mfm_nnunet.tasks.losses import halving_weights
from mfm_nnunet.tasks.segmentation import SegmentationTask
from mfm_nnunet.workspace import num_cores

CUDA = torch.device("cuda")


class MFMTrainer(nnUNetTrainer):
    """Train the network of a plan. Set ``pretrained_checkpoint`` before :meth:`initialize`; None is scratch.

    The engine trains with nnU-Net's losses, loaders and transforms (:meth:`make_engine`).
    """

    pretrained_checkpoint: Path | Reading | None = None
    new_weights: Collection[str] | None = None
    """Names of the parameters that learn first (:func:`groups.first_names`); None from scratch.

    They are saved, so a resumed run keeps the same ones.
    """
    optimisation: Optimisation
    """Made by :meth:`prepare`."""
    task: SegmentationTask
    """Made by :meth:`make_engine`."""
    split: Split | None = None
    """Training and validation cases; None until they are chosen."""
    unlabelled: Unlabelled | None = None
    """Images without labels that also train."""
    dataset_class: Any
    _best_ema: float | None

    def __init__(
        self, plans: dict, configuration: str, fold: int | str, dataset_json: dict, device: torch.device = CUDA
    ) -> None:
        block = block_of(plans)
        super().__init__(plans, configuration, fold, DatasetJson.of(dataset_json).shared(), device)
        self.block = block
        self.union = None if block.universal is None else ClassTable.of(block.universal)
        self.settings = block.finetune
        self.watch = Watch.of(DatasetJson.of(dataset_json))
        if self.settings.train == "auto":  # stock nnU-Net's command, which takes no advice
            self.settings = replace(self.settings, train="all")
        self.initial_lr = family_named(block.network).learning_rate(self.settings)
        self.weight_decay = self.settings.weight_decay
        self.num_epochs = self.settings.epochs
        self.num_iterations_per_epoch = self.settings.iterations_per_epoch
        self.num_val_iterations_per_epoch = self.settings.validation_iterations
        self.save_every = 1
        if self.settings.batch_size is not None:
            # Only in the trainer's own copy of the configuration; the saved plan is unchanged.
            changed = {**self.configuration_manager.configuration, "batch_size": self.settings.batch_size}
            self.configuration_manager.configuration = changed
        self.autocast_dtype = finetuning_dtype(self.settings.precision, self.device)
        if self.autocast_dtype is not torch.float16:  # only fp16 needs loss scaling
            self.grad_scaler = None
        manager = self.configuration_manager
        has_pyramid = _family(manager).has_pyramid(manager.network_arch_init_kwargs)
        self.enable_deep_supervision = self.settings.deep_supervision and has_pyramid
        if self.settings.deep_supervision and not has_pyramid:
            self.print_to_log_file("deep supervision is off: this network has no decoder pyramid")

    def initialize(self) -> None:
        """Build the network under the seed, then transfer the pretrained weights into it."""
        seed_everything(seed_of(self.block.seed, "network", 0))
        super().initialize()
        self.dataset_class: Any = find_dataset_class(self.preprocessed_dataset_folder, self.dataset_class)
        if self.batch_size == 1 and not self.is_ddp:
            # nnU-Net centres the last third of a batch on foreground, which rounds to none for a batch of one.
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
            groups.add_adapters(network, self.settings.lora_rank, self.settings.lora_alpha)
        if self.union is not None and self.union.num_old and self.settings.train == "head":
            self.weight_decay = 0.0
            universal.keep_old_outputs(network, universal.count_old_outputs(self.union))
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
        """Build nnU-Net's network; without deep supervision, freeze the unused output layers.

        DistributedDataParallel would wait for their gradients.
        """
        pyramid: Any = enable_deep_supervision
        if not _family(configuration_manager).takes_deep_supervision(configuration_manager.network_arch_class_name):
            pyramid = None  # because nnU-Net's factory does not pass it on
        network = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, pyramid
        )
        for weight in family_of(network).unused_outputs(network):
            weight.requires_grad_(False)
        return network

    def _do_i_compile(self) -> bool:
        return self.settings.compile and super()._do_i_compile()

    def _build_loss(self) -> Any:
        """Build nnU-Net's loss, which leaves out the coarsest output, or weight all outputs if published so."""
        loss = super()._build_loss()
        if self.enable_deep_supervision and _family(self.configuration_manager).supervises_all_outputs:
            loss.weight_factors = tuple(halving_weights(len(loss.weight_factors)))
        return loss

    def _transfer(self) -> set[str]:
        """Transfer the pretrained weights into the network, report it, and return the names of parameters that learn
        first.
        """
        assert self.pretrained_checkpoint is not None, "there is a checkpoint"
        parts = "all_but_heads" if self.settings.parts == "auto" else self.settings.parts
        given = self.pretrained_checkpoint
        reading = given if isinstance(given, Reading) else read_checkpoint(given)
        report = transfer_into(self, reading, parts, self.settings.transfer)
        if self.union is not None and self.union.num_old:
            universal.take_old_outputs(self, self.union, reading)
        reading.release()
        groups.require_no_random_rest(self.settings, unwrapped(self.network), [entry.name for entry in report.new])
        return groups.first_names(unwrapped(self.network), self.settings, untrained_names(report, self.network))

    def prepare(self, new_weights: Collection[str] | None) -> None:
        """Make optimizer, schedule and average, which depend on where the weights came from, before the first step.

        ``new_weights`` names the parameters that learn first (:func:`groups.first_names`); None from scratch.
        """
        self.new_weights = new_weights
        self.optimizer, self.lr_scheduler = self.configure_optimizers()
        network, decay = unwrapped(self.network), self.settings.ema_decay
        trained = self.lr_scheduler.all_trained_names()
        self.optimisation = Optimisation(
            self.optimizer,
            self.grad_scaler or torch.amp.GradScaler(self.device.type, enabled=False),
            self.autocast_dtype,
            WeightAverage(network, decay, trained) if decay is not None else None,
            frozen=groups.freeze(network, trained, self.is_ddp, new_weights is not None),
        )

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, EpochSchedule]:
        """Make one optimizer for all parameters that ever learn, in groups, and the schedule of their rates."""
        settings, network = self.settings, unwrapped(self.network)
        described = groups.group_parameters(network, settings, self.new_weights)
        parameters = dict(network.named_parameters())
        optimizer = make_optimizer(
            [{"params": [parameters[name] for name in group.names]} for group in described],
            settings.optimizer,
            self.initial_lr,
            self.weight_decay,
        )
        phases = Phases.of(settings, self.new_weights is not None)
        return optimizer, EpochSchedule(optimizer, described, self.initial_lr, phases)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, ...]:
        """Configure augmentation like nnU-Net, but switch off mirroring, also in prediction, if the settings ask for
        it.
        """
        rotation, do_dummy_2d, initial_patch, axes = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        if not self.settings.mirroring:
            axes = self.inference_allowed_mirroring_axes = None
        return rotation, do_dummy_2d, initial_patch, axes

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Do nothing for networks without a decoder pyramid and runs without deep supervision."""
        if self.enable_deep_supervision:
            network = unwrapped(self.network)
            family_of(network).set_deep_supervision(network, enabled)

    def do_split(self) -> tuple[list[str], list[str]]:
        """Return the training and validation cases among the dataset's current cases; the same throughout a run."""
        if self.split is None:  # not chosen yet: stock nnU-Net's command
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

    def run_training(self) -> None:
        """Train to the last epoch with the engine."""
        self._start()
        try:
            self.make_engine().train()
        finally:
            end_workers()  # the validation needs their memory
        self.print_to_log_file("Training done.")

    def rehearse(self) -> None:
        """Take a few steps and say what the run costs."""
        self._start()
        self.make_engine().rehearse()

    def make_engine(self) -> Engine:
        """Make the engine that trains from the current epoch on."""
        world = ALONE
        if self.is_ddp:
            world = World(self.local_rank, torch.distributed.get_world_size(), self.local_rank)
        start = RunState(self.current_epoch * self.settings.iterations_per_epoch)
        self.task = universal.make_task(self) if self.block.semi.method is None else semi.make_unlabelled_task(self)
        return Engine(self.task, fold.FoldRun(self), self.optimisation, world, start)

    def _start(self) -> None:
        """Run the last checks, and describe the model in its folder."""
        require_scaled_fp16(self.settings.precision, self.device)
        semi.require_images(self)
        if not self.was_initialized:
            self.initialize()
        groups.require_pretrained(self.settings, self.new_weights is not None)
        base = Path(self.preprocessed_dataset_folder_base)
        if self.block.universal is not None:
            raw = [Path(nnUNet_raw) / base.name] if nnUNet_raw.is_set() else []
            require_confirmed([*raw, base], self.block.universal)
        fingerprint = read_fingerprint(base)
        plans, folder = self.plans_manager.plans, Path(self.output_folder_base)
        contents = {"plans": plans, "dataset": self.dataset_json, "dataset_fingerprint": fingerprint}
        if self.local_rank == 0:
            workers = max(1, num_cores() // 2)
            self.dataset_class.unpack_dataset(self.preprocessed_dataset_folder, num_processes=workers, verify=True)
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in contents.items():
                write_json(folder / f"{name}.json", content, indent=4)
        if self.is_ddp:
            torch.distributed.barrier()
        self.set_deep_supervision_enabled(self.enable_deep_supervision)
        is_new_scratch = self.new_weights is None and self.current_epoch == 0
        if is_new_scratch and not torch.equal(next(self.network.parameters()), self._first_weight):
            self.print_to_log_file(
                "WARNING: something else put weights into the network, e.g. nnUNetv2_train -pretrained_weights. To "
                f"this run they are random ones: the learning rate is that from scratch ({self.initial_lr:g}), and no "
                "transfer is reported. Use mfm_train -pretrained_weights."
            )
        for line in groups.describe_training(self.lr_scheduler, self.settings, unwrapped(self.network)):
            self.print_to_log_file(line)

    # nnU-Net's checkpoints and validation

    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint atomically: tensors and plain values only, without subjects and paths.

        It keeps the optimizer, also in ``checkpoint_final.pth``, where nnU-Net's --c reads it.
        """
        if self.local_rank == 0 and not self.disable_checkpointing:
            checkpoint.save(self.make_checkpoint(), filename)

    def make_checkpoint(self) -> dict[str, Any]:
        """Return nnU-Net's keys and ours (``mfm``): the state at the end of the current epoch."""
        scaler = self.grad_scaler
        content = {
            **fold.collect_weights(unwrapped(self.network), self.optimisation, self.settings),
            "optimizer_state": _to_cpu(self.optimizer.state_dict()),
            "grad_scaler_state": scaler.state_dict() if scaler is not None else None,
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "current_epoch": self.current_epoch + 1,
            "init_args": {
                "plans": Plan.of(self.plans_manager.plans).shared(),
                "configuration": self.configuration_name,
                "fold": self.fold,
                "dataset_json": self.dataset_json,
            },
            "trainer_name": type(self).__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            "mfm": {
                "format": FORMAT,
                "kind": "finetuned",
                "finetune": to_dict(self.settings),
                "source": self.block.source,
                "new_weights": None if self.new_weights is None else sorted(self.new_weights),
                "versions": {package: version(package) for package in ("mfm_nnunet", "nnunetv2", "torch")},
                **semi.describe_unlabelled(self),
            },
        }
        return to_plain(content)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Resume from a checkpoint without running code it may contain.

        Raises MFMError: those of :func:`mfm_nnunet.checkpoint.load`, E_MODEL_CORRUPT for an incomplete state of a run,
        E_MODEL_MISMATCH for another network, and E_CONFIG when other parameters learn now.
        """
        if not self.was_initialized:
            self.initialize()
        content = filename_or_checkpoint
        if not isinstance(content, dict):
            content = checkpoint.load_weights(content)
        fold.require_state(content, self.settings, self.output_folder)
        names = fold.names_of_new(content)
        self.prepare(None if names is None else set(names))
        how = self.optimisation
        trained = "trained_weights" if fold.ships_other_weights(self.settings) else "network_weights"
        try:
            unwrapped(self.network).load_state_dict(without_wrapper_prefixes(content[trained]))
            fold.require_same_groups(content["optimizer_state"], self.optimizer.state_dict(), self.output_folder)
            self.optimizer.load_state_dict(content["optimizer_state"])
            if how.average is not None:
                how.average.load_state_dict(content["averaged_weights"])
        except MFMError:
            raise
        except (RuntimeError, ValueError, LookupError, AssertionError, TypeError, AttributeError) as error:
            raise MFMError(
                "E_MODEL_MISMATCH",
                f"a checkpoint in {self.output_folder} belongs to another network than the plan's: {error}",
            ) from error
        self.my_init_kwargs = content["init_args"]
        self.current_epoch = content["current_epoch"]
        self.logger.load_checkpoint(content["logging"])
        self._best_ema = content["_best_ema"]
        self.watch.history = fold.rows_of_watch(content)
        if content.get("inference_allowed_mirroring_axes") is not None:
            self.inference_allowed_mirroring_axes = content["inference_allowed_mirroring_axes"]
        if self.grad_scaler is not None and content.get("grad_scaler_state"):
            self.grad_scaler.load_state_dict(content["grad_scaler_state"])

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Predict the fold's validation cases with the shipped weights and write ``validation/summary.json``.

        This runs in the current process; cascades and several GPUs are left to nnU-Net's own code. A signal stops it at
        once.
        """
        stopped = "stopped in the final validation; the training is saved. Continue with --c."
        has_next_stage = self.configuration_manager.next_stage_names is not None
        with self.optimisation.averaged(), stop_on_signal() as stop:
            world = World(size=torch.distributed.get_world_size()) if self.is_ddp else ALONE
            if exit_code := largest(stop.exit_code or 0, world, self.device):
                raise StoppedError(exit_code, stopped)
            with stop.at_once(stopped):
                if self.is_ddp or self.is_cascaded or has_next_stage:
                    with default_autocast_dtype(self.autocast_dtype), check_next_stage():
                        super().perform_actual_validation(save_probabilities)
                    return
                for case in validation.validate_fold(self, save_probabilities):
                    self.print_to_log_file(f"validated {case}")


def _to_cpu(value: Any) -> Any:
    """Move the tensors in nested dicts and lists to the CPU, so that any computer can load them."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    return [_to_cpu(item) for item in value] if isinstance(value, (list, tuple)) else value


def _family(manager: ConfigurationManager) -> NetworkFamily:
    kwargs, to_import = manager.network_arch_init_kwargs, manager.network_arch_init_kwargs_req_import
    return check_architecture(manager.network_arch_class_name, kwargs, to_import)
