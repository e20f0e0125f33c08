"""A trained model: loaded from a folder in nnU-Net's layout, and its prediction of an image in sliding windows.

No code from the model's files is run. Legend: C channels, K classes or regions, D H W voxels.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.label_handling.label_handling import LabelManager, determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from mfm_nnunet.checkpoint import load_weights
from mfm_nnunet.data.sizes import sliding_windows
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.device import gpu_settings, pick_device
from mfm_nnunet.errors import MFMError, nearest
from mfm_nnunet.files import sha256, whole_number
from mfm_nnunet.metrics import agreement_of
from mfm_nnunet.models.networks import build_network, check_architecture
from mfm_nnunet.plan import Plan
from mfm_nnunet.prediction.classification import HeadInfo, build_classifier, head_weights, read_head
from mfm_nnunet.prediction.export import Managers
from mfm_nnunet.reports.progress import track

if TYPE_CHECKING:
    from mfm_nnunet.prediction.selection import ChosenOutputs

logger = logging.getLogger(__name__)
_MODEL_FOLDER = "A model folder has plans.json, dataset.json and folders fold_X with a checkpoint."
VOXELS_COMPARED = 4_000_000
"""Number of voxels at which folds are compared."""
PLAIN_TRAINERS = ("MFMTrainer", "nnUNetTrainer")
"""Trainers that use the plan's network; others build their own."""


@dataclass
class Model:
    """A network, the weights of its folds and their plan.

    The arithmetic is nnU-Net's, in its order (half accumulators, Gaussian weights, mirrored copies, mean over folds),
    so the masks equal stock nnU-Net's voxel for voxel. But only a real out-of-memory error is treated as one, and
    non-finite logits are refused.
    """

    network: nn.Module
    plans_manager: PlansManager
    configuration_manager: ConfigurationManager
    dataset_json: dict[str, Any]
    device: torch.device
    mirror_axes: tuple[int, ...] | None = None
    """Spatial axes of the patch that may be mirrored, as allowed in training."""
    weights: list[dict[str, torch.Tensor]] = field(default_factory=list)
    """One state dict per fold, whose logits are averaged. If empty, the network predicts with its current weights."""
    folds: tuple[int | str, ...] = ()
    autocast_dtype: torch.dtype = torch.float16
    """Mixed precision on CUDA: half like stock nnU-Net, or bf16 for models trained in it."""
    cpu_dtype: torch.dtype | None = None
    """Mixed precision on a CPU; None computes in float32, as stock does."""
    sha256: str = ""
    """Hash of weights, plan and labels together."""
    heads: tuple[HeadInfo, ...] = ()
    """The outputs of each fold of a classifier; empty for a segmentation model."""
    configuration: str = ""
    selection: ChosenOutputs | None = None
    """The outputs to predict; None for all."""
    oom_steps: list[str] = field(default_factory=list)
    """Measures taken for lack of memory since the list was last cleared."""
    agreement: dict[str, float] = field(default_factory=dict)
    """Mean Dice between the folds by label, of the last image; empty with a single fold."""

    def __post_init__(self) -> None:
        self.label_manager: LabelManager = self.plans_manager.get_label_manager(self.dataset_json)
        if self.selection is not None:
            self.label_manager = self.selection.label_manager
        self._loaded: int | None = None

    @property
    def num_channels(self) -> int:
        """Number of image channels per case, without a cascade's previous stage."""
        return len(DatasetJson.of(self.dataset_json).channels)

    @property
    def managers(self) -> Managers:
        """The plan objects that :mod:`mfm_nnunet.prediction.export` needs."""
        return self.plans_manager, self.configuration_manager, self.label_manager

    @torch.inference_mode()
    def predict_logits(
        self, x_CDHW: torch.Tensor, *, step_size: float = 0.5, mirroring: bool = True, what: str = "prediction"
    ) -> torch.Tensor:
        """Return the logits (K, D, H, W), half precision on the CPU, of a preprocessed image (float32).

        ``step_size`` is the distance of neighbouring windows as a share of the patch. ``what`` begins the progress
        lines of a long prediction. Raises MFMError (E_NONFINITE), and torch.OutOfMemoryError when not even a single
        window fits.
        """
        mirror_axes = self.mirror_axes if mirroring else None
        total: torch.Tensor | None = None
        of_folds: list[np.ndarray] = []
        for fold in range(max(1, len(self.weights))):
            self._use_fold(fold)
            which = f"{what}, fold {fold + 1} of {len(self.weights)}" if len(self.weights) > 1 else what
            # Entered anew for each fold: autocast caches the weights it has converted.
            with gpu_settings(self.device, self.autocast_dtype, self.cpu_dtype):
                logits = self._slide(x_CDHW, step_size, mirror_axes, which).to("cpu")
            of_folds += [_label_thinly(logits, self.label_manager.has_regions)] if len(self.weights) > 1 else []
            total = logits if total is None else total.add_(logits)
        assert total is not None
        if len(self.weights) > 1:
            total /= len(self.weights)
        if not all(torch.isfinite(logits_DHW).all() for logits_DHW in total):  # one class at a time, to save memory
            raise MFMError(
                "E_NONFINITE",
                "the network's output has NaN or infinite values for this image. Check its intensities; if they "
                "look normal, the weights are damaged.",
            )
        names = list(DatasetJson.of(self.dataset_json).foreground)
        self.agreement = {names[k]: dice for k, dice in agreement_of(of_folds, len(names)).items()}
        return total

    @torch.inference_mode()
    def predict_labels(self, x_CDHW: torch.Tensor) -> np.ndarray:
        """Return a classifier's probabilities (K), or the number, of a preprocessed image: the mean over the folds."""
        predicted = []
        for fold, head in enumerate(self.heads):
            self._use_fold(fold)
            views = head.views(x_CDHW, self.configuration_manager.patch_size)
            with gpu_settings(self.device, self.autocast_dtype, self.cpu_dtype):
                z_NE = self.network.embed_views(views)  # type: ignore[operator]
            logits_1K = self.network.head(z_NE[None])  # type: ignore[operator]
            if not torch.isfinite(logits_1K).all():
                raise MFMError(
                    "E_NONFINITE", "the network's output is not finite for this image. Check its intensities."
                )
            predicted.append(head.probabilities(logits_1K.double().cpu().numpy())[0])
        return np.mean(predicted, axis=0)

    def _use_fold(self, fold: int) -> None:
        if self.weights and self._loaded != fold:
            self.network.load_state_dict(self.weights[fold])
            self._loaded = fold
        self.network.to(self.device).eval()

    def _slide(
        self, x_CDHW: torch.Tensor, step_size: float, mirror_axes: Sequence[int] | None, what: str = "prediction"
    ) -> torch.Tensor:
        patch_size = tuple(self.configuration_manager.patch_size)
        padded, unpad = pad_nd_image(x_CDHW, patch_size, "constant", {"value": 0}, True, None)
        windows = sliding_windows(padded.shape[1:], patch_size, step_size)
        place = self.device if self.device.type == "cuda" else torch.device("cpu")
        logits = None
        try:
            with track(what, len(windows), "tiles") as count:
                logits = self._accumulate(padded, windows, mirror_axes, count, place)
        except torch.OutOfMemoryError:
            if place.type == "cpu":
                raise
        if logits is None:  # outside the handler: its traceback would keep the tensors on the GPU alive
            self.oom_steps.append("logits accumulated on the CPU")
            logger.warning("%s ran out of memory: the logits are accumulated on the CPU instead", self.device)
            torch.cuda.empty_cache()
            with track(what, len(windows), "tiles") as count:
                logits = self._accumulate(padded, windows, mirror_axes, count, torch.device("cpu"))
        return logits[(slice(None), *unpad[1:])]

    def _accumulate(
        self,
        x_CDHW: torch.Tensor,
        windows: list[tuple[slice | int, ...]],
        mirror_axes: Sequence[int] | None,
        count: Callable[[], None],
        place: torch.device,
    ) -> torch.Tensor:
        """Return the weighted mean of the windows' logits, kept on ``place``. ``count`` is called after each window."""
        x_CDHW, shape = x_CDHW.to(place), x_CDHW.shape[1:]
        logits = torch.zeros((self.label_manager.num_segmentation_heads, *shape), dtype=torch.half, device=place)
        weight = torch.zeros(shape, dtype=torch.half, device=place)
        patch_size = tuple(self.configuration_manager.patch_size)
        gaussian = compute_gaussian(patch_size, sigma_scale=1.0 / 8, value_scaling_factor=10, device=place)
        for window in windows:
            tile = x_CDHW[(slice(None), *window)][None].clone(memory_format=torch.contiguous_format).to(self.device)
            prediction = self._mirrored(tile, mirror_axes)[0].to(place)
            logits[(slice(None), *window)] += prediction.mul_(gaussian)
            weight[window] += gaussian
            count()
        return logits.div_(weight)

    def _mirrored(self, tile: torch.Tensor, mirror_axes: Sequence[int] | None) -> torch.Tensor:
        """Return the mean prediction over all combinations of mirrored axes."""
        prediction = self._forward(tile)
        if not mirror_axes:
            return prediction
        axes = [axis + 2 for axis in mirror_axes]
        assert max(axes) < tile.ndim, f"mirror axes {tuple(mirror_axes)} for a patch of {tile.ndim - 2} axes"
        flips = [flip for size in range(1, len(axes) + 1) for flip in itertools.combinations(axes, size)]
        for flip in flips:
            prediction += torch.flip(self._forward(torch.flip(tile, flip)), flip)
        return prediction.div_(len(flips) + 1)

    def _forward(self, tile: torch.Tensor) -> torch.Tensor:
        return self.network(tile) if self.selection is None else self.selection(self.network(tile))


def _label_thinly(logits_KDHW: torch.Tensor, has_regions: bool) -> np.ndarray:
    """Label every voxel, or of a large image every second or third along each axis."""
    step = max(1, int(np.ceil((logits_KDHW[0].numel() / VOXELS_COMPARED) ** (1 / 3))))
    some_KDHW = logits_KDHW[:, ::step, ::step, ::step]
    if not has_regions:
        return some_KDHW.argmax(0).numpy()
    return ((some_KDHW > 0) * torch.arange(1, len(some_KDHW) + 1).view(-1, 1, 1, 1)).amax(0).numpy()


def load_model(
    model_folder: str | Path,
    folds: Sequence[int | str] | None = None,
    checkpoint_name: str = "checkpoint_final.pth",
    device: str | torch.device = "auto",
) -> Model:
    """Load the model of a folder in nnU-Net's layout: plans.json, dataset.json, fold_X/<checkpoint_name>.

    ``folds`` None loads all numbered folds that have the checkpoint, or ``all`` if it is the only one. Raises MFMError:
    E_NOT_FOUND (naming the expected and the existing files), E_MODEL_CORRUPT, E_MODEL_UNSAFE, E_MODEL_MISMATCH.
    """
    folder = Path(model_folder)
    _require_model_folder(folder)
    advice = f"{_MODEL_FOLDER} Copy it again."
    plan = Plan.read(folder / "plans.json", advice, "E_MODEL_CORRUPT")
    dataset = DatasetJson.read(folder / "dataset.json", advice, "E_MODEL_CORRUPT", of_model=True)
    chosen = _choose_folds(folder, folds, checkpoint_name)
    files = [folder / f"fold_{fold}" / checkpoint_name for fold in chosen]
    trained = [_Fold.read(file) for file in files]
    first, configuration = trained[0], trained[0].configuration
    if configuration not in plan.configuration_names:
        reason = f"there is no configuration '{configuration}', with which the checkpoint was trained"
        raise _mismatch(folder / "plans.json", reason)
    if problem := plan.configuration(configuration).preprocessor_problem:
        advice = "Predict with the program that trained the model."
        raise MFMError("E_MODEL_MISMATCH", f"{folder / 'plans.json'}: {problem} {advice}")
    _require_one_model(trained, plan, dataset)
    plans_manager, dataset_json = PlansManager(dict(plan.content)), dict(dataset.content)
    described = [folder / "plans.json", folder / "dataset.json", *files]
    model = Model(
        network=_build(first, plans_manager, configuration, dataset_json),
        plans_manager=plans_manager,
        configuration_manager=plans_manager.get_configuration(configuration),
        dataset_json=dataset_json,
        device=pick_device(device) if isinstance(device, str) else device,
        mirror_axes=first.mirror_axes,
        weights=[fold.weights for fold in trained],
        folds=tuple(chosen),
        autocast_dtype=torch.bfloat16 if first.precision == "bf16" else torch.float16,
        sha256=hashlib.sha256("".join(map(sha256, described)).encode()).hexdigest(),
        heads=tuple(fold.head for fold in trained if fold.head is not None),
        configuration=configuration,
    )
    for fold in trained:
        try:
            model.network.load_state_dict(fold.weights)
        except (RuntimeError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            reason = f"the weights belong to another network than plans.json describes ({reason})"
            raise _mismatch(fold.file, reason) from error
    return model


def _require_model_folder(folder: Path) -> None:
    """Refuse a folder that is not a model folder, and name a nearby folder that is."""
    place = folder.absolute()
    if (place / "plans.json").exists():
        return
    above = next((near for near in (place.parent, place.parent.parent) if (near / "plans.json").is_file()), None)
    below = sorted(entry.name for entry in place.glob("*__*__*") if (entry / "plans.json").is_file())
    beside = [entry.name for entry in place.parent.glob("*__*__*")] if place.parent.is_dir() else []
    problem = None
    if not place.exists():
        problem = f"no such model folder. {nearest(place.name, beside) if beside else 'Check the path.'}"
    elif above is not None:
        problem = f"this is a part of a model. Give its folder, {above}, and choose with -f FOLD and -chk FILE."
    elif not place.is_dir():
        problem = f"this is a file. {_MODEL_FOLDER} Give that folder."
    elif below:
        problem = f"this folder has models in it, but is not one. Give one of them: {', '.join(below)}."
    if problem:
        raise MFMError("E_NOT_FOUND", f"{folder}: {problem}")


def _choose_folds(folder: Path, folds: Sequence[int | str] | None, checkpoint_name: str) -> list[int | str]:
    trained = sorted(file.parent.name.removeprefix("fold_") for file in folder.glob(f"fold_*/{checkpoint_name}"))
    numbers = sorted(number for name in trained if (number := whole_number(name)) is not None)
    existing = [*map(str, numbers), *(name for name in trained if whole_number(name) is None)]
    if folds is None and (numbers or "all" in trained):
        return [*numbers] or ["all"]
    wanted = [str(fold) for fold in folds or ()]
    if wanted and all(name in existing for name in wanted):
        return [name if (number := whole_number(name)) is None else number for name in wanted]
    missing = [name for name in wanted if name not in existing]
    others = sorted({file.name for file in folder.glob("fold_*/*.pth")} - {checkpoint_name})
    raise MFMError(
        "E_NOT_FOUND",
        f"{folder}: no fold_{missing[0] if missing else 'X'}/{checkpoint_name}. "
        + (f"Folds with this checkpoint: {', '.join(existing)}. " if existing else "No fold has this checkpoint. ")
        + (f"Other checkpoints: {', '.join(others)}." if others else "Train the model first, or check the path."),
    )


@dataclass(frozen=True)
class _Fold:
    """The description in a checkpoint, and its weights."""

    file: Path
    trainer: str
    configuration: str
    mirror_axes: tuple[int, ...] | None
    precision: str
    init_args: dict[str, Any]
    weights: dict[str, torch.Tensor]
    head: HeadInfo | None
    """Of a classifier."""

    @classmethod
    def read(cls, file: Path) -> _Fold:
        content = load_weights(file)
        try:
            trainer, init_args = str(content["trainer_name"]), dict(content["init_args"])
            configuration = str(init_args["configuration"])
            if not trainer.isidentifier():
                raise ValueError(f"the trainer is called {trainer[:60]!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise MFMError(
                "E_MODEL_MISMATCH",
                f"{file}: there are weights but no trainer and configuration, so it is not a fine-tuned model (a "
                "pretrained checkpoint has no segmentation head). Fine-tune it first: mfm_train.",
            ) from error
        axes = content.get("inference_allowed_mirroring_axes") or ()
        if not isinstance(axes, (list, tuple)) or not all(type(axis) is int and 0 <= axis <= 2 for axis in axes):
            raise MFMError(
                "E_MODEL_CORRUPT",
                f"{file}: its mirroring axes are {str(axes)[:60]}, which is not possible. Copy it again.",
            )
        ours: Any = content.get("mfm")
        settings = ours.get("finetune") if isinstance(ours, dict) else None
        precision = str(settings.get("precision", "auto")) if isinstance(settings, dict) else "auto"
        head = read_head(content, file)
        weights = content["network_weights"] | ({} if head is None else head_weights(content))
        return cls(file, trainer, configuration, tuple(axes) or None, precision, init_args, weights, head)

    def differences(self, plan: Plan, dataset: DatasetJson) -> list[str]:
        """List differences between the checkpoint's description and the model folder's plan and dataset."""
        found = []
        own_plan, own_dataset = Plan.of_checkpoint(self.init_args), DatasetJson.of_checkpoint(self.init_args)
        if own_plan and self.configuration in own_plan.configuration_names:
            found += own_plan.differences(plan, self.configuration)
        return found + (own_dataset.differences(dataset) if own_dataset else [])


def _require_one_model(folds: list[_Fold], plan: Plan, dataset: DatasetJson) -> None:
    """Refuse a fold that belongs to another model than the first, or does not match the folder's plan."""
    first = folds[0]
    for fold in folds:
        for name in ("trainer", "configuration", "mirror_axes"):
            own, other = getattr(fold, name), getattr(first, name)
            if own != other:
                raise _mismatch(fold.file, f"{name} is {own}, and {other} in {first.file.parent.name}")
        if unequal := ", ".join(fold.differences(plan, dataset)):
            reason = f"it was trained with other values than plans.json and dataset.json say: {unequal}"
            raise _mismatch(fold.file, reason)


def _mismatch(file: Path, reason: str) -> MFMError:
    return MFMError(
        "E_MODEL_MISMATCH",
        f"{file}: {reason}. Put plans.json, dataset.json and the fold folders of one model together.",
    )


def _build(fold: _Fold, plans_manager: PlansManager, configuration: str, dataset_json: dict) -> nn.Module:
    """Build the network like the trainer did, without deep supervision."""
    trainer_name = fold.trainer
    if fold.head is not None:
        return build_classifier(fold.head, plans_manager.plans, configuration)
    configuration_manager = plans_manager.get_configuration(configuration)
    num_inputs = determine_num_input_channels(plans_manager, configuration_manager, dataset_json)
    num_outputs = plans_manager.get_label_manager(dataset_json).num_segmentation_heads
    if trainer_name in PLAIN_TRAINERS:
        return build_network(plans_manager.plans, configuration, num_inputs, num_outputs, deep_supervision=False)
    architecture = (
        configuration_manager.network_arch_class_name,
        configuration_manager.network_arch_init_kwargs,
        configuration_manager.network_arch_init_kwargs_req_import,
    )
    check_architecture(*architecture)  # the trainer's own builder would import any name in the plan
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            build = recursive_find_trainer_class_by_name(trainer_name).build_network_architecture
    except (RuntimeError, AssertionError, TypeError, AttributeError) as error:  # it may find no class at all
        raise MFMError(
            "E_MODEL_MISMATCH",
            f"the model was trained with '{trainer_name}', which this installation of nnU-Net does not have. Install "
            "its package, and set nnUNet_extTrainer to its folder.",
        ) from error
    if "plans_manager" in inspect.signature(build).parameters:
        return build(plans_manager, configuration_manager, num_inputs, num_outputs, enable_deep_supervision=False)
    return build(*architecture, num_inputs, num_outputs, enable_deep_supervision=False)
