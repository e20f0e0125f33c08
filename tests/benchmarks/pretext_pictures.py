"""The pictures of the pretext tasks' pages: what is seen, what is hidden or mixed, the target, and what comes out.

Each task trains a small network for a minute or two on crops of the left hemisphere of the brain template that the
demo uses (it comes with nilearn), then its pictures are drawn of a crop of the right hemisphere, in eval mode. They
show what a task asks, not how well it can be done.

    python -m tests.benchmarks.pretext_pictures --steps 300
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from pathlib import Path

import nibabel
import numpy as np
import torch

from mfm_nnunet.demo.data import MIDLINE, find_template
from mfm_nnunet.engine.optim import make_optimizer
from mfm_nnunet.models.backbone import make_backbone
from mfm_nnunet.models.networks import build_network
from mfm_nnunet.models.primus_family import primus_architecture
from mfm_nnunet.reports.examples import plot_examples
from mfm_nnunet.tasks.base import ItemTransform, PretextTask, find_task, list_tasks
from tests.builders.architectures import resenc

PICTURES = Path(__file__).parents[2] / "documentation" / "reference" / "pictures"
PATCH, VOXEL_MM = (24, 48, 48), 1.5
BATCH = {"simclr": 8, "swin_unetr": 4}
"""Items per step; two for the other tasks."""
LONGER = {"models_genesis": 4, "volume_fusion": 4}
"""Tasks that take so many times ``--steps`` until there is something to see."""
SEEDS = {"volume_fusion": 1, "models_genesis": 1}
"""Seed of the item that is drawn, where the first one shows little."""
MAX_BYTES, NUM_COLOURS = 150_000, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [task.name for task in list_tasks()]
    parser.add_argument("--tasks", nargs="+", default=names, choices=names)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=PICTURES)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    left, right = hemispheres()
    for name in arguments.tasks:
        start = time.process_time()
        task, transform = make_task(name)
        loss = train(task, transform, left, arguments.steps * LONGER.get(name, 1))
        file = arguments.out / f"pretext_{name}.png"
        draw(task, transform, right, file)
        seconds = time.process_time() - start
        print(f"{file.name}: loss {loss:.4f}, {file.stat().st_size / 1e3:.0f} kB, {seconds:.0f} CPU s", flush=True)


def hemispheres() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Front and back (C, D, H, W) of the left and of the right hemisphere, z-scored; D from top to bottom."""
    from scipy.ndimage import zoom

    brain = np.asarray(nibabel.Nifti1Image.from_filename(find_template("t1")).dataobj, np.float32)[:, 24:212, 2:156]
    brain = (brain - brain.mean()) / brain.std()
    voxels = [zoom(part, 1 / VOXEL_MM, order=1) for part in (brain[24:MIDLINE], brain[MIDLINE + 1 : 2 * MIDLINE - 23])]
    # Axes x y z, to the right, front and top, become z y x as a picture has them.
    sides = [part.transpose(2, 1, 0)[None, ::-1, ::-1] for part in voxels]
    middle = sides[0].shape[2] // 2
    left, right = ([side[:, :, : middle + 8], side[:, :, middle - 8 :]] for side in sides)
    return left, right


def make_task(name: str) -> tuple[PretextTask, ItemTransform]:
    """The task with its default settings on a small network; on the ResEnc U-Net where it works there."""
    task_class = find_task(name)
    torch.manual_seed(0)
    is_resenc = task_class.needs != "tokens"
    architecture = resenc(3, (8, 16, 32, 64), (1, 2, 2, 2)) if is_resenc else primus_architecture("CPU", PATCH)
    plans = {"plans_name": name, "configurations": {"3d": {"patch_size": list(PATCH), "architecture": architecture}}}
    config = task_class.Config()
    network = build_network(plans, "3d", 1, task_class.num_outputs(config, 1))
    backbone = make_backbone(network, PATCH, task_class.restoring)
    config = task_class.resolve(config, backbone.geometry())
    return task_class(config, backbone), task_class.transform(config, PATCH)


def make_item(transform: ItemTransform, volumes: list[np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """An item of randomly chosen volumes, with crops at random places."""
    order = rng.permutation(len(volumes))
    crops = []
    for request in transform.requests(rng):
        volume = volumes[order[request.volume]]
        padding = [(0, max(0, size - have) if request.pad else 0) for size, have in zip(request.size, volume.shape[1:])]
        volume = np.pad(volume, [(0, 0), *padding], constant_values=volume.min())
        lower = [int(rng.integers(0, max(0, have - size) + 1)) for size, have in zip(request.size, volume.shape[1:])]
        window = tuple(slice(low, low + size) for low, size in zip(lower, request.size))
        crops.append(np.ascontiguousarray(volume[(slice(None), *window)]))
    return transform(crops, rng)


def make_batch(items: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.stack([item[name] for item in items])) for name in items[0]}


def train(task: PretextTask, transform: ItemTransform, volumes: list[np.ndarray], steps: int) -> float:
    """Train for some steps; the mean loss of the last tenth."""
    weights = [weight for weight in task.parameters() if weight.requires_grad]
    optimizer = make_optimizer(weights, "adamw", 1e-3, 0.01)
    rng, losses, size = np.random.default_rng(0), [], BATCH.get(task.name, 2)
    task.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 20) * (1 - step / steps) ** 0.9
        batch = make_batch([make_item(transform, volumes, rng) for _ in range(size)])
        loss = task(batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 12.0)
        optimizer.step()
        task.after_step((step + 1) / steps)
        losses.append(float(loss.detach()))
    assert np.isfinite(losses).all(), f"{task.name} diverged"
    return float(np.mean(losses[-max(1, steps // 10) :]))


@torch.no_grad()
def draw(task: PretextTask, transform: ItemTransform, volumes: list[np.ndarray], file: Path) -> None:
    """The task's own pictures of one item, one row, as a PNG with a palette."""
    from PIL import Image

    rng = np.random.default_rng(SEEDS.get(task.name, 0))
    batch = make_batch([make_item(transform, volumes, rng) for _ in range(BATCH.get(task.name, 2))])
    pictures = task.eval()(batch).pictures
    assert pictures, f"{task.name} draws no pictures"
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain.png"
        volumes_shown = {name: volume.float().numpy() for name, volume in pictures.items()}
        plot_examples(volumes_shown, plain, f"{task.name} on {task.backbone.family}", slice_axes=(0,))
        image = Image.open(io.BytesIO(plain.read_bytes())).convert("RGB")
    image.quantize(NUM_COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)
    assert file.stat().st_size <= MAX_BYTES, f"{file} is too large for the documentation"


if __name__ == "__main__":
    main()
