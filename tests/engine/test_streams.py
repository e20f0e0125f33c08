"""From a corpus to the streams of a run: which masks are used, balance, and volumes that are too small."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.corpus import register_corpus
from mfm_nnunet.engine.pretraining import Corpus, Streams, make_streams
from mfm_nnunet.errors import MFMError
from mfm_nnunet.settings import PretrainSettings
from mfm_nnunet.tasks.base import PretextTask
from mfm_nnunet.tasks.mae import MAE
from mfm_nnunet.tasks.masks import MaskingConfig
from mfm_nnunet.tasks.volume_fusion import VolumeFusion, VolumeFusionConfig
from tests.builders import tiny_run
from tests.builders.volumes import write_mask, write_volume

PATCH = (8, 8, 8)
MAE_CONFIG = MaskingConfig(cell_size=(4, 4, 4))


@dataclass(frozen=True)
class Config:
    crop_size: tuple[int, ...] = (16, 16, 16)


class Contrastive(MAE):
    """A task that cannot pad its crops."""

    Config: ClassVar[type[Any]] = Config  # type: ignore[assignment]

    @classmethod
    def smallest_volume(cls, config: Any) -> tuple[int, ...]:
        return config.crop_size


def volumes(folder: Path, num_masked: int = 2, **changes: Any) -> Corpus:
    """Six volumes of one value each, two thirds T1w; ``num_masked`` of them with a mask."""
    cases, files = [], {}
    for i in range(6):
        volume = np.full((1, 12 + i, 20, 20), 1.0 + i)
        mask = np.zeros(volume.shape, bool)
        mask[:, 2:6, 2:6, 2:6] = True
        name = f"case{i}"
        files[name] = write_volume(folder / "data", name, volume, mask if i < num_masked else None)
        cases.append(Case(name, (), None, f"s{i}", "T1w" if i < 4 else "CT", "brains"))
    names = set(files)
    return Corpus(cases, files, names - {"case0"}, {"case0"})


def streams(corpus: Corpus, task: type[PretextTask] = MAE, config: Any = MAE_CONFIG, **settings: Any) -> Streams:
    return make_streams(corpus, task, config, PATCH, PretrainSettings(**settings), 0)


def refusal(code: str, corpus: Corpus, *arguments: Any, **settings: Any) -> str:
    with pytest.raises(MFMError) as error:
        streams(corpus, *arguments, **settings)
    assert error.value.code == code
    return error.value.message


# --- masks --------------------------------------------------------------------------------------------------------


def test_without_masks_items_have_no_such_key_and_nothing_is_said(tmp_path: Path) -> None:
    made = streams(volumes(tmp_path, num_masked=0))
    assert made.notes == []
    assert set(made.training[0]) == {"image", "hidden"}
    assert made.training.weights is None


def test_anonymised_voxels_are_left_out_in_every_item_of_both_streams(tmp_path: Path) -> None:
    made = streams(volumes(tmp_path), augmentation="mirror")
    assert made.notes[0] == "anonymised voxels of 2 cases are left out of the loss"
    for stream, is_masked in ((made.training, {2.0}), (made.validation, {1.0})):
        for index in range(30):
            item = stream[index]
            assert item["valid"].shape == (1, *PATCH)
            assert item["valid"].all() or item["image"].max() in is_masked
        assert not all(stream[index]["valid"].all() for index in range(60))


def test_masks_that_are_not_used_are_named_once(tmp_path: Path) -> None:
    corpus = volumes(tmp_path)
    fusion = streams(corpus, VolumeFusion, VolumeFusionConfig())
    assert fusion.notes == ["the anonymisation masks of 2 cases are not used: volume_fusion does not use them"]
    off = streams(corpus, leave_out_anonymised=False)
    assert "pretrain.leave_out_anonymised=false" in off.notes[0]
    assert "valid" not in off.training[0]


def test_masks_that_came_after_preprocessing(tmp_path: Path) -> None:
    bare = volumes(tmp_path, num_masked=0)
    late = [dataclasses.replace(case, anonymisation_mask=Path("b")) for case in bare.cases]
    message = refusal("E_NOT_FOUND", dataclasses.replace(bare, cases=late))
    assert "6 cases" in message
    assert "mfm_plan_and_preprocess again" in message


# --- balance ------------------------------------------------------------------------------------------------------


def test_balance_of_the_training_part_is_drawn_and_printed(tmp_path: Path) -> None:
    corpus = volumes(tmp_path, num_masked=0)
    made = streams(corpus, balance_by=("modality",), augmentation="none")
    assert made.notes == ["balanced by modality, 2 groups: CT 50.0%, T1w 50.0%"]
    drawn = [made.training.case_names(index)[0] for index in range(600)]
    assert 0.44 < np.mean([name in ("case4", "case5") for name in drawn]) < 0.56
    assert "case0" not in drawn


def test_balance_that_is_impossible(tmp_path: Path) -> None:
    corpus = volumes(tmp_path, num_masked=0)
    assert "Did you mean 'modality'" in refusal("E_CONFIG", corpus, balance_by=("modalities",))
    nameless = dataclasses.replace(corpus, cases=[dataclasses.replace(c, dataset="") for c in corpus.cases])
    assert "no dataset for any case" in refusal("E_CONFIG", nameless, balance_by=("dataset",))


# --- volumes that are too small -----------------------------------------------------------------------------------


def test_volumes_that_are_too_small_are_counted_and_named(tmp_path: Path) -> None:
    corpus = volumes(tmp_path, num_masked=0)
    message = refusal("E_CONFIG", corpus, Contrastive, Config())
    assert "4 of 6 preprocessed volumes are smaller than the 16x16x16" in message
    assert "case0: 12x20x20" in message
    assert "pretext.crop_size" in message
    assert "case4" not in message
    message = refusal("E_CONFIG", corpus, Contrastive, Config((30, 30, 30)))
    assert message.count("x20x20") == 5
    assert "... and 1 more" in message
    # In 2D a slice counts, however few there are.
    assert "6 of 6" in refusal("E_CONFIG", corpus, Contrastive, Config((21, 20)))


# --- whole runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [(), ("pretrain.balance_by=modality", "pretrain.leave_out_anonymised=false")])
def test_a_run_says_what_it_does_with_masks_and_tells_nobody_in_its_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: tuple[str, ...]
) -> None:
    here = tiny_run.prepare(tmp_path)
    data = here.preprocessed / tiny_run.NAME / "mfm_tiny"
    cases, scans = [], tmp_path / "hospital-7"
    scans.mkdir()
    for i in range(6):
        files = [scans / f"{name}{i}.nii.gz" for name in ("case", "face")]
        for file in files:
            file.write_text("x")
        cases.append(Case(f"case{i}", (files[0],), None, f"person{i}", ("T1w", "CT-xyz")[i % 2], "", files[1]))
        mask = np.random.default_rng(i).random((1, 20, 18, 24)) < 0.2
        write_mask(data, f"case{i}", mask)
    register_corpus(here.raw, tiny_run.NAME, cases, ["MR"])
    with caplog.at_level(logging.INFO):
        final = tiny_run.run(here, settings=("pretrain.epochs=1", "pretrain.iterations_per_epoch=2", *settings))
    assert caplog.text.count("anonymised voxels of 6 cases are left out of the loss") == (not settings)
    if settings:
        assert "balanced by modality, 2 groups" in caplog.text
        assert caplog.text.count("anonymisation masks of 6 cases are not used") == 1
    saved = json.loads((final.parent / "settings.json").read_text())["pretrain"]
    assert saved["balance_by"] == (["modality"] if settings else [])
    for word in (b"person", b"hospital", b"CT-xyz", b"brain"):
        assert word not in final.read_bytes(), "the checkpoint tells of persons or places"
