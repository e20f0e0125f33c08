"""Data sets that consist of a fingerprint and empty image files: all that planning looks at."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mfm_nnunet import checkpoint, workspace
from mfm_nnunet.workspace import Workspace

INTENSITIES = {"mean": 30.0, "std": 9.0, "median": 29.0, "min": 0.0, "max": 99.0}
INTENSITIES |= {"percentile_99_5": 90.0, "percentile_00_5": 1.0}
HIPPOCAMPUS = {"shapes": [[36, 50, 35]] * 20, "spacings": [[1.0, 1.0, 1.0]] * 20}
BRAIN = {"shapes": [[155, 240, 200]] * 20, "spacings": [[1.0, 1.0, 1.0]] * 20}
ABDOMEN = {"shapes": [[320, 90, 320]] * 20, "spacings": [[0.8, 2.5, 0.8]] * 20}
XRAY = {"shapes": [[1, 512, 480]] * 20, "spacings": [[999.0, 1.0, 1.0]] * 20}


@contextmanager
def workspace_with(
    root: Path,
    name: str,
    shapes: Sequence[Sequence[int]],
    spacings: Sequence[Sequence[float]],
    channels: Sequence[str] = ("MRI",),
    labels: Sequence[str] = ("background", "front", "back"),
    is_corpus: bool = False,
    relative_size: float = 1.0,
) -> Iterator[Workspace]:
    """A workspace in ``root`` with one more data set (nnU-Net's variables are set inside the block)."""
    with workspace.use(root) as here:
        raw, preprocessed = here.raw / name, here.preprocessed / name
        for folder in (raw / "imagesTr", raw / "labelsTr", preprocessed):
            folder.mkdir(parents=True, exist_ok=True)
        images = []
        for index in range(len(shapes)):
            images.append([str(raw / "imagesTr" / f"case{index:02d}_{c:04d}.nrrd") for c in range(len(channels))])
            for file in images[-1]:
                Path(file).touch()
            (raw / "labelsTr" / f"case{index:02d}.nrrd").touch()
        dataset_json = {
            "channel_names": {str(index): channel for index, channel in enumerate(channels)},
            "labels": {"background": 0} if is_corpus else {label: value for value, label in enumerate(labels)},
            "numTraining": len(shapes),
            "file_ending": ".nrrd",
            "overwrite_image_reader_writer": "SimpleITKIO",
        }
        write_json(raw / "dataset.json", dataset_json)
        if is_corpus:
            cases = [{"name": f"case{i:02d}", "images": files, "subject": f"s{i}"} for i, files in enumerate(images)]
            write_json(raw / "corpus.json", {"format": 1, "source": str(raw), "cases": cases})
        fingerprint = {
            "spacings": [list(item) for item in spacings],
            "shapes_after_crop": [list(item) for item in shapes],
            "foreground_intensity_properties_per_channel": {str(c): INTENSITIES for c in range(len(channels))},
            "median_relative_size_after_cropping": relative_size,
        }
        write_json(preprocessed / "dataset_fingerprint.json", fingerprint)
        yield here


def pretrained_checkpoint(file: Path, plans: dict[str, Any], configuration: str, **changes: Any) -> Path:
    """A file that says of itself what a pretrained checkpoint says (its weights are not of this network)."""
    mfm = {
        "format": 1,
        "kind": "pretrained",
        "pretext": "mae",
        "plans": plans,
        "configuration": configuration,
        "num_inputs": 1,
        "num_outputs": 1,
        **changes,
    }
    checkpoint.save({"network_weights": {"a": torch.zeros(1)}, "mfm": mfm}, file)
    return file


def write_json(file: Path, content: Any) -> None:
    """``content`` as JSON."""
    file.write_text(json.dumps(content))
