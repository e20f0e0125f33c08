"""What a pretext task is: a transform per item (NumPy, in worker processes) and a module from a batch to its loss.

A new method is one file of this folder with one class derived from :class:`PretextTask`. The order of events::

    config = task.resolve(config, backbone.geometry())                 "auto" values get numbers, illegal ones an error
    transform = task.transform(config, patch_size)                     light and picklable, goes to the workers
    requests = transform.requests(rng)                                 which crops the item needs
    item = transform(crops, rng, valid)                                arrays; stacked they are the batch
    output = task(config, backbone)(batch)                             loss, metrics and, in eval mode, pictures

Every random draw of a task comes from the generator of the item, so the loss is a function of batch and weights (only
drop path uses torch's generator). Shapes: B batch, V views, C channels, D H W voxels in the plan's axis order; 2D has
no D. What ``--list`` prints (``name`` to ``paper``) is read from the source text: write literals there.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from mfm_nnunet.data.crops import Augmentation, CropRequest, ItemTransform
from mfm_nnunet.errors import MFMError, nearest
from mfm_nnunet.models.backbone import AbstractBackbone, Geometry, Restoring
from mfm_nnunet.tasks.registry import TaskInfo, list_tasks

__all__ = [
    "Augmentation",
    "CropRequest",
    "ItemTransform",
    "PretextTask",
    "TaskInfo",
    "TaskOutput",
    "find_task",
    "list_tasks",
]


@dataclass(frozen=True)
class TaskOutput:
    """The result of a task's forward pass."""

    loss: Tensor
    """Scalar, float32, with gradient: the mean over the batch."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Detached scalars for the log, the same keys in every step."""
    pictures: dict[str, Tensor] | None = None
    """In eval mode: named volumes (C, D, H, W) of the first item that show what the task sees, hides and restores."""


class PretextTask(nn.Module, ABC):
    """Abstract base of all pretext tasks; each of them is final.

    Settings come as a frozen dataclass ``Config`` of which each field is documented. Whatever weights a task needs
    beside the network's are its own submodules: they are trained and kept for resuming, but never shipped.
    """

    name: ClassVar[str]
    """As in ``--pretext``; it stands in checkpoints and names run folders."""
    Config: ClassVar[type[Any]]
    citations: ClassVar[list[dict[str, Any]]] = []
    """What to cite, as in checkpoints: {"type": "Pretraining Method", "name": ..., "apa_citations": [...]}."""
    backbones: ClassVar[tuple[str, ...]] = ("resenc", "primus")
    """Families of networks that the task works on."""
    hides: ClassVar[str]
    """What is hidden, mixed or compared, in a few words."""
    recipe: ClassVar[str]
    """Batch and patch of the published recipe, e.g. "8 x 160x160x160"."""
    paper: ClassVar[str]
    """"arXiv 2111.06377" or a DOI."""
    restoring: ClassVar[Restoring] = "none"
    """How ``backbone.restore`` is used."""
    trains_decoder: ClassVar[bool] = True
    """False: the encoder alone is trained, and saved."""
    uses_valid: ClassVar[bool] = False
    """Whether anonymised voxels are left out of the loss."""

    def __init__(self, config: Any, backbone: AbstractBackbone) -> None:
        """Raises MFMError (E_CONFIG) when the task does not work on this family of networks."""
        super().__init__()
        if backbone.family not in self.backbones:
            raise MFMError(
                "E_CONFIG",
                f"{self.name} works on {' and '.join(self.backbones)}, the plan's network is {backbone.family}. "
                "Choose another pretext task or plan with another --network.",
            )
        self.config = config
        self.backbone = backbone
        if not self.trains_decoder:
            backbone.freeze_decoder()

    @classmethod
    def resolve(cls, config: Any, geometry: Geometry) -> Any:
        """``config`` with numbers for everything that was left to us, checked: what is printed, saved and used.

        Raises MFMError (E_CONFIG) for illegal values.
        """
        return config

    @classmethod
    def smallest_volume(cls, config: Any) -> tuple[int, ...] | None:
        """Voxels per axis that each volume must have, for a resolved ``config``; None: smaller ones are padded."""
        return None

    @classmethod
    def smallest_batch(cls, config: Any) -> int:
        """Items that a step needs over all processes; contrastive losses need others to compare with."""
        return 1

    @classmethod
    def volumes_per_item(cls, config: Any) -> int:
        """Distinct volumes per item, so also the smallest corpus (and held-out part) that the task can work on."""
        return 1

    @classmethod
    def augmentation(cls, config: Any) -> Augmentation:
        """The most that may be done to a crop before it reaches the transform; the plan can only ask for less."""
        return "none"

    @classmethod
    @abstractmethod
    def num_outputs(cls, config: Any, num_inputs: int) -> int:
        """Dense outputs that the network must have, for ``num_inputs`` image channels."""

    @classmethod
    @abstractmethod
    def transform(cls, config: Any, patch_size: tuple[int, ...]) -> ItemTransform:
        """The transform of the items for a resolved ``config``."""

    @abstractmethod
    def forward(self, batch: dict[str, Tensor]) -> TaskOutput:
        """The loss of a batch of items, which lies on the network's device."""

    def after_step(self, progress: float) -> None:
        """Called after each optimiser step, for teachers; ``progress`` is the share of the training done, 0 to 1."""


def find_task(name: str) -> type[PretextTask]:
    """The class of the task ``name``: a file of this folder (``mae``), or ``package.module[.Class]`` of your own.

    Raises MFMError (E_CONFIG) when there is no such task.
    """
    if "." in name:
        module_name, class_name = _split_dotted(name)
    else:
        known = [task.name for task in list_tasks()]
        if name not in known:
            raise MFMError("E_CONFIG", f"--pretext {name}: there is no such pretext task. {nearest(name, known)}")
        module_name, class_name = f"{__package__}.{name}", None
    found = [task for task in vars(importlib.import_module(module_name)).values() if _is_task(task, module_name)]
    found = [task for task in found if class_name in (None, task.__name__)]
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


def _is_task(value: Any, module_name: str) -> bool:
    is_task = isinstance(value, type) and issubclass(value, PretextTask) and value.__module__ == module_name
    return is_task and not inspect.isabstract(value)
