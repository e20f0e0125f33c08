"""Known truth: hide one class in half of the training cases and another class in the other half, and learn both.

    python -m tests.benchmarks.partial_labels --data DATA/Dataset004_Hippocampus --work partial --seeds 3

The arms differ in what a hidden class is: background, part of the background's probability (marginal), left out of the
softmax (heads), a masked sigmoid; "full" hides nothing. The table is ``partial/table.md``.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mfm_nnunet.data.class_table import FILE
from mfm_nnunet.files import write_json
from mfm_nnunet.images.reading import read_label
from mfm_nnunet.jobs.plan import plan_and_preprocess
from mfm_nnunet.jobs.train import train
from tests.builders.architectures import resenc

ARMS = {
    "background": (900, "finetune.partial_labels=background"),
    "heads": (900, "finetune.partial_labels=heads"),
    "marginal": (900, "finetune.partial_labels=auto"),
    "sigmoid": (901, "finetune.partial_labels=auto"),
    "full": (902, "finetune.partial_labels=auto"),
}
"""Number of the union, and the setting."""
PARTS = {4: "train", 5: "train", 6: "val"}
"""Datasets: the first annotates the first class, the second the second one, the third both. The last one tests."""


def main(argv: Sequence[str] | None = None) -> None:
    """Make the datasets, train every arm with every seed, and write the table after each training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=40, help="cases that train")
    parser.add_argument("--test", type=int, default=40, help="cases that test")
    parser.add_argument("--spacing", nargs=3, default=["2", "2", "2"])
    parser.add_argument("--features", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--finetune", nargs="+", default=["finetune.epochs=8"])
    options = parser.parse_args(argv)
    results: dict[str, list[dict[str, float]]] = {}
    for number in (900, 901, 902):
        prepare(options, number)
    for seed in range(options.seeds):
        for arm in ARMS:
            results.setdefault(arm, []).append(run(options, arm, seed))
            (options.work / "table.md").write_text(format_table(results))
            print(f"seed {seed}  {arm}  {results[arm][-1]}", flush=True)


def prepare(options: argparse.Namespace, union: int) -> None:
    """Write the three datasets of a union and plan it, with a small network."""
    cases = sorted(file.name for file in (options.data / "labelsTr").glob("*.nii.gz"))
    order = [str(name) for name in np.random.default_rng(0).permutation(cases)]
    half, end = options.train // 2, options.train
    members = {4: order[:half], 5: order[half:end], 6: order[end : end + options.test]}
    root = options.work / str(union)
    for number, names in members.items():
        write_part(options.data, root, number, names, hides=union != 902)
    kwargs: dict[str, Any] = {"configurations": ["3d_fullres"], "workspace": root}
    spacing: Any = tuple(map(float, options.spacing))
    (result,) = plan_and_preprocess([union], universal=[4, 5, 6], spacing=spacing, **kwargs)
    file = root / "nnUNet_raw" / result.plans["dataset_name"] / FILE
    content = json.loads(file.read_text())
    write_json(file, {**content, "confirmed": True, "exclusive": union != 901})
    if union == 901:  # the table was changed
        (result,) = plan_and_preprocess([union], spacing=spacing, **kwargs)
    plans = result.plans
    plans["configurations"]["3d_fullres"]["architecture"] = resenc(3, tuple(options.features))
    for arm in (arm for arm, (number, _) in ARMS.items() if number == union):
        for seed in range(options.seeds):
            name = f"mfm_{arm}_{seed}"
            write_json(result.file.with_name(f"{name}.json"), {**plans, "plans_name": name})


def write_part(data: Path, root: Path, number: int, names: Sequence[str], hides: bool) -> None:
    """Write one dataset: links, a list of one fold, and labels; a hidden class is not in its dataset.json."""
    content = json.loads((data / "dataset.json").read_text())
    classes = [name for name in content["labels"] if name != "background"]
    shown = classes if number == 6 or not hides else [classes[number - 4]]
    folder = root / "nnUNet_raw" / f"Dataset{number:03d}_Part"
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    labels = {"background": 0, **{name: index for index, name in enumerate(shown, 1)}}
    write_json(folder / "dataset.json", {**content, "labels": labels, "numTraining": len(names)})
    for name in names:
        image = name.replace(".nii.gz", "_0000.nii.gz")
        link(data / "imagesTr" / image, folder / "imagesTr" / image)
        if shown == classes:
            link(data / "labelsTr" / name, folder / "labelsTr" / name)
        else:
            write_label(data / "labelsTr" / name, folder / "labelsTr" / name, content["labels"][shown[0]])
    stems = [name.removesuffix(".nii.gz") for name in names]
    fold: dict[str, list[str]] = {"train": [], "val": []} | {PARTS[number]: stems}
    base = root / "nnUNet_preprocessed" / folder.name
    base.mkdir(parents=True, exist_ok=True)
    write_json(base / "splits_final.json", [fold])


def link(source: Path, target: Path) -> None:
    if not target.is_symlink():
        os.symlink(source.resolve(), target)


def write_label(source: Path, target: Path, value: int) -> None:
    import nibabel

    image: Any = nibabel.load(source)
    assert value in read_label(source, "SimpleITKIO")[0], f"{source} has no label {value}"
    shown = (np.asarray(image.dataobj) == value).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(shown, image.affine, image.header), target)


def run(options: argparse.Namespace, arm: str, seed: int) -> dict[str, float]:
    """Train one arm and return the Dice of each class in the test cases."""
    union, setting = ARMS[arm]
    root = options.work / str(union)
    done = next(root.glob(f"nnUNet_results/*/MFMTrainer__mfm_{arm}_{seed}__*/fold_0/validation/summary.json"), None)
    if done is None:
        common = ("finetune.mirroring=false", "finetune.validation_iterations=1", "num_workers=0", f"seed={seed}")
        folder = train(
            union, "3d_fullres", 0, plans_name=f"mfm_{arm}_{seed}", workspace=root, device="cpu",
            settings=(*options.finetune, *common, setting),
        )  # fmt: skip
        done = folder / "validation" / "summary.json"
    return json.loads(done.read_text())["dice_per_dataset"]["Dataset006_Part"]


def format_table(results: dict[str, list[dict[str, float]]]) -> str:
    """Return the table of means and standard deviations over seeds."""
    classes = list(next(iter(results.values()))[0])
    lines = [f"| hidden class is | {' | '.join(classes)} | mean | seeds |", "|---" * (len(classes) + 3) + "|"]
    for arm, found in results.items():
        columns = [[row[name] for row in found] for name in classes]
        columns.append([float(np.mean([*row.values()])) for row in found])
        cells = [f"{np.mean(values):.3f} ± {np.std(values):.3f}" for values in columns]
        lines.append(f"| {arm} | {' | '.join(cells)} | {len(found)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
