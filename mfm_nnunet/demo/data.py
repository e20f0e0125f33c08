"""Data of the demo: real images with labels, split into cases to train on and test cases.

By default these are blocks of the T1 brain template in the nilearn wheel (MNI ICBM 152, 1 mm), with labels made from
its grey- and white-matter maps. Blocks share no voxel. The left hemisphere trains and the right one tests. The template
is exactly left-right symmetric, so a block equals its mirror image. Therefore blocks are coloured like a chessboard:
left blocks of one colour train, right blocks of the other test, and no tested voxel was seen mirrored in training.
"""

from __future__ import annotations

import csv
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import inside, write_json
from mfm_nnunet.jobs.preflight import Case, read_raw_dataset

TEMPLATE = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
LABELS = {"background": 0, "grey_matter": 1, "white_matter": 2}
BLOCK = (24, 32, 24)
"""Size of a block in voxels (1 mm) along right, anterior and superior."""
NUM_BLOCKS = (3, 5, 5)
"""Blocks per hemisphere; with BLOCK and START they tile the brain."""
START = (26, 38, 18)
"""First voxel of the left hemisphere's blocks; the right blocks are their mirror images."""
MIDLINE = 98
"""The voxel plane x = 0, which belongs to neither hemisphere."""
MIN_TISSUE = 0.15
"""Minimum share of brain tissue in a block."""
TEST_EVERY, MOST_TEST = 5, 8
"""With ``--data``, every fifth labelled case is a test case, up to this number."""
NUM_LABELS = 8
"""Cases with labels in a fine-tuning."""


@dataclass(frozen=True)
class Split:
    """Cases of a demo: all of ``train`` pretrain without labels, few of them fine-tune, ``test`` is predicted."""

    train: list[Case]
    test: list[Case]
    dataset_json: dict[str, Any]

    def folds(self, count: int) -> list[dict[str, list[str]]]:
        """Return nnU-Net's splits: each fold trains on other labels, spread evenly, and validates on the test cases."""
        names, step = [case.name for case in self.train], max(1, len(self.train) // NUM_LABELS)
        chosen = [(names[fold:] + names[:fold])[::step][:NUM_LABELS] for fold in range(count)]
        return [{"train": few, "val": [case.name for case in self.test]} for few in chosen]

    @property
    def is_2d(self) -> bool:
        """Check if the images have two dimensions (or one slice)."""
        import SimpleITK as sitk

        reader = sitk.ImageFileReader()
        reader.SetFileName(str(self.test[0].images[0]))
        reader.ReadImageInformation()
        return sum(size > 1 for size in reader.GetSize()) <= 2


def split_template(folder: Path) -> Split:
    """Cut the template into NIfTI blocks in ``folder``; every fourth right one is for testing."""
    import nibabel

    maps: list[Any] = [nibabel.load(find_template(name)) for name in ("t1", "gm", "wm")]
    t1, grey, white = maps
    labels = tissue_labels(np.asarray(grey.dataobj), np.asarray(white.dataobj))
    folder.mkdir(parents=True, exist_ok=True)
    cases: dict[str, list[Case]] = {"left": [], "right": []}
    for hemisphere, (i, j, k), where in template_blocks(t1.affine):
        if (labels[where] > 0).mean() < MIN_TISSUE or (i + j + k) % 2 != (hemisphere == "right"):
            continue
        name = f"{hemisphere}_{i}{j}{k}"
        image, label = folder / f"{name}.nii.gz", folder / f"{name}_tissue.nii.gz"
        _save_block(image, t1, np.asarray(t1.dataobj), where)
        _save_block(label, t1, labels, where)
        cases[hemisphere].append(Case(name, (image,), label, name))
    dataset_json = {"channel_names": {"0": "MRI"}, "labels": LABELS, "file_ending": ".nii.gz"}
    return Split(cases["left"], cases["right"][::4], dataset_json)


def find_template(name: str) -> Path:
    """Find the file of a map (``t1``, ``gm``, ``wm``) in the installed nilearn without importing it."""
    spec = importlib.util.find_spec("nilearn")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / "datasets" / "data" / TEMPLATE.format(name)
        if file.is_file():
            return file
    raise MFMError(
        "E_NOT_FOUND",
        "the demo needs the brain template of the package nilearn, which is not installed or lacks it. "
        "Run: pip install 'mfm_nnunet[demo]', or use your own data with --data DIR.",
    )


def template_blocks(affine: np.ndarray) -> list[tuple[str, tuple[int, int, int], tuple[slice, slice, slice]]]:
    """List hemisphere, grid position and voxels of all blocks; i counts from the side towards the midline."""
    assert affine[0, 0] > 0, "the template's first axis must point to the right"
    blocks = []
    for place in np.ndindex(NUM_BLOCKS):
        left, y, z = (slice(s + size * p, s + size * (p + 1)) for s, size, p in zip(START, BLOCK, place))
        right = slice(2 * MIDLINE - left.stop + 1, 2 * MIDLINE - left.start + 1)
        blocks += [("left", place, (left, y, z)), ("right", place, (right, y, z))]
    return blocks


def tissue_labels(grey: np.ndarray, white: np.ndarray) -> np.ndarray:
    """Make labels from maps of 0 to 255: background if their sum is below one half, else the larger map."""
    is_tissue = grey.astype(np.int32) + white >= 128
    return np.where(is_tissue, np.where(grey >= white, 1, 2), 0).astype(np.uint8)


def split_folder(folder: Path) -> Split:
    """Split a labelled dataset in nnU-Net's raw format: every fifth case by name tests, the others train."""
    if not (folder / "dataset.json").is_file():
        raise MFMError("E_NOT_FOUND", f"--data {folder}: no dataset.json. Give a dataset in nnU-Net's raw format.")
    dataset = read_raw_dataset(folder)
    cases = sorted((case for case in dataset.cases if case.label is not None), key=lambda case: case.name)
    if len(cases) < 3:
        raise MFMError("E_CONFIG", f"--data {folder}: {len(cases)} labelled cases. The demo needs at least three.")
    test = (cases[TEST_EVERY - 1 :: TEST_EVERY] or cases[-1:])[:MOST_TEST]
    return Split([case for case in cases if case not in test], test, dataset.content)


def write_corpus(split: Split, file: Path) -> None:
    """Write the corpus as a CSV for ``--images``; the images are not copied."""
    num_channels = len(split.train[0].images)
    with open(file, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(["case", *(f"image_{channel}" for channel in range(num_channels))])
        writer.writerows([case.name, *(image.absolute() for image in case.images)] for case in split.train)


def write_dataset(split: Split, folder: Path) -> None:
    """Write all cases as an nnU-Net raw dataset that refers to the original files."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {
        case.name: {"images": [str(image.absolute()) for image in case.images], "label": str(case.label.absolute())}
        for case in (*split.train, *split.test)
        if case.label is not None
    }
    content = {**split.dataset_json, "numTraining": len(entries), "dataset": entries}
    write_json(folder / "dataset.json", content, 2)


def write_test_folder(split: Split, folder: Path) -> None:
    """Link the test images under the names that prediction expects (``case_0000.nii.gz``)."""
    folder.mkdir(parents=True, exist_ok=True)
    ending = split.dataset_json["file_ending"]
    for case in split.test:
        for channel, image in enumerate(case.images):
            inside(folder, f"{case.name}_{channel:04d}{ending}").symlink_to(image.resolve())


def _save_block(file: Path, template: Any, volume: np.ndarray, where: tuple[slice, slice, slice]) -> None:
    """Write a block at its true position in the template's world coordinates."""
    import nibabel

    affine = template.affine.copy()
    affine[:3, 3] = (template.affine @ [*(axis.start for axis in where), 1])[:3]
    block = nibabel.Nifti1Image(np.ascontiguousarray(volume[where]), affine)
    block.header.set_xyzt_units("mm")
    nibabel.save(block, file)
