"""Safe reading of nnU-Net's preprocessed datasets, and batches drawn from (seed, stream, index).

The dataset classes replace nnU-Net's own, whose ``load_case`` trusts pickles and metalayers of blosc2. Here no file can
run code. An error names the damaged file, even if the damage only shows when its voxels are read.

nnU-Net's loader and transforms make each batch under its own seed. So workers never draw the same numbers, a run
resumes exactly by starting at the next index, and no loader state needs to be saved.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading import nnunet_dataset
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import (
    comp_blosc2_params,
    nnUNetBaseDataset,
    nnUNetDatasetBlosc2,
    nnUNetDatasetNumpy,
)
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as trainer_module
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch.utils.data import Dataset

from mfm_nnunet.data.corpus import Selection, select
from mfm_nnunet.data.loading import read_in_order
from mfm_nnunet.data.storage import require_whole, stored_cases
from mfm_nnunet.data.volumes import PREPROCESS_AGAIN, open_array, read_arrays, read_properties, unreadable
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import read_json
from mfm_nnunet.finetune.augmentation import TightLoader
from mfm_nnunet.workspace import Workspace

VALIDATE_AGAIN = "validate the fold of the first stage that holds the case again (mfm_train --val), which writes it."

Batch = dict[str, Any]
"""nnU-Net's batch: "data" (B, C, D, H, W) float32, "target" a tensor or one per scale, "keys" the case names."""
Loaded = tuple[Any, Any, Any, dict[str, Any]]
"""nnU-Net's image (C, D, H, W), label map (1, D, H, W), mask of the previous stage (or None), and properties."""


# Batches


@dataclass(frozen=True)
class SeededBatches(Dataset):
    """The endless stream of a loader, indexed; each batch is drawn under its own seed."""

    loader: nnUNetDataLoader
    seed: int
    stream: str

    def __getitem__(self, index: int) -> Batch:
        with seeded(seed_of(self.seed, self.stream, index)):
            return self.loader.generate_train_batch()


def read_batches(source: Dataset, first: int, last: int, num_workers: int, pin_memory: bool = False) -> Iterator[Batch]:
    """Return batches ``first`` to ``last - 1``, in order."""
    return read_in_order(source, num_workers, pin_memory, _keep, batch_size=None, sampler=range(first, last))


def make_loaders(
    trainer: nnUNetTrainer, full_targets: bool = False, make: Callable[..., nnUNetDataLoader] = TightLoader
) -> tuple[nnUNetDataLoader, nnUNetDataLoader]:
    """Make nnU-Net's training and validation loaders as its trainer does, with deterministic transforms.

    ``full_targets``: targets of training have full resolution, and are not reduced for deep supervision. ``make`` takes
    the arguments of nnU-Net's class.
    """
    rotation, do_dummy_2d, initial_patch, mirror_axes = (
        trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    )
    labels, patch = trainer.label_manager, trainer.configuration_manager.patch_size
    scales = trainer._get_deep_supervision_scales()
    shared = {
        "is_cascaded": trainer.is_cascaded,
        "foreground_labels": labels.foreground_labels,
        "regions": labels.foreground_regions if labels.has_regions else None,
        "ignore_label": labels.ignore_label,
    }
    training = trainer.get_training_transforms(
        patch, rotation, None if full_targets else scales, mirror_axes, do_dummy_2d,
        use_mask_for_norm=trainer.configuration_manager.use_mask_for_norm, **shared,
    )  # fmt: skip
    validation = trainer.get_validation_transforms(scales, **shared)
    make_deterministic(training)
    datasets = trainer.get_tr_and_val_datasets()
    return tuple(
        make(
            dataset, trainer.batch_size, size, patch, labels, trainer.oversample_foreground_percent,
            probabilistic_oversampling=trainer.probabilistic_oversampling, transforms=transforms,
        )
        for dataset, size, transforms in zip(datasets, (initial_patch, patch), (training, validation))
    )  # fmt: skip


def make_deterministic(transform: Any) -> None:
    """Turn off the choice of implementations by timing: the winner, and so the last bits, differ between runs."""
    if hasattr(transform, "benchmark"):
        transform.benchmark = False
    for inner in [*getattr(transform, "transforms", ()), getattr(transform, "transform", None)]:
        if inner is not None:
            make_deterministic(inner)


def seed_of(seed: int, stream: str, index: int) -> int:
    """Return a 64-bit seed for item ``index`` of a stream, different for every seed, stream and index."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}/{index}".encode()).digest()[:8], "big")


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global CPU generators and use one torch thread inside the block. Both are restored afterwards.

    One thread, because a sum over several threads differs in the last bits from that of a worker, which has one.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state(), torch.get_num_threads()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.set_num_threads(states[3])


def _keep(batch: Any) -> Any:
    return batch


# Cases


def read_dataset(here: Workspace, dataset_name: str) -> DatasetJson:
    """Read dataset.json of a labelled dataset, and refuse one that breaks nnU-Net's rules or has no foreground."""
    files = [root / dataset_name / "dataset.json" for root in (here.preprocessed, here.raw)]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise MFMError("E_NOT_FOUND", f"{files[0]}: there is no dataset.json. Run mfm_plan_and_preprocess.")
    dataset = DatasetJson.read(file, f"Make it again with: mfm_plan_and_preprocess -d {dataset_name}")
    if dataset.task == "segmentation" and not dataset.foreground:
        raise MFMError(
            "E_CONFIG",
            f"{dataset_name} has no labels to segment ({file}, 'labels'). A corpus without labels is only for "
            "pretraining: mfm_pretrain.",
        )
    return dataset


def select_labelled(raw: Path | None, preprocessed_folder: Path, data: Path) -> Selection:
    """Select the dataset's current labelled cases from a folder ``data`` (blosc2, or nnU-Net's older npz).

    ``raw`` and ``preprocessed_folder`` belong to the dataset. Raises MFMError: E_CONFIG when files of a case are
    missing, E_SHORT_DATA when one is damaged, and those of :func:`mfm_nnunet.data.corpus.select`.
    """
    images = stored_cases(data)
    selection = select(raw, preprocessed_folder, images or {file.stem for file in data.glob("*.npz")})
    used = images & set(selection.names)
    needed = ("_seg.b2nd", ".pkl")
    unusable = sorted(case for case in used if not all((data / (case + ending)).is_file() for ending in needed))
    if unusable:
        raise MFMError(
            "E_CONFIG",
            f"{data}: {len(unusable)} of {len(used)} preprocessed cases have no label or are incomplete, e.g. "
            f"{', '.join(unusable[:5])}. A corpus without labels can only be pretrained on (mfm_pretrain); for a "
            "labelled dataset run mfm_plan_and_preprocess again, which adds what is missing.",
        )
    require_whole(data, used)
    return selection


def read_fingerprint(preprocessed_folder: Path) -> dict[str, Any]:
    """Read a dataset's fingerprint for the model folder, without our own part, which names cases.

    Raises MFMError (E_NOT_FOUND, E_FORMAT).
    """
    advice = "It belongs in the model folder. Make it again with: mfm_plan_and_preprocess -d "
    fingerprint = read_json(preprocessed_folder / "dataset_fingerprint.json", advice + preprocessed_folder.name)
    return {name: value for name, value in fingerprint.items() if name != "mfm"}


class CheckedBlosc2(nnUNetDatasetBlosc2):
    """A folder of ``.b2nd`` files."""

    def load_case(self, identifier: str) -> Loaded:
        """Open a case. Voxels are read, and damage to them is found, when the arrays are sliced."""
        folder, before = Path(self.source_folder), self.folder_with_segs_from_previous_stage
        image, labels = (open_array(str(folder / f"{identifier}{ending}")) for ending in (".b2nd", "_seg.b2nd"))
        previous = None if before is None else open_array(str(Path(before) / f"{identifier}.b2nd"), VALIDATE_AGAIN)
        return image, labels, previous, _read_case_properties(folder / f"{identifier}.pkl")

    @staticmethod
    def save_seg(
        seg: np.ndarray, output_filename_truncated: str, chunks_seg: Any = None, blocks_seg: Any = None
    ) -> None:
        """Write a mask like nnU-Net, by default in chunks for patches of its default size."""
        if chunks_seg is None:
            blocks, chunks = comp_blosc2_params((1, *seg.shape), (128, 128, 128), seg.itemsize)
            blocks_seg, chunks_seg = blocks[1:], chunks[1:]
        nnUNetDatasetBlosc2.save_seg(seg, output_filename_truncated, chunks_seg, blocks_seg)


class CheckedNumpy(nnUNetDatasetNumpy):
    """A folder of ``.npz`` files, nnU-Net's older layout, next to unpacked ``.npy`` files."""

    def load_case(self, identifier: str) -> Loaded:
        """Read a case."""
        folder, before = Path(self.source_folder), self.folder_with_segs_from_previous_stage
        packed = folder / f"{identifier}.npz"
        image = _read_stored(folder / f"{identifier}.npy", packed, "data")
        labels = _read_stored(folder / f"{identifier}_seg.npy", packed, "seg")
        previous = None
        if before is not None:
            unpacked = Path(before) / f"{identifier}.npy"
            previous = _read_stored(unpacked, unpacked.with_suffix(".npz"), "seg", VALIDATE_AGAIN)
        return image, labels, previous, _read_case_properties(folder / f"{identifier}.pkl")

    @staticmethod
    def unpack_dataset(folder: str, *args: Any, **kwargs: Any) -> None:
        """Unpack like nnU-Net."""
        try:
            nnUNetDatasetNumpy.unpack_dataset(folder, *args, **kwargs)
        except Exception:
            for file in sorted(Path(folder).glob("*.np[yz]")):
                read_arrays(file)
            raise


def find_dataset_class(folder: str, wanted: type[nnUNetBaseDataset] | None = None) -> type[nnUNetBaseDataset]:
    """Return our replacement of nnU-Net's class ``wanted``; by default, of the one that fits a folder's files.

    A class of a user's own trainer is the user's code and is kept.
    """
    ours = {nnUNetDatasetBlosc2: CheckedBlosc2, nnUNetDatasetNumpy: CheckedNumpy}
    found = wanted or nnunet_dataset.infer_dataset_class(folder)
    return ours.get(found, found)


@contextlib.contextmanager
def check_next_stage() -> Iterator[None]:
    """Make the validation of nnU-Net's trainer read the data of a cascade's next stage with our classes.

    It infers the class with a function of its module instead of asking the trainer.
    """
    trainer_module.infer_dataset_class = find_dataset_class
    try:
        yield
    finally:
        trainer_module.infer_dataset_class = nnunet_dataset.infer_dataset_class


def _read_stored(unpacked: Path, packed: Path, name: str, repair: str = PREPROCESS_AGAIN) -> np.ndarray:
    """Return an array of a case from its unpacked file if there is one, else from the packed one."""
    if unpacked.is_file():
        return read_arrays(unpacked, repair)[""]
    arrays = read_arrays(packed, repair)
    if name not in arrays:
        raise unreadable(str(packed), f"there is no '{name}' in it", repair)
    return arrays[name]


def _read_case_properties(file: Path) -> dict[str, Any]:
    """Return a case's properties, which include the foreground locations for crops."""
    properties = read_properties(file)
    places = properties.get("class_locations")
    if not isinstance(places, dict) or not all(_is_voxel_list(voxels) for voxels in places.values()):
        raise unreadable(str(file), "'class_locations', the places of the labels, are missing or no voxels")
    return properties


def _is_voxel_list(value: Any) -> bool:
    """Check for nnU-Net's array of voxels (n, 4), channel first; n may be 0."""
    if not isinstance(value, np.ndarray) or value.ndim == 0:
        return value == [] if isinstance(value, list) else False
    return len(value) == 0 or (value.ndim == 2 and value.shape[1] == 4 and value.dtype.kind in "iu")


def require_geometry(file: Path, properties: dict[str, Any], reader_name: str) -> None:
    """Raise MFMError (E_SHORT_DATA) unless the properties in ``file`` locate the preprocessed image in its scan.

    ``reader_name`` is nnU-Net's class that wrote some of them and will write the mask.
    """
    try:
        whole, inside = (
            np.array(properties[name], float).reshape(3)
            for name in ("shape_before_cropping", "shape_after_cropping_and_before_resampling")
        )
        spacing = np.array(properties["spacing"], float).reshape(3)
        lower, upper = np.array(properties["bbox_used_for_cropping"], float).reshape(3, 2).T
        is_sound = (lower >= 0).all() and (upper <= whole).all() and (upper - lower == inside).all()
        is_sound &= bool((inside > 0).all() and (spacing > 0).all() and np.isfinite(spacing).all())
        is_sound &= _has_place(properties, reader_name)
    except (KeyError, TypeError, ValueError) as error:
        raise unreadable(str(file), f"where the image lies in its scan is missing or odd: {error!r}") from error
    if not is_sound:
        raise unreadable(str(file), "its shapes, box and spacing contradict each other")


def _has_place(properties: dict[str, Any], reader_name: str) -> bool:
    """Check for finite world coordinates of the kind that this reader writes; bitmaps have none."""
    if "SimpleITK" in reader_name:
        place = properties["sitk_stuff"]
        axes = np.array(place["spacing"], float).size
        values = [
            *np.array(place["origin"], float).reshape(axes),
            *np.array(place["direction"], float).reshape(axes**2),
        ]
        return axes in (2, 3) and bool(np.isfinite([*place["spacing"], *values]).all())
    if "Nibabel" in reader_name:
        place = properties["nibabel_stuff"]
        names = {"original_affine", *(("reoriented_affine",) if "Reorient" in reader_name else ())}
        return all(bool(np.isfinite(np.array(place[name], float).reshape(4, 4)).all()) for name in names)
    return True
