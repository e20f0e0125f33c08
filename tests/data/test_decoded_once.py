"""Each stage decodes an image once, registering decodes none, and a job lists the cases once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from mfm_nnunet import api
from mfm_nnunet.data import corpus
from mfm_nnunet.images import decoder
from mfm_nnunet.images.reading import count_channels, read_image, reader_for
from mfm_nnunet.workspace import use
from tests.builders import synthetic

GREY = np.random.default_rng(0).integers(1, 255, (24, 30)).astype(np.uint8)
COLOUR = np.stack([GREY, GREY // 2, 255 - GREY], -1)


class Count:
    """Counts what is asked for while it is in place: decodings of each file, and lists of cases."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decoded: Counter[str] = Counter()
        self.listed = 0
        call, load_cases = decoder.call, corpus.load_cases

        def counted_call(file: Path, request: dict[str, Any]) -> decoder.Reply:
            self.decoded[Path(file).name] += request["task"] == "decode"
            return call(file, request)

        def counted_list(*arguments: Any, **words: Any) -> Any:
            self.listed += 1
            return load_cases(*arguments, **words)

        monkeypatch.setattr(decoder, "call", counted_call)
        monkeypatch.setattr(corpus, "load_cases", counted_list)


def plan(workspace: Path, dataset: int = 701, **words: Any) -> None:
    api.plan_and_preprocess([dataset], workspace=workspace, memory_gb=1, num_processes=1, **words)


def test_a_corpus_is_decoded_once_per_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        image = sitk.GetImageFromArray(np.random.default_rng(i).normal(size=(20, 20, 20)).astype(np.float32))
        (tmp_path / "scans").mkdir(exist_ok=True)
        sitk.WriteImage(image, str(tmp_path / "scans" / f"{i}.nii.gz"))
    count = Count(monkeypatch)
    plan(tmp_path, images=tmp_path / "scans", preprocess=False)  # registered, fingerprint taken, planned
    example = Counter({"0.nii.gz": 1})  # drawn in the report: one image of each modality
    assert (count.decoded, count.listed) == (Counter({f"{i}.nii.gz": 1 for i in range(3)}) + example, 1)
    plan(tmp_path)  # preprocessed
    assert count.decoded == Counter({f"{i}.nii.gz": 2 for i in range(3)}) + example
    assert count.listed == 2
    plan(tmp_path)
    assert count.decoded.total() == 7


def test_a_dataset_of_several_configurations_is_decoded_once_per_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with use(tmp_path) as here:
        synthetic.write_dataset(here, num_cases=2)
    count = Count(monkeypatch)
    plan(tmp_path, synthetic.NUMBER)
    (data,) = (tmp_path / "nnUNet_preprocessed").iterdir()
    assert len([folder for folder in data.iterdir() if folder.name.startswith("mfm_") and folder.is_dir()]) == 2
    assert set(count.decoded.values()) == {2}  # for the fingerprint, and for both configurations
    assert (len(count.decoded), count.listed) == (4, 1)


@pytest.mark.parametrize(
    ("name", "picture"),
    [
        ("16.png", Image.fromarray(GREY.astype(np.uint16) * 200)), ("colour.tif", Image.fromarray(COLOUR)),
        ("palette.png", Image.fromarray(COLOUR).quantize(16)), ("palette.bmp", Image.fromarray(GREY)),
        ("alpha.png", Image.fromarray(np.dstack([COLOUR, GREY]))),
        ("print.jpg", Image.fromarray(np.dstack([COLOUR, GREY]), "CMYK")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:'mode' parameter")
def test_channels_by_the_header_are_those_that_are_decoded(
    name: str, picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture.save(tmp_path / name)
    count = Count(monkeypatch)
    found = count_channels(tmp_path / name)
    assert not count.decoded.total()
    assert found == len(read_image([tmp_path / name], reader_for(tmp_path / name))[0])


def test_registering_pictures_decodes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scans").mkdir()
    for i in range(4):
        Image.fromarray(COLOUR if i else GREY).save(tmp_path / "scans" / f"{i}.png")
    count = Count(monkeypatch)
    from mfm_nnunet.jobs import registration
    from mfm_nnunet.requests import PlanRequest

    with use(tmp_path) as here:
        name = registration.register(here, 701, PlanRequest([701], images=tmp_path / "scans"), [])
        assert len(corpus.read_dataset_json(here.raw / name)["channel_names"]) == 3
    assert not count.decoded.total()
