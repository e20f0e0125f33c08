"""Tasks that restore hidden voxels: exact masks, a loss on hidden voxels only, and settings that are refused.

``tests/models/test_families.py`` shows that what is hidden has no influence.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mfm_nnunet import settings as mfm_settings
from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.backbone import Geometry
from mfm_nnunet.tasks.base import find_task
from mfm_nnunet.tasks.losses import masked_l1, masked_mse
from mfm_nnunet.tasks.mae import MAE
from mfm_nnunet.tasks.masks import (
    MaskingConfig,
    MaskingTransform,
    auto_cell_size,
    cell_grid,
    draw_hidden,
    num_hidden_cells,
)
from tests.builders.tasks import geometry, make_batch, make_task, noise

PATCH = (24, 32, 40)
CONV, TOKENS = geometry(PATCH), geometry(PATCH, 8, 8)
TASKS = [("mae", "resenc"), ("mae", "primus"), ("simmim", "primus"), ("spark3d", "resenc")]


@pytest.mark.parametrize(
    ("patch", "cell", "ratio", "hidden", "cells"),
    [
        ((160, 160, 160), (16, 16, 16), 0.75, 750, 1000),
        ((24, 32, 40), (8, 8, 8), 0.6, 36, 60),
        ((16, 64, 64), (4, 16, 16), 0.75, 48, 64),
        ((64, 48), (16, 16), 0.75, 9, 12),
    ],
)
def test_exactly_the_share_of_cells_is_hidden(
    patch: tuple[int, ...], cell: tuple[int, ...], ratio: float, hidden: int, cells: int
) -> None:
    assert (num_hidden_cells(patch, cell, ratio), np.prod(cell_grid(patch, cell))) == (hidden, cells)
    for seed in range(2):
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
    assert MAE.resolve(MaskingConfig(), TOKENS).cell_size == (8, 8, 8)
    assert MAE.resolve(MaskingConfig(cell_size=(8, 16, 8)), TOKENS).cell_size == (8, 16, 8)
    assert MAE.resolve(MaskingConfig(cell_size=(4,)), CONV).cell_size == (4, 4, 4)


@pytest.mark.parametrize(("error", "expected"), [(masked_mse, (1 + 4 + 9) / 6), (masked_l1, (1 + 2 + 3) / 6)])
def test_errors_are_means_over_the_hidden_voxels_and_channels_of_each_sample(error: Any, expected: float) -> None:
    hidden = torch.zeros(2, 1, 2, 2, dtype=torch.bool)
    hidden[0, 0, 0, 0] = hidden[1, 0, 1, 1] = True
    prediction = torch.full((2, 3, 2, 2), 100.0)
    prediction[0, :, 0, 0] = torch.tensor([1.0, -2.0, 3.0])
    prediction[1, :, 1, 1] = 0
    prediction.requires_grad_()
    loss = error(prediction, torch.zeros(2, 3, 2, 2), hidden)
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert prediction.grad is not None
    assert torch.equal(prediction.grad[0] != 0, hidden[0].expand(3, 2, 2)), "visible outputs get a gradient"


def test_items_keep_the_image_and_differ_by_their_seed() -> None:
    transform = MAE.transform(MAE.resolve(MaskingConfig(), TOKENS), PATCH)
    (request,) = transform.requests(np.random.default_rng(0))
    assert (request.size, request.pad, request.volume) == (PATCH, True, 0)
    crop, valid = noise(request, 2, np.random.default_rng(1)), np.random.default_rng(2).random((1, *PATCH)) < 0.5
    here = transform([crop], np.random.default_rng(5), [valid])
    assert np.array_equal(here["image"], crop)
    assert np.array_equal(here["valid"], valid)
    assert not np.array_equal(here["hidden"], transform([crop], np.random.default_rng(6))["hidden"])


@pytest.mark.parametrize(
    ("name", "family", "setting"), [*((*task, "") for task in TASKS), ("simmim", "primus", "loss=l1")]
)
def test_the_loss_is_that_of_the_hidden_valid_voxels_of_each_sample(name: str, family: str, setting: str) -> None:
    task = make_task(name, family, PATCH, 2, [setting] if setting else []).eval()
    batch = make_batch(task, 3, read=noise)
    image, hidden = batch["image"], batch["hidden"]
    batch["valid"] = torch.rand(3, 1, *PATCH) < 0.5
    batch["valid"][0, :, :16] = False
    counted = (hidden & batch["valid"]).expand_as(image)
    with torch.no_grad():
        output, restored = task(batch), task.restore(image, hidden)
        lie = torch.where(hidden & ~batch["valid"], 1e3, image)
        assert torch.equal(task({**batch, "image": lie}).loss, output.loss), "voxels that do not count have influence"
        assert output.loss != task({"image": image, "hidden": hidden}).loss
    errors = [(restored - image)[index][counted[index]] for index in range(3)]
    losses = torch.stack([(error.abs() if setting else error.square()).mean() for error in errors])
    assert output.loss.item() == pytest.approx(losses.mean().item(), rel=1e-5)
    squares = sum(error.square().mean() for error in errors)
    guesses = sum(image[index][counted[index]].square().mean() for index in range(3))
    assert output.metrics["explained_variance"].item() == pytest.approx(float(1 - squares / guesses), abs=1e-5)


@pytest.mark.parametrize(("name", "family"), TASKS[1:])
def test_pictures_show_what_is_visible_and_what_is_restored(name: str, family: str) -> None:
    task = make_task(name, family, PATCH, 2, ["fill_value=-1"]).eval()
    batch = make_batch(task, read=noise)
    image, hidden = batch["image"], batch["hidden"]
    with torch.no_grad():
        pictures, restored = task(batch).pictures, task.restore(image, hidden)
    assert list(pictures) == ["image", "visible", "restored"]
    assert torch.equal(pictures["image"], image[0])
    assert torch.equal(pictures["visible"], torch.where(hidden[0], -1, image[0]))
    assert torch.equal(pictures["restored"], torch.where(hidden[0], restored[0], image[0]))
    assert task.train()(batch).pictures is None


@pytest.mark.parametrize(("name", "sizes"), [("mae", CONV), ("simmim", TOKENS), ("spark3d", CONV)])
def test_a_range_draws_the_share_of_each_item(name: str, sizes: Geometry) -> None:
    task = find_task(name)
    config = mfm_settings.override(task.Config(), ["mask_ratio=0.3,0.9", "cell_size=8"])
    transform, rng = task.transform(task.resolve(config, sizes), PATCH), np.random.default_rng(0)
    counts = [transform([np.zeros((1, *PATCH), np.float32)], rng)["hidden"].sum() / 8**3 for _ in range(300)]
    assert set(counts) == set(range(18, 54)), "of 60 cells"
    assert np.mean(counts) / 60 == pytest.approx(0.6, abs=0.03)
    fixed = MaskingTransform(MaskingConfig(cell_size=(8, 8, 8)), PATCH)
    assert {fixed([np.zeros((1, *PATCH))], rng)["hidden"].mean() for _ in range(5)} == {0.75}


def test_the_fill_value_is_seen_by_overlapping_stems_alone() -> None:
    for network in ("primus", "primus_v2"):
        task = make_task("simmim", network, PATCH).eval()
        batch = make_batch(task)
        with torch.no_grad():
            first, second = (task.backbone.restore(batch["image"], batch["hidden"], value) for value in (0.0, -3.0))
        assert torch.equal(first, second) is (network == "primus")


@pytest.mark.parametrize("patch", [PATCH, (24, 40)])
def test_mask_tokens_of_simmim_stand_at_the_hidden_places_before_positions_are_added_and_learn(
    patch: tuple[int, ...],
) -> None:
    task = make_task("simmim", "primus", patch)
    assert [name for name, _ in task.named_parameters() if ".network." not in name] == ["backbone.mask_token"]
    batch, backbone, seen = make_batch(task), task.backbone, []
    backbone.network.eva.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    task(batch).loss.backward()
    embedded = backbone.network.down_projection(batch["image"]).flatten(2).transpose(1, 2)
    hidden = batch["hidden"][(slice(None), 0, *(slice(None, None, 8),) * len(patch))].flatten(1)
    assert hidden.sum(1).tolist() == [int(0.75 * hidden.shape[1])] * 2
    expected = torch.where(hidden[..., None], backbone.mask_token, embedded) + backbone.network.eva.pos_embed
    torch.testing.assert_close(seen[0], expected)
    assert 0 < backbone.mask_token.detach().abs().max() < 1e-4
    assert backbone.mask_token.grad.abs().max() > 0


def test_dropped_tokens_need_one_share_for_all_items() -> None:
    with pytest.raises(MFMError, match=r"E_CONFIG.*pretext.mask_ratio=0.6,0.9: .*--pretext simmim"):
        MAE.resolve(MaskingConfig(mask_ratio=(0.6, 0.9)), TOKENS)


RATIOS = [0.0, 1.0, -0.5, 0.001, (0.9, 0.6), (0.0, 0.5), (0.5, 1.0), (0.001, 0.5)]
CELLS = [(8, 8), (0, 8, 8), (8, 8, 48)]
CUT_TOKENS = [(12, 12, 12), (4, 8, 8), (16, 16, 16)]


@pytest.mark.parametrize(("name", "sizes"), [("mae", CONV), ("simmim", TOKENS), ("spark3d", CONV)])
def test_illegal_settings_are_refused(name: str, sizes: Geometry) -> None:
    task = find_task(name)
    cells = [*CELLS, *(CUT_TOKENS if sizes is TOKENS else [])]
    for field, value in [*(("mask_ratio", ratio) for ratio in RATIOS), *(("cell_size", cell) for cell in cells)]:
        with pytest.raises(MFMError, match=f"E_CONFIG.*pretext.{field}="):
            task.resolve(task.Config(**{field: value}), sizes)


@pytest.mark.parametrize(("value", "ratio"), [("0.75", 0.75), ("0.6,0.9", (0.6, 0.9)), ("[0.6, 0.9]", (0.6, 0.9))])
def test_the_share_is_one_number_or_two(value: str, ratio: float | tuple[float, float]) -> None:
    assert mfm_settings.override(MaskingConfig(), [f"mask_ratio={value}"]).mask_ratio == ratio


@pytest.mark.parametrize("value", ["most", "0.1,0.2,0.3", "0.1,half"])
def test_other_shares_are_refused(value: str) -> None:
    with pytest.raises(MFMError, match=f"mask_ratio={value}: expected float or 2 values"):
        mfm_settings.override(MaskingConfig(), [f"mask_ratio={value}"])


def test_masked_tasks_ask_for_spatial_augmentation_of_one_volume() -> None:
    for name, restoring in (("mae", "drop"), ("simmim", "replace"), ("spark3d", "none")):
        task = find_task(name)
        config = task.Config()
        assert [task.num_outputs(config, channels) for channels in (1, 3)] == [1, 3]
        assert (task.augmentation(config), task.volumes_per_item(config)) == ("spatial", 1)
        assert task.restoring == restoring
