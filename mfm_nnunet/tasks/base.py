"""Base classes of everything the engine trains (:class:`Task`) and of pretext tasks (:class:`PretextTask`).

To add a pretext task, write one file in this folder with one class derived from :class:`PretextTask`. Order of calls::

    config = task.resolve(config, backbone.geometry())                 fills in open values, refuses illegal ones
    transform = task.transform(config, patch_size)                     light and picklable, sent to the workers
    requests = transform.requests(rng)                                 crops that the item needs
    item = transform(crops, rng, valid)                                arrays; stacked they are the batch
    output = task(config, backbone)(batch)                             loss, metrics and, in eval mode, pictures

All random numbers of a task come from the generator of the item, so the loss depends only on batch and weights (except
drop path, which uses torch's generator).

Shapes: B batch, V views, C channels, D H W voxels in the plan's axis order; 2D has no D.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor, nn

from mfm_nnunet.data.crops import Augmentation, CropRequest, ItemTransform
from mfm_nnunet.errors import MFMError, nearest
from mfm_nnunet.models.backbone import AbstractBackbone, Geometry, Restoring
from mfm_nnunet.models.families import Need
from mfm_nnunet.settings import require_in_range
from mfm_nnunet.tasks.registry import TASKS, TaskInfo, list_tasks

__all__ = [
    "Augmentation",
    "CropRequest",
    "ItemTransform",
    "PatchTransform",
    "PretextTask",
    "Task",
    "TaskInfo",
    "TaskOutput",
    "find_task",
    "illegal_setting",
    "list_tasks",
    "size_per_axis",
]


@dataclass(frozen=True)
class TaskOutput:
    """Result of a task's forward pass."""

    loss: Tensor
    """Scalar, float32, with gradient: the mean over the batch."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Detached scalars for the log, with the same keys in every step."""
    pictures: dict[str, Tensor] | None = None
    """In eval mode: named volumes (C, D, H, W) of the first item, e.g. input, target and output."""


class Task(nn.Module, ABC):
    """Abstract base of everything the engine trains: a module that computes the loss of a batch.

    A task owns the network, which is exported, and its other weights, which are saved for resuming but never exported.
    """

    name: ClassVar[str]
    """Name in checkpoints and run folders."""
    trains_decoder: ClassVar[bool] = True
    """If False, only the encoder is trained and exported."""

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """Network whose weights are exported."""

    @abstractmethod
    def forward(self, batch: dict[str, Tensor]) -> TaskOutput:
        """Compute the loss of a batch, which is on the network's device."""

    def shipped_weights(self) -> Mapping[str, Tensor]:
        """Return the state dict for exported checkpoints."""
        return self.network.state_dict()

    def summarise(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        """Summarise a validation for the log: by default the mean of the loss and of each metric.

        ``values`` has the loss and metrics of all batches of all processes, stacked along the first axis.
        """
        return {name: value.mean().item() for name, value in values.items()}

    def after_step(self, progress: float) -> None:
        """Update state after an optimiser step, e.g. a teacher. ``progress`` of the training is 0 to 1."""

    def output(
        self, loss: Tensor, metrics: Mapping[str, Tensor], pictures: Callable[[], Mapping[str, Tensor]]
    ) -> TaskOutput:
        """Assemble the output with detached metrics and pictures; ``pictures`` is called only in eval mode."""
        shown = None
        if not self.training:
            shown = {name: volume.detach().float() for name, volume in pictures().items()}
        return TaskOutput(loss, {name: value.detach() for name, value in metrics.items()}, shown)


@dataclass(frozen=True)
class PatchTransform(ItemTransform):
    """Base of transforms that need one patch. Override ``requests`` for other crops."""

    config: Any
    """Resolved settings of the task."""
    patch_size: tuple[int, ...]

    def requests(self, rng: np.random.Generator) -> list[CropRequest]:
        return [CropRequest(self.patch_size)]


class PretextTask(Task):
    """Abstract base of all pretext tasks.

    Settings are a frozen dataclass ``Config``; each field has a docstring and, through
    :func:`mfm_nnunet.settings.ranged`, its legal range.
    """

    name: ClassVar[str]
    """Value of ``--pretext``."""
    Config: ClassVar[type[Any]]
    Transform: ClassVar[type[PatchTransform]]
    citations: ClassVar[list[dict[str, Any]]] = []
    """Citations as in checkpoints: {"type": "Pretraining Method", "name": ..., "apa_citations": [...]}."""
    needs: ClassVar[Need] = "any"
    """Requirement on the network."""
    restoring: ClassVar[Restoring] = "none"
    """Treatment of hidden tokens in ``backbone.restore``."""
    pictures_are: Literal["scan", "mirrored", "changed"] = "changed"
    """Position of the pictures: as in the scan, the same up to mirroring, or changed otherwise (rotated, views)."""
    uses_valid: ClassVar[bool] = False
    """If True, anonymised voxels are left out of the loss."""

    def __init_subclass__(cls) -> None:
        """Take the citations and the requirement of a built-in task from its entry in the registry."""
        super().__init_subclass__()
        if info := TASKS.get(cls.__module__.removeprefix(f"{__package__}.")):
            cls.citations, cls.needs = info.citations, info.needs

    def __init__(self, config: Any, backbone: AbstractBackbone) -> None:
        """Create the task. Raises MFMError (E_CONFIG) if it does not support this network family."""
        super().__init__()
        if not backbone.family.meets(self.needs):
            raise MFMError(
                "E_CONFIG",
                f"{self.name} needs a network with {self.needs}, the plan's network is {backbone.family.name}. "
                "Choose another pretext task or plan with another --network.",
            )
        self.config = config
        self.backbone = backbone
        if not self.trains_decoder:
            backbone.freeze_decoder()

    @property
    def network(self) -> nn.Module:
        return self.backbone.network

    def shipped_weights(self) -> Mapping[str, Tensor]:
        return self.network.state_dict() if self.trains_decoder else self.backbone.encoder_state()

    @classmethod
    def resolve(cls, config: Any, geometry: Geometry) -> Any:
        """Check ``config`` and fill in its open values. The result is printed, saved and used.

        Raises MFMError (E_CONFIG) for illegal values.
        """
        require_in_range(config, "pretext.")
        return config

    @classmethod
    def smallest_volume(cls, config: Any) -> tuple[int, ...] | None:
        """Return the minimum size of a volume in voxels; None: smaller volumes are padded."""
        return None

    @classmethod
    def smallest_batch(cls, config: Any) -> int:
        """Return the minimum number of items per step over all processes; contrastive losses need several."""
        return 1

    @classmethod
    def volumes_per_item(cls, config: Any) -> int:
        """Return the number of different volumes per item, which is also the minimum for corpus and held-out part."""
        return 1

    @classmethod
    def augmentation(cls, config: Any) -> Augmentation:
        """Return the strongest augmentation of crops before the transform; the plan can only weaken it."""
        return "none"

    @classmethod
    def num_outputs(cls, config: Any, num_inputs: int) -> int:
        """Return the number of outputs of the network for ``num_inputs`` image channels."""
        return num_inputs

    @classmethod
    def transform(cls, config: Any, patch_size: tuple[int, ...]) -> ItemTransform:
        """Make the item transform for a resolved ``config``."""
        return cls.Transform(config, patch_size)


def illegal_setting(name: str, value: Any, problem: str) -> MFMError:
    """Return the error for a task setting that does not fit plan or network."""
    return MFMError("E_CONFIG", f"pretext.{name}={value}: {problem}. Leave it out for the default.")


def size_per_axis(name: str, size: tuple[int, ...], patch_size: tuple[int, ...]) -> tuple[int, ...]:
    """Expand a single number to all axes, and refuse sizes larger than the patch."""
    sides = size * len(patch_size) if len(size) == 1 else size
    if len(sides) != len(patch_size) or any(not 1 <= side <= most for side, most in zip(sides, patch_size)):
        raise illegal_setting(name, sides, f"the patch has {len(patch_size)} axes; legal are 1 up to {patch_size}")
    return sides


def find_task(name: str) -> type[PretextTask]:
    """Return the class of the task ``name``: a file in this folder (``mae``), or your ``package.module[.Class]``.

    Raises MFMError (E_CONFIG) for an unknown task.
    """
    module_name, class_name = _split_dotted(name) if "." in name else (f"{__package__}.{name}", None)
    tasks = _tasks_of(module_name) if _exists(module_name) else []
    if "." not in name and not tasks:
        known = [task.name for task in list_tasks()]
        raise MFMError("E_CONFIG", f"--pretext {name}: there is no such pretext task. {nearest(name, known)}")
    found = [task for task in tasks if class_name in (None, task.__name__)]
    if len(found) != 1:
        raise MFMError(
            "E_CONFIG",
            f"--pretext {name}: {module_name} defines {len(found) or 'no'} such classes derived from PretextTask. "
            "Name one of them as package.module.Class.",
        )
    return found[0]


def _split_dotted(name: str) -> tuple[str, str | None]:
    if _exists(name):
        return name, None
    module_name, _, class_name = name.rpartition(".")
    if _exists(module_name):
        return module_name, class_name
    raise MFMError(
        "E_CONFIG", f"--pretext {name}: there is no module of that name. Install it or put its folder on PYTHONPATH."
    )


def _exists(module_name: str) -> bool:
    try:
        return importlib.util.find_spec(module_name) is not None
    except (ImportError, ValueError):
        return False


def _tasks_of(module_name: str) -> list[type[PretextTask]]:
    """List the pretext tasks defined in a module; shared base classes have no ``name``."""
    values = [value for value in vars(importlib.import_module(module_name)).values() if isinstance(value, type)]
    tasks = [value for value in values if issubclass(value, PretextTask) and not inspect.isabstract(value)]
    return [task for task in tasks if task.__module__ == module_name and hasattr(task, "name")]
