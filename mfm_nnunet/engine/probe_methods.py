"""The two kinds of probe: a linear classifier of frozen features, and a short fine-tuning of a copy.

Both give a function from patches to the scores of the classes. Everything random is drawn from the generators given or
from the seed; torch's generator must be forked by the caller.

Legend: B batch, C channels, F features, K classes, N voxels, D H W voxels of a patch (2D: H W).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mfm_nnunet.device import autocast
from mfm_nnunet.engine.optim import learning_rate_factor, make_optimizer
from mfm_nnunet.engine.probe_data import LabelledVolume, Tile
from mfm_nnunet.models.backbone import AbstractBackbone
from mfm_nnunet.models.networks import build_network
from mfm_nnunet.models.transfer import transfer_weights

Labeller = Callable[[Tensor], Tensor]
"""Patches (B, C, D, H, W) to scores (B, K, D, H, W)."""
NUM_VOXELS = 20_000
"""Voxels that the linear classifier learns from, over all cases and classes."""
TILES_PER_CLASS = 2
"""Patches per case and class that they are taken from, so that a large volume costs little."""
PENALTY = 1e-3
"""Weight of the squared norm of the linear classifier, for standardised features."""


def linear_labeller(
    backbone: AbstractBackbone,
    volumes: Sequence[LabelledVolume],
    num_classes: int,
    rng: np.random.Generator,
    features: Callable[[Tensor], list[Tensor]],
) -> Labeller:
    """A multinomial logistic regression from all maps of ``features``, fitted on equally many voxels of each class.

    A class weighs as the square root of its share of all voxels: balanced classes would predict far too much of rare
    ones, and true shares nothing of them, so either Dice would stay low whatever the features are worth.
    """
    patch_size = backbone.patch_size
    quota = max(NUM_VOXELS // (num_classes * len(volumes)), 1)
    x_parts, y_parts = [], []
    for volume in volumes:
        for tile, places, labels in draw_voxels(volume, patch_size, num_classes, quota, rng):
            maps = features(volume.patch(tile, patch_size)[None])
            x_parts.append(features_at(maps, torch.from_numpy(places), patch_size))
            y_parts.append(torch.from_numpy(labels))
    x_NF, y_N = torch.cat(x_parts).double(), torch.cat(y_parts)
    mean, scale = x_NF.mean(0), x_NF.std(0, correction=0).clamp(min=1e-6)
    shares_K = torch.from_numpy(sum(_class_counts(volume.labels, num_classes) for volume in volumes)).double().sqrt()
    weight_KF, bias_K = fit_logistic((x_NF - mean) / scale, y_N, shares_K)
    weight_KF = weight_KF / scale
    bias_K = bias_K - weight_KF @ mean

    def label(x_BCDHW: Tensor) -> Tensor:
        maps = features(x_BCDHW)
        # Scores are linear in the features, so they may be computed at each map's resolution and enlarged then.
        weights = weight_KF.float().to(maps[0].device).split([m.shape[1] for m in maps], dim=1)
        scores = [_enlarged(torch.einsum("kf,bf...->bk...", w, m), patch_size) for w, m in zip(weights, maps)]
        bias = bias_K.float().to(maps[0].device).reshape(-1, *[1] * len(patch_size))
        return torch.stack(scores).sum(0) + bias

    return label


def draw_voxels(
    volume: LabelledVolume, patch_size: Sequence[int], num_classes: int, quota: int, rng: np.random.Generator
) -> list[tuple[Tile, np.ndarray, np.ndarray]]:
    """Tiles of a case with places (N, axes) in them and their labels (N,), at most ``quota`` voxels per class."""
    tiles = volume.tiles(patch_size)
    counts = np.stack([_class_counts(volume.label_patch(tile, patch_size), num_classes) for tile in tiles])
    present = np.flatnonzero(counts.sum(0))
    drawn = [rng.choice(len(tiles), TILES_PER_CLASS, p=counts[:, k] / counts[:, k].sum()) for k in present]
    chosen = np.unique(drawn).astype(int)
    result = []
    for index in chosen:
        labels = volume.label_patch(tiles[index], patch_size)
        picked = []
        for k in np.flatnonzero(counts[index]):
            share = -(-quota // np.count_nonzero(counts[chosen, k]))
            picked.append(rng.permutation(np.flatnonzero(labels == k))[:share])
        places = np.concatenate(picked)
        result.append((tiles[index], np.stack(np.unravel_index(places, labels.shape), 1), labels.ravel()[places]))
    return result


def _class_counts(labels: np.ndarray, num_classes: int) -> np.ndarray:
    return np.bincount(labels[labels >= 0].ravel(), minlength=num_classes)


def features_at(maps: Sequence[Tensor], places: Tensor, patch_size: Sequence[int]) -> Tensor:
    """Features (N, F) on the CPU of the voxels at ``places`` (N, axes) of one patch: the maps, enlarged linearly."""
    # grid_sample counts from -1 to 1 over the patch and names the last axis first.
    grid = ((2 * places + 1) / torch.tensor(list(patch_size)) - 1).flip(-1).float()
    grid = grid.reshape(1, -1, *[1] * (len(patch_size) - 1), len(patch_size))
    settings: dict[str, Any] = {"mode": "bilinear", "padding_mode": "border", "align_corners": False}
    sampled = [functional.grid_sample(m, grid.to(m.device), **settings)[0].flatten(1).T for m in maps]
    return torch.cat(sampled, dim=1).cpu()


def _enlarged(scores: Tensor, patch_size: Sequence[int]) -> Tensor:
    mode = "trilinear" if len(patch_size) == 3 else "bilinear"
    return functional.interpolate(scores, size=tuple(patch_size), mode=mode, align_corners=False)


def fit_logistic(x_NF: Tensor, y_N: Tensor, shares_K: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (K, F) and biases (K,) of a multinomial logistic regression, by L-BFGS from zero.

    ``shares_K`` says how much the voxels of each class weigh together, however many they are.
    """
    num_classes = len(shares_K)
    weight = torch.zeros(num_classes, x_NF.shape[1], dtype=x_NF.dtype, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=x_NF.dtype, requires_grad=True)
    balance = shares_K.to(x_NF.dtype) / torch.bincount(y_N.long(), minlength=num_classes).clamp(min=1)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        error = functional.cross_entropy(x_NF @ weight.T + bias, y_N.long(), weight=balance)
        total = error + PENALTY / 2 * (weight.square().sum() + bias.square().sum())
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    return weight.detach(), bias.detach()


def finetuned_labeller(
    backbone: AbstractBackbone,
    volumes: Sequence[LabelledVolume],
    num_classes: int,
    rng: np.random.Generator,
    *,
    plans: dict[str, Any],
    configuration: str,
    schedule: tuple[int, float, int],
    device: torch.device,
    dtype: torch.dtype | None,
) -> Labeller:
    """A copy of the network with a new head, trained on random crops; ``schedule`` is steps, peak rate and batch size.

    Half of the crops hold foreground; no augmentation. float16 would need scaled losses and becomes float32.
    """
    steps, learning_rate, batch_size = schedule
    dtype = None if dtype is torch.float16 else dtype
    network = build_network(plans, configuration, backbone.num_inputs, num_classes)
    transfer_weights(backbone.network.state_dict(), network, source_patch_size=backbone.patch_size)
    network = network.to(device).train()
    optimizer = make_optimizer([p for p in network.parameters() if p.requires_grad], "adamw", learning_rate, 1e-2)
    foreground = [rng.permutation(np.argwhere(volume.labels > 0))[:10_000] for volume in volumes]
    with torch.enable_grad():
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * learning_rate_factor(step, steps, 0.1 * steps)
            chosen = rng.integers(len(volumes), size=batch_size)
            crops = [
                _crop(volumes[i], foreground[i] if number % 2 == 0 else foreground[i][:0], backbone.patch_size, rng)
                for number, i in enumerate(chosen)
            ]
            x_BCDHW, y_BDHW = (torch.stack(parts).to(device) for parts in zip(*crops))
            optimizer.zero_grad(set_to_none=True)
            with autocast(device, dtype):
                scores = network(x_BCDHW)
            segmentation_loss(scores.float(), y_BDHW.long()).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
    network.eval()

    def label(x_BCDHW: Tensor) -> Tensor:
        with autocast(device, dtype):
            return network(x_BCDHW.to(device))

    return label


def _crop(
    volume: LabelledVolume, centres: np.ndarray, patch_size: Sequence[int], rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Image and labels of a patch around one of ``centres``, or anywhere where there is none."""
    centre = centres[rng.integers(len(centres))] if len(centres) else rng.integers(volume.labels.shape)
    num_leading = volume.labels.ndim - len(patch_size)
    shape = volume.labels.shape[num_leading:]
    lower = tuple(
        min(max(int(place) - size // 2, 0), extent - size) if extent > size else (extent - size) // 2
        for place, size, extent in zip(centre[num_leading:], patch_size, shape)
    )
    tile = Tile(lower, tuple(int(place) for place in centre[:num_leading]))
    return volume.patch(tile, patch_size), torch.from_numpy(volume.label_patch(tile, patch_size))


def segmentation_loss(scores_BKDHW: Tensor, y_BDHW: Tensor) -> Tensor:
    """Cross entropy plus 1 - soft Dice of the foreground over the batch; voxels labelled -1 do not count."""
    counted = (y_BDHW >= 0)[:, None]
    target = functional.one_hot(y_BDHW.clamp(min=0), scores_BKDHW.shape[1]).movedim(-1, 1) * counted
    probabilities = scores_BKDHW.softmax(1) * counted
    axes = [0, *range(2, scores_BKDHW.dim())]
    common, total = (probabilities * target).sum(axes), probabilities.sum(axes) + target.sum(axes)
    dice = ((2 * common + 1e-5) / (total + 1e-5))[1:].mean()
    entropy = functional.cross_entropy(scores_BKDHW, y_BDHW, ignore_index=-1, reduction="sum")
    return entropy / counted.sum().clamp(min=1) + 1 - dice
