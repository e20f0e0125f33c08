"""nnU-Net's preprocessed datasets, as training and validation read them: nothing in a file runs code.

The classes take the place of nnU-Net's own, whose ``load_case`` follows pickles and blosc2's metalayers. A file that
cannot be read is named, also when it is damaged in its middle, which shows only when its voxels are read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading import nnunet_dataset
from nnunetv2.training.dataloading.nnunet_dataset import (
    comp_blosc2_params,
    nnUNetBaseDataset,
    nnUNetDatasetBlosc2,
    nnUNetDatasetNumpy,
)
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as trainer_module
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from mfm_nnunet.data.volumes import PREPROCESS_AGAIN, open_array, read_arrays, read_properties, unreadable

VALIDATE_AGAIN = "validate the fold of the first stage that holds the case again (mfm_train --val), which writes it."

Loaded = tuple[Any, Any, Any, dict[str, Any]]
"""nnU-Net's image (C, D, H, W), label map (1, D, H, W), mask of the stage before (or None), and properties."""


class CheckedBlosc2(nnUNetDatasetBlosc2):
    """A folder of ``.b2nd`` files."""

    def load_case(self, identifier: str) -> Loaded:
        """Open a case; voxels are read, and damage to them is found, when the arrays are sliced.

        Raises MFMError: E_SHORT_DATA, E_DATA_UNSAFE.
        """
        folder, before = Path(self.source_folder), self.folder_with_segs_from_previous_stage
        image, labels = (open_array(str(folder / f"{identifier}{ending}")) for ending in (".b2nd", "_seg.b2nd"))
        previous = None if before is None else open_array(str(Path(before) / f"{identifier}.b2nd"), VALIDATE_AGAIN)
        return image, labels, previous, _properties_of(folder / f"{identifier}.pkl")

    @staticmethod
    def save_seg(
        seg: np.ndarray, output_filename_truncated: str, chunks_seg: Any = None, blocks_seg: Any = None
    ) -> None:
        """Write a mask as nnU-Net does, in chunks for patches of its default size where it gives none."""
        if chunks_seg is None:
            blocks, chunks = comp_blosc2_params((1, *seg.shape), (128, 128, 128), seg.itemsize)
            blocks_seg, chunks_seg = blocks[1:], chunks[1:]
        nnUNetDatasetBlosc2.save_seg(seg, output_filename_truncated, chunks_seg, blocks_seg)


class CheckedNumpy(nnUNetDatasetNumpy):
    """A folder of ``.npz`` files, nnU-Net's older layout, with unpacked ``.npy`` files beside them."""

    def load_case(self, identifier: str) -> Loaded:
        """Read a case. Raises MFMError: E_SHORT_DATA, E_DATA_UNSAFE."""
        folder, before = Path(self.source_folder), self.folder_with_segs_from_previous_stage
        packed = folder / f"{identifier}.npz"
        image = _stored(folder / f"{identifier}.npy", packed, "data")
        labels = _stored(folder / f"{identifier}_seg.npy", packed, "seg")
        previous = None
        if before is not None:
            unpacked = Path(before) / f"{identifier}.npy"
            previous = _stored(unpacked, unpacked.with_name(f"{identifier}.npz"), "seg", VALIDATE_AGAIN)
        return image, labels, previous, _properties_of(folder / f"{identifier}.pkl")

    @staticmethod
    def unpack_dataset(folder: str, *args: Any, **kwargs: Any) -> None:
        """Unpack as nnU-Net does. Raises MFMError (E_SHORT_DATA, E_DATA_UNSAFE) naming the file that it cannot read."""
        try:
            nnUNetDatasetNumpy.unpack_dataset(folder, *args, **kwargs)
        except Exception:
            for file in sorted(Path(folder).glob("*.np[yz]")):
                read_arrays(file)
            raise


def checked(dataset_class: type[nnUNetBaseDataset]) -> type[nnUNetBaseDataset]:
    """Return our class in place of nnU-Net's; a class of a user's own trainer is his own code and stays."""
    ours = {nnUNetDatasetBlosc2: CheckedBlosc2, nnUNetDatasetNumpy: CheckedNumpy}
    return ours.get(dataset_class, dataset_class)


def use_checked_data(trainer: nnUNetTrainer) -> None:
    """Let a trainer of others read its data with our classes, and look at each case once.

    Its background processes would hide the names of files that are refused. Raises MFMError (E_SHORT_DATA,
    E_DATA_UNSAFE).
    """
    if not trainer.was_initialized:
        trainer.initialize()
    folder = trainer.preprocessed_dataset_folder
    found: Any = checked(trainer.dataset_class or nnunet_dataset.infer_dataset_class(folder))
    trainer.dataset_class = found
    dataset = found(folder)
    for case in dataset.identifiers:
        dataset.load_case(case)


@contextlib.contextmanager
def next_stage_checked() -> Iterator[None]:
    """Inside, the validation of nnU-Net's trainer reads the data of a cascade's next stage with our classes.

    It infers their class by a function of its module instead of asking the trainer.
    """
    trainer_module.infer_dataset_class = lambda folder: checked(nnunet_dataset.infer_dataset_class(folder))
    try:
        yield
    finally:
        trainer_module.infer_dataset_class = nnunet_dataset.infer_dataset_class


def _stored(unpacked: Path, packed: Path, name: str, repair: str = PREPROCESS_AGAIN) -> np.ndarray:
    """Return an array of a case, from its own file if there is one, else from the packed one."""
    if unpacked.is_file():
        return read_arrays(unpacked, repair)[""]
    arrays = read_arrays(packed, repair)
    if name not in arrays:
        raise unreadable(str(packed), f"there is no '{name}' in it", repair)
    return arrays[name]


def _properties_of(file: Path) -> dict[str, Any]:
    """Return a case's properties, which say where crops with foreground lie."""
    properties = read_properties(file)
    places = properties.get("class_locations")
    if not isinstance(places, dict) or not all(_are_voxels(voxels) for voxels in places.values()):
        raise unreadable(str(file), "'class_locations', the places of the labels, are missing or no voxels")
    return properties


def require_geometry(file: Path, properties: dict[str, Any], reader_name: str) -> None:
    """Raise MFMError (E_SHORT_DATA) unless properties from ``file`` say where in its scan a preprocessed image lies.

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
        is_sound &= _is_place(properties, reader_name)
    except (KeyError, TypeError, ValueError) as error:
        raise unreadable(str(file), f"where the image lies in its scan is missing or odd: {error!r}") from error
    if not is_sound:
        raise unreadable(str(file), "its shapes, box and spacing contradict each other")


def _is_place(properties: dict[str, Any], reader_name: str) -> bool:
    """Return whether properties hold finite world coordinates of the kind that a reader writes; pictures have none."""
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


def _are_voxels(value: Any) -> bool:
    """Return whether ``value`` is nnU-Net's array of voxels (n, 4), channel first; n may be 0."""
    if not isinstance(value, np.ndarray) or value.ndim == 0:
        return value == [] if isinstance(value, list) else False
    return len(value) == 0 or (value.ndim == 2 and value.shape[1] == 4 and value.dtype.kind in "iu")
