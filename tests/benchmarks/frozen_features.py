"""What did pretraining put into the features? Voxels are classified from the frozen network by ridge regression.

For each checkpoint, and for the same network untrained, the outputs of all decoder stages (brought to full resolution)
are the features of a voxel. A linear classifier is fitted on the labelled cases of one dataset and tested on those that
only a larger one has. It is no substitute for fine-tuning; it tells whether there was anything to transfer.

    python -m tests.benchmarks.frozen_features --preprocessed STUDY/nnUNet_preprocessed --fit Dataset704_Hippocampus8 \
        --test Dataset705_Hippocampus32 --plans mfmStudyPlans --checkpoints A.pth B.pth
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import blosc2
import numpy as np
import torch
from torch import nn

from mfm_nnunet import checkpoint
from mfm_nnunet.models.networks import build_network
from mfm_nnunet.models.transfer import transfer_weights

VOXELS_PER_CASE = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preprocessed", type=Path, required=True)
    parser.add_argument("--fit", required=True, help="dataset whose cases the classifier is fitted on")
    parser.add_argument("--test", required=True, help="dataset whose other cases it is tested on")
    parser.add_argument("--plans", required=True)
    parser.add_argument("--checkpoints", type=Path, nargs="+", required=True)
    arguments = parser.parse_args()
    plans = json.loads((arguments.preprocessed / arguments.fit / f"{arguments.plans}.json").read_text())
    fit = cases(arguments.preprocessed / arguments.fit, plans)
    test = {n: f for n, f in cases(arguments.preprocessed / arguments.test, plans).items() if n not in fit}
    print(f"fitted on {len(fit)} cases, tested on {len(test)}")
    for name, file in [("untrained", None), *((str(f.parent.name), f) for f in arguments.checkpoints)]:
        torch.manual_seed(0)
        network = build_network(plans, "3d_fullres", 1, 3).eval()
        if file is not None:
            transfer_weights(checkpoint.load_weights(file)["network_weights"], network)
        scores = probe(network, list(fit.values()), list(test.values()))
        print(f"{name:60} Dice {' '.join(f'{score:.3f}' for score in scores)}  mean {np.mean(scores):.3f}", flush=True)


def cases(folder: Path, plans: dict) -> dict[str, Path]:
    data = folder / plans["configurations"]["3d_fullres"]["data_identifier"]
    return {file.stem: file for file in sorted(data.glob("*.b2nd")) if not file.stem.endswith("_seg")}


def probe(network: nn.Module, fit: list[Path], test: list[Path]) -> np.ndarray:
    """Dice per label, averaged over the test cases."""
    rng = np.random.default_rng(0)
    features, labels = [], []
    for file in fit:
        x_FN, y_N = voxels(network, file)
        chosen = rng.permutation(len(y_N))[:VOXELS_PER_CASE]
        features.append(x_FN[:, chosen])
        labels.append(y_N[chosen])
    x, y = np.concatenate(features, 1), np.concatenate(labels)
    mean, std = x.mean(1, keepdims=True), x.std(1, keepdims=True) + 1e-6
    x = np.vstack([(x - mean) / std, np.ones((1, x.shape[1]))])
    weights = np.sqrt(1 / np.bincount(y, minlength=3))[y]  # rare labels count as much as background
    scaled = x * weights
    solution = np.linalg.solve(scaled @ scaled.T + 1e-3 * np.eye(len(x)), scaled @ (np.eye(3)[y] * weights[:, None]))
    scores = []
    for file in test:
        x_FN, y_N = voxels(network, file)
        predicted = (np.vstack([(x_FN - mean) / std, np.ones((1, len(y_N)))]).T @ solution).argmax(1)
        sums = [(y_N == k).sum() + (predicted == k).sum() for k in (1, 2)]
        scores.append([2 * ((y_N == k) & (predicted == k)).sum() / max(s, 1) for k, s in zip((1, 2), sums)])
    return np.mean(scores, 0)


@torch.no_grad()
def voxels(network: nn.Module, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Features (F, N) and labels (N,) of all voxels of a case."""
    image = torch.from_numpy(blosc2.open(str(file))[:])
    label = np.maximum(blosc2.open(str(file.with_name(f"{file.stem}_seg.b2nd")))[0], 0)
    padding = [p for size in reversed(image.shape[1:]) for p in (0, -size % 8)]
    stages: list[torch.Tensor] = []
    hooks = [s.register_forward_hook(lambda m, i, o: stages.append(o)) for s in network.decoder.stages]  # type: ignore[union-attr]
    network(nn.functional.pad(image, padding)[None])
    for hook in hooks:
        hook.remove()
    size = stages[-1].shape[2:]
    full = [nn.functional.interpolate(stage, size=size, mode="trilinear", align_corners=False)[0] for stage in stages]
    inside = torch.cat(full)[:, : label.shape[0], : label.shape[1], : label.shape[2]]
    return inside.flatten(1).numpy(), label.ravel().astype(np.int64)


if __name__ == "__main__":
    main()
