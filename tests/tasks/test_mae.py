"""MAE: exact masks, a loss on hidden voxels only, and settings that cannot be wrong silently."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from mfm_nnunet import settings as mfm_settings
from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.backbone import Geometry
from mfm_nnunet.tasks.losses import masked_mse
from mfm_nnunet.tasks.mae import MAE
from mfm_nnunet.tasks.masks import MaskingConfig, auto_cell_size, cell_grid, draw_hidden, num_hidden_cells
from tests.builders.tiny_plans import tiny_backbone

PATCH = (24, 32, 40)
CONV, TOKENS = (1, 1, 1), (8, 8, 8)


@pytest.mark.parametrize(
    ("patch", "cell", "ratio", "hidden", "cells"),
    [
        ((160, 160, 160), (16, 16, 16), 0.75, 750, 1000),
        ((24, 32, 40), (8, 8, 8), 0.75, 45, 60),
        ((24, 32, 40), (8, 8, 8), 0.6, 36, 60),
        ((16, 64, 64), (4, 16, 16), 0.75, 48, 64),
        ((64, 48), (16, 16), 0.75, 9, 12),
    ],
)
def test_exactly_the_share_of_cells_is_hidden(
    patch: tuple[int, ...], cell: tuple[int, ...], ratio: float, hidden: int, cells: int
) -> None:
    assert (num_hidden_cells(patch, cell, ratio), np.prod(cell_grid(patch, cell))) == (hidden, cells)
    for seed in range(5):
        mask = draw_hidden(patch, cell, ratio, np.random.default_rng(seed))
        assert mask.shape == (1, *patch)
        assert mask.dtype == bool
        assert mask.sum() == hidden * np.prod(cell)
        blocks = mask[0].reshape([n for size, c in zip(patch, cell) for n in (size // c, c)])
        inside = tuple(range(1, blocks.ndim, 2))
        assert (blocks.all(inside) == blocks.any(inside)).all()


def test_the_last_cells_may_be_partial() -> None:
    mask = draw_hidden((20, 18), (8, 8), 0.5, np.random.default_rng(0))
    assert mask.shape == (1, 20, 18)
    corners = mask[0][::8, ::8]
    assert corners.shape == (3, 3)
    assert corners.sum() == int(0.5 * 9)


def test_cells_are_drawn_uniformly_and_differ_between_items() -> None:
    rng = np.random.default_rng(0)
    masks = np.stack([draw_hidden((16, 16), (4, 4), 0.75, rng)[0, ::4, ::4] for _ in range(2000)])
    assert np.abs(masks.mean(0) - 0.75).max() < 0.04
    assert len({mask.tobytes() for mask in masks}) > 1000


@pytest.mark.parametrize(
    ("patch", "cell"),
    [
        ((160, 160, 160), (16, 16, 16)),
        ((64, 64, 64), (16, 16, 16)),
        ((40, 56, 40), (10, 14, 10)),
        ((16, 256, 256), (4, 16, 16)),
        ((3, 12, 20), (3, 4, 5)),
        ((512, 48), (16, 12)),
    ],
)
def test_automatic_cells_of_unets(patch: tuple[int, ...], cell: tuple[int, ...]) -> None:
    assert auto_cell_size(patch) == cell
    config = MAE.resolve(MaskingConfig(), Geometry(patch, (1,) * len(patch), (1,) * len(patch)))
    assert config == MaskingConfig(cell_size=cell)


def test_the_cells_of_primus_are_its_tokens() -> None:
    assert MAE.resolve(MaskingConfig(), Geometry(PATCH, TOKENS, TOKENS)).cell_size == (8, 8, 8)
    assert MAE.resolve(MaskingConfig(cell_size=(8, 16, 8)), Geometry(PATCH, TOKENS, TOKENS)).cell_size == (8, 16, 8)
    assert MAE.resolve(MaskingConfig(cell_size=(4,)), Geometry(PATCH, CONV, CONV)).cell_size == (4, 4, 4)


@pytest.mark.parametrize(
    ("settings", "cell"),
    [
        ({"mask_ratio": 0.0}, CONV),
        ({"mask_ratio": 1.0}, CONV),
        ({"mask_ratio": -0.5}, CONV),
        ({"mask_ratio": 0.001}, CONV),
        ({"cell_size": (8, 8)}, CONV),
        ({"cell_size": (0, 8, 8)}, CONV),
        ({"cell_size": (8, 8, 48)}, CONV),
        ({"cell_size": (12, 12, 12)}, TOKENS),
        ({"cell_size": (4, 8, 8)}, TOKENS),
        ({"cell_size": (16, 16, 16)}, TOKENS),
    ],
)
def test_illegal_settings_are_refused(settings: dict[str, Any], cell: tuple[int, ...]) -> None:
    with pytest.raises(MFMError, match=f"E_CONFIG.*{next(iter(settings))}"):
        MAE.resolve(MaskingConfig(**settings), Geometry(PATCH, cell, cell))


def test_loss_is_the_mean_over_hidden_voxels_and_channels() -> None:
    hidden = torch.zeros(2, 1, 2, 2, dtype=torch.bool)
    hidden[0, 0, 0, 0] = hidden[1, 0, 1, 1] = True
    target = torch.zeros(2, 3, 2, 2)
    prediction = torch.full((2, 3, 2, 2), 100.0)
    prediction[0, :, 0, 0] = torch.tensor([1.0, 2.0, 3.0])
    prediction[1, :, 1, 1] = 0
    assert masked_mse(prediction, target, hidden).item() == pytest.approx((1 + 4 + 9) / (2 * 3))


def test_visible_outputs_get_no_gradient() -> None:
    prediction = torch.randn(2, 2, *PATCH, requires_grad=True)
    hidden = torch.from_numpy(np.stack([draw_hidden(PATCH, (8, 8, 8), 0.75, np.random.default_rng(i)) for i in (0, 1)]))
    masked_mse(prediction, torch.randn(2, 2, *PATCH), hidden).backward()
    assert prediction.grad is not None
    is_touched = prediction.grad != 0
    assert torch.equal(is_touched, hidden.expand_as(is_touched))


def item_of(seed: int, patch: tuple[int, ...] = PATCH) -> dict[str, np.ndarray]:
    transform = MAE.transform(
        MAE.resolve(MaskingConfig(), Geometry(patch, (8,) * len(patch), (8,) * len(patch))), patch
    )
    rng = np.random.default_rng(seed)
    (request,) = transform.requests(rng)
    assert (request.size, request.pad, request.volume) == (patch, True, 0)
    return transform([np.full((2, *patch), seed, np.float32)], rng)


def test_item_keeps_the_image_and_is_the_same_in_another_process() -> None:
    here = item_of(5)
    assert (here["image"] == 5).all()
    assert here["image"].shape == (2, *PATCH)
    with ProcessPoolExecutor(1) as pool:
        there = pool.submit(item_of, 5).result()
    assert all(np.array_equal(here[key], there[key]) for key in here)
    assert not np.array_equal(here["hidden"], item_of(6)["hidden"])


@pytest.mark.parametrize("family", ["resenc", "primus"])
def test_target_is_the_image_as_it_was_and_pictures_show_it(family: str) -> None:
    backbone = tiny_backbone(family, PATCH, num_inputs=2, num_outputs=2)
    config = MAE.resolve(MaskingConfig(fill_value=-1.0), Geometry(PATCH, backbone.mask_cell(), backbone.mask_cell()))
    task = MAE(config, backbone).eval()
    image = 3 + 2 * torch.randn(2, 2, *PATCH)
    hidden = torch.from_numpy(np.stack([item_of(seed)["hidden"] for seed in (0, 1)]))
    with torch.no_grad():
        output = task({"image": image.clone(), "hidden": hidden})
        restored = backbone.restore(image, hidden, -1.0)
    errors = (restored - image).square()[hidden.expand_as(image)]
    assert output.loss.item() == pytest.approx(errors.mean().item(), rel=1e-5)
    explained = 1 - errors.mean() / image.square()[hidden.expand_as(image)].mean()
    assert output.metrics["explained_variance"].item() == pytest.approx(explained.item(), abs=1e-5)
    assert output.pictures is not None
    assert all(picture.shape == (2, *PATCH) for picture in output.pictures.values())
    assert torch.equal(output.pictures["image"], image[0])
    assert (output.pictures["visible"][hidden[0].expand(2, *PATCH)] == -1).all()
    assert torch.equal(output.pictures["restored"], torch.where(hidden[0], restored[0], image[0]))
    assert task.train()({"image": image, "hidden": hidden}).pictures is None


def test_one_output_per_channel_and_spatial_augmentation() -> None:
    assert [MAE.num_outputs(MaskingConfig(), n) for n in (1, 3)] == [1, 3]
    assert MAE.augmentation(MaskingConfig()) == "spatial"
    assert MAE.volumes_per_item(MaskingConfig()) == 1
    assert MAE.restoring == "drop"


def test_a_range_draws_the_share_of_each_item_of_unets() -> None:
    config = MAE.resolve(MaskingConfig(mask_ratio=(0.3, 0.9), cell_size=(8,)), Geometry(PATCH, CONV, CONV))
    transform, rng = MAE.transform(config, PATCH), np.random.default_rng(0)
    counts = [transform([np.zeros((1, *PATCH), np.float32)], rng)["hidden"].sum() / 8**3 for _ in range(300)]
    assert min(counts) >= int(0.3 * 60)
    assert max(counts) < 0.9 * 60
    assert set(counts) == set(range(18, 54))
    assert np.mean(counts) / 60 == pytest.approx(0.6, abs=0.03)


def test_dropped_tokens_need_one_share_for_all_items() -> None:
    with pytest.raises(MFMError, match=r"pretext.mask_ratio=0.6,0.9: .*one number, or use --pretext simmim"):
        MAE.resolve(MaskingConfig(mask_ratio=(0.6, 0.9)), Geometry(PATCH, TOKENS, TOKENS))
    for limits in ((0.9, 0.6), (0.0, 0.5), (0.5, 1.0), (0.01, 0.5)):
        with pytest.raises(MFMError, match=f"pretext.mask_ratio={limits[0]},{limits[1]}"):
            MAE.resolve(MaskingConfig(mask_ratio=limits, cell_size=(8,)), Geometry(PATCH, CONV, CONV))


@pytest.mark.parametrize(("value", "ratio"), [("0.75", 0.75), ("0.6,0.9", (0.6, 0.9)), ("[0.6, 0.9]", (0.6, 0.9))])
def test_the_share_is_one_number_or_two(value: str, ratio: float | tuple[float, float]) -> None:
    assert mfm_settings.override(MaskingConfig(), [f"mask_ratio={value}"]).mask_ratio == ratio


@pytest.mark.parametrize("value", ["most", "0.1,0.2,0.3", "0.1,half"])
def test_other_shares_are_refused(value: str) -> None:
    with pytest.raises(MFMError, match=f"mask_ratio={value}: expected float or 2 values"):
        mfm_settings.override(MaskingConfig(), [f"mask_ratio={value}"])
