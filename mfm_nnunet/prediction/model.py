"""A trained network with its plan, and sliding-window prediction of an image.

The arithmetic is nnU-Net's, in nnU-Net's order (half accumulators, Gaussian weights, mirrored copies, mean over folds),
so the masks equal stock nnU-Net's voxel for voxel. Differences: there is no thread that can die and leave the loop
waiting, only a real out-of-memory error is treated as one, and non-finite logits are refused. Legend: C channels, K
classes or regions, D H W voxels.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from mfm_nnunet.data.loops import progress
from mfm_nnunet.data.sizes import sliding_windows
from mfm_nnunet.errors import MFMError

logger = logging.getLogger(__name__)


@dataclass
class Model:
    """A network, the weights of its folds and their plan."""

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
    sha256: str = ""
    """Hash of weights, plan and labels together."""
    oom_steps: list[str] = field(default_factory=list)
    """Measures taken for lack of memory since the list was last cleared."""

    def __post_init__(self) -> None:
        self.label_manager: LabelManager = self.plans_manager.get_label_manager(self.dataset_json)
        self._loaded: int | None = None

    @property
    def num_channels(self) -> int:
        """Number of image channels per case, without a cascade's previous stage."""
        return len(self.dataset_json.get("modality") or self.dataset_json["channel_names"])

    @property
    def managers(self) -> tuple[PlansManager, ConfigurationManager, LabelManager]:
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
        for fold in range(max(1, len(self.weights))):
            self._use_fold(fold)
            which = f"{what}, fold {fold + 1} of {len(self.weights)}" if len(self.weights) > 1 else what
            # Entered anew for each fold: autocast caches the weights it has converted.
            with _gpu_settings(self.device, self.autocast_dtype):
                logits = self._slide(x_CDHW, step_size, mirror_axes, which).to("cpu")
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
        return total

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
            with progress(len(windows), what, "tiles") as count:
                logits = self._accumulate(padded, windows, mirror_axes, count, place)
        except torch.OutOfMemoryError:
            if place.type == "cpu":
                raise
        if logits is None:  # outside the handler: its traceback would keep the tensors on the GPU alive
            self.oom_steps.append("logits accumulated on the CPU")
            logger.warning("%s ran out of memory: the logits are accumulated on the CPU instead", self.device)
            torch.cuda.empty_cache()
            with progress(len(windows), what, "tiles") as count:
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
        x_CDHW = x_CDHW.to(place)
        shape = x_CDHW.shape[1:]
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
        prediction = self.network(tile)
        if not mirror_axes:
            return prediction
        axes = [axis + 2 for axis in mirror_axes]
        assert max(axes) < tile.ndim, f"mirror axes {tuple(mirror_axes)} for a patch of {tile.ndim - 2} axes"
        flips = [flip for size in range(1, len(axes) + 1) for flip in itertools.combinations(axes, size)]
        for flip in flips:
            prediction += torch.flip(self.network(torch.flip(tile, flip)), flip)
        return prediction.div_(len(flips) + 1)


@contextlib.contextmanager
def _gpu_settings(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Use mixed precision and cuDNN's search on a CUDA device, like stock nnU-Net; restore the settings afterwards."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with torch.autocast("cuda", dtype):
            yield
    finally:
        torch.backends.cudnn.benchmark = before
