"""The fingerprint says what nnU-Net's says, exactly where nnU-Net draws samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from mfm_nnunet.data.cases import Case
from mfm_nnunet.errors import CasesFailedError, MFMError
from mfm_nnunet.planning import fingerprint as module
from mfm_nnunet.planning.fingerprint import extract_fingerprint

DATASET = {
    "channel_names": {"0": "CT", "1": "MR"},
    "labels": {"background": 0, "a": 1, "b": 2},
    "file_ending": ".nii.gz",
}


def write(file: Path, array: np.ndarray, spacing: tuple[float, ...]) -> Path:
    item = sitk.GetImageFromArray(array)
    item.SetSpacing(spacing)
    sitk.WriteImage(item, str(file))
    return file


def make_case(folder: Path, i: int, foreground: int, label: bool = True) -> Case:
    """Two channels with zero margins, ``foreground`` labelled voxels of which one row lies in the margin."""
    rng, shape = np.random.default_rng(i), (9 + i, 12, 11)
    images = rng.normal([[[[100 * i + 50]]], [[[3]]]], [[[[20]]], [[[1]]]], (2, *shape)).astype(np.float32)
    images[:, :2] = images[:, :, 9:] = 0
    labels = np.zeros(shape, dtype=np.uint8)
    labels.flat[np.sort(rng.choice(labels.size, foreground, replace=False))] = rng.integers(1, 3, foreground)
    spacing = (0.7, 0.8, 1.0 + i)
    files = tuple(write(folder / f"c{i}_{c:04d}.nii.gz", images[c], spacing) for c in range(2))
    return Case(f"c{i}", files, write(folder / f"c{i}.nii.gz", labels, spacing) if label else None)


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    """Foregrounds of very different size."""
    return [make_case(tmp_path, i, n) for i, n in enumerate((700, 40, 300))]


def as_nifti_2(file: Path) -> None:
    """Write a NIfTI file again as NIfTI-2, which SimpleITK cannot read."""
    item = nibabel.load(file)
    nibabel.save(nibabel.Nifti2Image(np.asarray(item.dataobj), item.affine), file)


@pytest.mark.parametrize("which", ["first image", "second channel", "last label", "none"])
def test_one_reader_that_reads_all_cases_is_chosen(cases: list[Case], which: str) -> None:
    before, _ = extract_fingerprint(cases, DATASET)
    files = {"first image": cases[0].images[0], "second channel": cases[1].images[1], "last label": cases[2].label}
    if which != "none":
        as_nifti_2(files[which])  # type: ignore[arg-type]
    fingerprint, failures = extract_fingerprint(cases, DATASET, 2)
    assert not failures
    assert fingerprint["mfm"]["reader"] == ("SimpleITKIO" if which == "none" else "NibabelIO")
    np.testing.assert_allclose(fingerprint["spacings"], before["spacings"], rtol=1e-6)
    assert fingerprint["shapes_after_crop"] == before["shapes_after_crop"]


def test_the_reader_that_dataset_json_demands_is_kept(cases: list[Case]) -> None:
    as_nifti_2(cases[0].images[0])
    wanted = {**DATASET, "overwrite_image_reader_writer": "SimpleITKIO"}
    assert module.choose_reader(cases, wanted) == "SimpleITKIO"


def test_a_picture_among_stacks_is_left_out_and_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cases = []
    for number, shape in enumerate([(12, 11), (7, 12, 11), (7, 12, 11)]):
        file = tmp_path / f"c{number}_0000.tif"
        tifffile.imwrite(file, rng.integers(1, 99, shape).astype(np.uint8), photometric="minisblack")
        file.with_name(f"c{number}.json").write_text(json.dumps({"spacing": [1.0, 1.0, 1.0]}))
        cases.append(Case(f"c{number}", (file,)))
    dataset = {"channel_names": {"0": "a"}, "labels": {"background": 0}, "file_ending": ".tif"}
    fingerprint, failures = extract_fingerprint(cases, dataset)
    assert fingerprint["mfm"]["reader"] == "Tiff3DIO"
    assert fingerprint["mfm"]["case_names"] == ["c1", "c2"]
    assert [failure.case for failure in failures] == ["c0"]
    assert failures[0].code != "E_INTERNAL"


def foreground(case: Case) -> list[np.ndarray]:
    """The voxels of each channel that count, by nnU-Net's own cropping and reading."""
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

    images, _ = SimpleITKIO().read_images([str(file) for file in case.images])
    label = None if case.label is None else SimpleITKIO().read_seg(str(case.label))[0]
    data, seg, _ = crop_to_nonzero(images, label)
    mask = (data != 0).any(0) if label is None else seg[0] > 0
    return [channel[mask] for channel in data]


def expected_properties(cases: list[Case], channel: int) -> dict[str, float]:
    """What nnU-Net's estimate tends to: every case is drawn from equally often."""
    groups = [values[channel].astype(np.float64) for values in map(foreground, cases) if values[channel].size]
    mean = np.mean([group.mean() for group in groups])
    square = np.mean([np.mean(group**2) for group in groups])
    repeats = np.lcm.reduce([len(group) for group in groups])
    pooled = np.concatenate([np.repeat(group, repeats // len(group)) for group in groups])
    low, median, high = np.percentile(pooled, (0.5, 50, 99.5), method="inverted_cdf")
    return {
        "mean": mean, "median": median, "std": np.sqrt(square - mean**2), "min": pooled.min(), "max": pooled.max(),
        "percentile_99_5": high, "percentile_00_5": low,
    }  # fmt: skip


def test_shapes_spacings_and_sizes_equal_stock(cases: list[Case]) -> None:
    result, failures = extract_fingerprint(cases, DATASET)
    assert failures == []
    relative = []
    for i, case in enumerate(cases):
        images, label = [str(file) for file in case.images], str(case.label)
        shape, spacing, _, _, size = DatasetFingerprintExtractor.analyze_case(images, label, SimpleITKIO, 10)
        assert result["shapes_after_crop"][i] == list(shape)
        assert result["spacings"][i] == list(spacing)
        relative.append(size)
    assert result["median_relative_size_after_cropping"] == np.median(relative)
    assert result["mfm"]["case_names"] == ["c0", "c1", "c2"]
    assert (result["mfm"]["has_labels"], result["mfm"]["num_channels"]) == (True, 2)
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize("labelled", [True, False])
def test_intensities_are_exact_with_equal_weight_of_cases(cases: list[Case], labelled: bool) -> None:
    if not labelled:
        cases = [Case(case.name, case.images) for case in cases]
    result, _ = extract_fingerprint(cases, DATASET)
    assert result["mfm"]["percentiles_exact"] is True
    assert list(result["foreground_intensity_properties_per_channel"]) == ["0", "1"]
    for channel in range(2):
        ours = result["foreground_intensity_properties_per_channel"][str(channel)]
        expected = expected_properties(cases, channel)
        assert ours.keys() == expected.keys()
        for name in ("mean", "std"):
            assert ours[name] == pytest.approx(expected[name], rel=1e-6), name
        for name in ("min", "max", "median", "percentile_99_5", "percentile_00_5"):
            assert ours[name] == expected[name], name


def test_memory_is_bounded_and_percentiles_stay_close(cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    exact, _ = extract_fingerprint(cases, DATASET)
    monkeypatch.setattr(module, "MAX_VALUES", 600)
    kept: list[int] = []
    add = module._Pool.add

    def recording(self: Any, channels: Any) -> None:
        add(self, channels)
        kept.append(self._num_values)
        assert self._num_values == sum(len(item) for values in self._values for item in values)

    monkeypatch.setattr(module._Pool, "add", recording)
    thinned, _ = extract_fingerprint(cases, DATASET)
    assert max(kept) <= 600
    assert thinned["mfm"]["percentiles_exact"] is False
    for channel in ("0", "1"):
        one, other = (f["foreground_intensity_properties_per_channel"][channel] for f in (exact, thinned))
        for name in ("mean", "std", "min", "max"):
            assert one[name] == other[name]
        assert one["median"] == pytest.approx(other["median"], abs=0.1 * one["std"])


def test_the_number_of_workers_changes_nothing(cases: list[Case]) -> None:
    assert extract_fingerprint(cases, DATASET, 1) == extract_fingerprint(cases, DATASET, 3)


def test_failures_are_collected_and_the_rest_is_used(cases: list[Case], tmp_path: Path) -> None:
    good, _ = extract_fingerprint(cases[:2], DATASET)
    empty, one_channel = tmp_path / "empty.nii.gz", Case("one", cases[0].images[:1], cases[0].label)
    empty.write_bytes(b"")
    bad = [Case("empty", (empty, empty)), one_channel, Case("gone", (tmp_path / "no.nii.gz",) * 2)]
    result, failures = extract_fingerprint([cases[0], *bad, cases[1]], DATASET)
    codes = [(failure.case, failure.code) for failure in failures]
    assert codes == [("empty", "E_EMPTY"), ("one", "E_CHANNELS"), ("gone", "E_NOT_FOUND")]
    assert result["mfm"]["case_names"] == ["c0", "c1"]
    for name in ("spacings", "shapes_after_crop", "foreground_intensity_properties_per_channel"):
        assert result[name] == good[name]
    with pytest.raises(CasesFailedError) as error:
        extract_fingerprint(bad, DATASET)
    assert len(error.value.failures) == 3


def test_a_case_without_foreground_counts_for_shapes_only(cases: list[Case], tmp_path: Path) -> None:
    result, _ = extract_fingerprint([*cases, make_case(tmp_path, 7, 0)], DATASET)
    name = "foreground_intensity_properties_per_channel"
    assert result[name] == extract_fingerprint(cases, DATASET)[0][name]
    assert len(result["spacings"]) == 4


def test_labels_without_any_foreground_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MFMError, match="E_LABEL_VALUE"):
        extract_fingerprint([make_case(tmp_path, 0, 0), make_case(tmp_path, 1, 0)], DATASET)


def test_real_scans_agree_with_stock(shared_data: Path) -> None:
    """CT in HU with tumours of very different size."""
    folder = shared_data / "Dataset052_STSCT"
    dataset_json = json.loads((folder / "dataset.json").read_text())
    labels = sorted((folder / "labelsTr").iterdir())[:2]
    names = [label.name[: -len(dataset_json["file_ending"])] for label in labels]
    images = [folder / "imagesTr" / f"{name}_0000{dataset_json['file_ending']}" for name in names]
    cases = [Case(name, (image,), label) for name, image, label in zip(names, images, labels)]
    result, failures = extract_fingerprint(cases, dataset_json, 2)
    assert failures == []
    drawn = []
    for i, case in enumerate(cases):
        item = DatasetFingerprintExtractor.analyze_case([str(case.images[0])], str(case.label), SimpleITKIO, 100_000)
        assert result["shapes_after_crop"][i] == list(item[0])
        drawn.append(item[2][0])
    values = np.concatenate(drawn)
    ours = result["foreground_intensity_properties_per_channel"]["0"]
    assert ours["mean"] == pytest.approx(values.mean(), abs=0.02 * float(values.std()))
    assert ours["std"] == pytest.approx(values.std(), rel=0.02)
    for name, q in module.PERCENTILES.items():
        assert ours[name] == pytest.approx(np.percentile(values, q), abs=0.05 * float(values.std()))
