"""Sources that know more than paths: tables with modality and masks, nnssl's index, BIDS trees; and corpus.json."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import zipfile
from pathlib import Path
from typing import Any

import pytest

from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.corpus import corpus_hash, load_cases, register_corpus, signature
from mfm_nnunet.data.sources import index_source
from tests.builders.corpora import NAME, refusal, touch

# --- CSV ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["anonymisation_mask", "anonymization_mask"])
def test_csv_with_everything(tmp_path: Path, spelling: str, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "a.nii.gz", "b.nii.gz", "m/anon.nii.gz")
    table = tmp_path / "list.csv"
    table.write_text(
        f"image,modality,dataset,anatomy_mask,{spelling},subject\n"
        "a.nii.gz,T1w,brains,m/lost.nii.gz,m/anon.nii.gz,s1\n"
        "b.nii.gz,CT,,,,\n"
    )
    first, second = index_source(table)
    assert (first.modality, first.dataset, first.subject) == ("T1w", "brains", "s1")
    assert first.anonymisation_mask == tmp_path / "m/anon.nii.gz"
    assert "column anatomy_mask is not used" in caplog.text
    assert second == Case("b", (tmp_path / "b.nii.gz",), None, "b", "CT")


# --- nnssl's pretrain_data.json -----------------------------------------------------------------------------------


def image(path: str, modality: str = "T1w", **entry: Any) -> dict[str, Any]:
    return {"name": Path(path).name, "image_path": path, "modality": modality, "image_info": {}, **entry}


def nnssl(folder: Path, datasets: dict[str, dict[str, dict[str, list[dict[str, Any]]]]]) -> Path:
    """An index of {dataset: {subject: {session: images}}} in nnssl's form, with what must not be taken over."""
    content = {
        "collection_index": -1,
        "collection_name": "Collection",
        "datasets": {
            dataset: {
                "dataset_index": dataset,
                "name": None,
                "dataset_info": {"license": "CC0"},
                "subjects": {
                    subject: {
                        "subject_id": subject,
                        "subject_info": {"age": 91.5, "sex": "female"},
                        "sessions": {
                            session: {"session_id": session, "session_info": {"bmi": 33.25}, "images": images}
                            for session, images in sessions.items()
                        },
                    }
                    for subject, sessions in subjects.items()
                },
            }
            for dataset, subjects in datasets.items()
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "pretrain_data.json"
    file.write_text(json.dumps(content))
    return file


def test_nnssl_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("scans_of_test", f"{tmp_path}/scans/")
    touch(tmp_path / "scans", "1/T1.nii.gz", "2/T1.nii.gz", "2/T2.nii.gz", "m/anat.nii.gz", "m/anon.nii.gz")
    touch(tmp_path / "index", "own/T1.nii.gz")
    masks = {"anatomy_mask": "$scans_of_test/m/anat.nii.gz", "anonymization_mask": "$scans_of_test/m/anon.nii.gz"}
    none = {"anatomy_mask": None, "anonymization_mask": None}
    quality = {"image_quality_score": -1}
    file = nnssl(
        tmp_path / "index",
        {
            "ds1": {
                "sub-01": {
                    "ses-1": [image("$scans_of_test/1/T1.nii.gz", associated_masks=masks, image_info=quality)],
                    "ses-2": [image(str(tmp_path / "scans/2/T1.nii.gz"), associated_masks=none),
                              image("${scans_of_test}/2/T2.nii.gz", "T2w", associated_masks=None)],
                }
            },
            "ds2": {"sub-01": {"ses-DEFAULT": [image("own/T1.nii.gz", modality=None)]}},
        },
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        cases = index_source(file)
    assert index_source(file.parent) == cases
    assert "image_info (quality scores, scanners) is not used" in caplog.text
    assert [case.images[0].relative_to(tmp_path).as_posix() for case in cases] == [
        "scans/1/T1.nii.gz", "scans/2/T1.nii.gz", "scans/2/T2.nii.gz", "index/own/T1.nii.gz"
    ]  # fmt: skip
    assert [case.name for case in cases] == ["ds1__sub-01__ses-1__T1", "ds1__sub-01__ses-2__T1", "T2",
                                             "ds2__sub-01__ses-DEFAULT__T1"]  # fmt: skip
    assert [case.subject for case in cases] == ["ds1/sub-01"] * 3 + ["ds2/sub-01"]
    assert [case.dataset for case in cases] == ["ds1"] * 3 + ["ds2"]
    assert [case.modality for case in cases] == ["T1w", "T1w", "T2w", ""]
    # By name: the mask of anatomy is never taken for that of anonymised voxels.
    assert cases[0].anonymisation_mask == tmp_path / "scans/m/anon.nii.gz"
    assert not any(case.anonymisation_mask for case in cases[1:])


def test_nothing_about_persons_is_taken_over_from_nnssl(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz")
    file = nnssl(tmp_path, {"ds": {"s": {"x": [image("a.nii.gz", image_info={"scanner": "Prisma"})]}}})
    folder = register_corpus(tmp_path / "raw", NAME, index_source(file), ["MR"])
    text = (folder / "corpus.json").read_text()
    assert not [word for word in ("91.5", "female", "33.25", "Prisma") if word in text]


def test_nnssl_index_with_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.nii.gz")
    masks = {"anatomy_mask": "lost_anat.nii.gz", "anonymization_mask": "lost_anon.nii.gz"}
    file = nnssl(tmp_path, {"ds": {"s": {"x": [image("a.nii.gz", associated_masks=masks), image("lost.nii.gz")]}}})
    message = refusal("E_NOT_FOUND", index_source, file)
    assert all(name in message for name in ("2 images or masks", "lost_anon", "lost.nii.gz"))
    monkeypatch.delenv("not_set_in_test", raising=False)
    file = nnssl(tmp_path, {"ds": {"s": {"x": [image("$not_set_in_test/a.nii.gz")]}}})
    assert "$not_set_in_test" in refusal("E_CONFIG", index_source, file)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"datasets": []}',
        '{"datasets": {"a": {}}}',
        '{"datasets": {"a": {"subjects": {"s": {"sessions": {"x": {"images": {}}}}}}}}',
        '{"datasets": {"a": {"subjects": {"s": {"sessions": {"x": {"images": [{"path": "a"}]}}}}}}}',
        '{"datasets": {"a": {"subjects": {"s": {"sessions": {"x": {"images": ["a.nii"]}}}}}}}',
        '{"datasets": {"a": {"subjects": {"s": 1}}}}',
    ],
)
def test_json_that_is_no_nnssl_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "pretrain_data.json").write_text(content)
    assert "pretrain_data.json" in refusal("E_FORMAT", index_source, tmp_path)


def test_masks_of_an_nnssl_index_that_are_a_list_are_refused(tmp_path: Path) -> None:
    """Positions were mixed up in published code; only names count."""
    touch(tmp_path, "a.nii.gz", "m.nii.gz")
    file = nnssl(tmp_path, {"ds": {"s": {"x": [image("a.nii.gz", associated_masks=["m.nii.gz", None])]}}})
    assert "associated_masks" in refusal("E_FORMAT", index_source, file)


def test_empty_nnssl_index(tmp_path: Path) -> None:
    refusal("E_NOT_FOUND", index_source, nnssl(tmp_path, {"ds": {"s": {"x": []}}}))


# --- BIDS ---------------------------------------------------------------------------------------------------------

SCANS = (
    "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz",
    "sub-01/ses-1/anat/sub-01_ses-1_acq-fast_FLAIR.nii.gz",
    "sub-01/ses-2/func/sub-01_ses-2_task-rest_bold.nii.gz",
    "sub-02/anat/sub-02_T2w.nii.gz",
)
OTHERS = (
    "sub-01/ses-1/anat/sub-01_ses-1_mod-T1w_defacemask.nii.gz",
    "sub-01/ses-1/anat/sub-01_ses-1_label-brain_mask.nii.gz",
    "sub-01/ses-1/anat/sub-01_ses-1_dseg.nii.gz",
    "sub-02/fmap/sub-02_phasediff.nii.gz",
    "derivatives/fmriprep/sub-01/anat/sub-01_desc-preproc_T1w.nii.gz",
    "sourcedata/sub-01/scan.nii.gz",
    "template.nii.gz",
    "sub-01/ses-2/func/sub-01_ses-2_task-rest_events.tsv",
    "sub-01/ses-1/anat/sub-01_ses-1_T1w.json",
)


def test_bids_dataset(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "ds000001"
    touch(root, "dataset_description.json", *SCANS, *OTHERS)
    with caplog.at_level(logging.INFO):
        cases = index_source(root)
    found = {case.images[0].relative_to(root).as_posix(): case for case in cases}
    assert sorted(found) == sorted(SCANS)
    assert [found[name].modality for name in SCANS] == ["T1w", "FLAIR", "bold", "T2w"]
    assert [found[name].subject for name in SCANS] == ["sub-01"] * 3 + ["sub-02"]
    assert {case.dataset for case in cases} == {"ds000001"}
    for words in ("3 masks, segmentations", "1 field maps", "images in derivatives/", "images in sourcedata/",
                  "1 images outside of the folders sub-*"):  # fmt: skip
        assert words in caplog.text


def test_bids_names_without_a_description(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    touch(root, *SCANS, "derivatives/x/sub-01_T1w.nii.gz", "sub-02/anat/sub-02_mask.nii.gz")
    assert {case.modality for case in index_source(root)} == {"T1w", "FLAIR", "bold", "T2w"}
    # A single image elsewhere, and it is a tree like any other: only what is named as a mask is left out.
    touch(root, "more/scan.nii.gz")
    cases = index_source(root)
    assert len(cases) == len(SCANS) + 2
    assert {case.modality for case in cases} == {""}


def test_a_folder_of_bids_datasets_and_other_scans(tmp_path: Path) -> None:
    touch(tmp_path / "ds1", "dataset_description.json", "sub-01/anat/sub-01_T1w.nii.gz", "derivatives/x.nii.gz")
    touch(tmp_path / "ds2", "sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_T2w.nii.gz")
    touch(tmp_path / "other", "scan.nii.gz")
    cases = index_source(tmp_path)
    found = {(case.dataset, case.modality, case.subject) for case in cases}
    assert found == {("ds1", "T1w", "ds1/sub-01"), ("ds2", "T1w", "ds2/sub-01"), ("ds2", "T2w", "ds2/sub-01"),
                     ("", "", "scan")}  # fmt: skip
    assert len({case.name for case in cases}) == len(cases) == 4


def test_a_bids_dataset_without_scans(tmp_path: Path) -> None:
    touch(tmp_path, "dataset_description.json", "derivatives/sub-01/anat/sub-01_T1w.nii.gz")
    refusal("E_NOT_FOUND", index_source, tmp_path)


# --- folders ------------------------------------------------------------------------------------------------------


def test_files_with_channel_numbers_outside_a_raw_folder_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "a_0000.nii.gz", "b_0000.nii.gz", "deep/c_0000.nii.gz")
    assert len(index_source(tmp_path)) == 3
    assert not caplog.messages  # one channel each: nothing is lost
    touch(tmp_path, "deep/c_0001.nii.gz")
    assert len(index_source(tmp_path)) == 4
    assert [("c_0000" in line, "imagesTr" in line) for line in caplog.messages] == [(True, True)]


def test_the_second_of_two_raw_folders_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTs/b_0000.nii.gz")
    assert [case.name for case in index_source(tmp_path)] == ["a"]
    assert "imagesTs is not taken" in caplog.text


def test_masks_beside_images_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "images/a.nii.gz", "masks/a.nii.gz", "images/b.nii.gz", "images/b_label.nii.gz", "labelsTr/c.nii")
    assert [case.name for case in index_source(tmp_path)] == ["a", "b"]
    assert "3 images are left out" in caplog.text
    assert "images/b_label.nii.gz" in caplog.text
    # Where everything would be left out, nothing says what is meant; the folder itself does.
    assert "column 'image'" in refusal("E_MASK", index_source, touch(tmp_path, "x/seg/d.nii")[0].parent.parent)
    assert [case.name for case in index_source(tmp_path / "masks")] == ["a"]
    table = tmp_path / "list.csv"
    table.write_text("image\nmasks/a.nii.gz\nimages/b_label.nii.gz\n")
    assert len(index_source(table)) == 2


def test_masks_that_were_registered_as_scans_are_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = touch(tmp_path / "scans", "images/a.nii.gz", "masks/a.nii.gz")
    folder = register_corpus(tmp_path, NAME, [Case("a", files[:1]), Case("mask", files[1:])], ["x"])  # type: ignore[arg-type]
    register_corpus(tmp_path, NAME, index_source(tmp_path / "scans"), ["x"])
    assert [case.name for case in load_cases(folder)] == ["a"]
    assert "named as masks and are dropped" in caplog.text


def test_a_stray_picture_is_left_out_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "a.nii.gz", "b.nii.gz", "c.nii.gz", "screenshot.png")
    assert [case.name for case in index_source(tmp_path)] == ["a", "b", "c"]
    assert "1 pictures among 3 volumes are left out, e.g. screenshot.png" in caplog.text


def test_an_image_that_is_listed_twice_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "a.nii.gz", "b.nii.gz", "x/b.nii.gz")
    entries = [image("a.nii.gz"), image("a.nii.gz"), image("b.nii.gz"), image("x/b.nii.gz")]
    cases = index_source(nnssl(tmp_path, {"ds": {"s": {"x": entries}}}))
    assert len({case.name.casefold() for case in cases}) == len(cases) == 3
    assert "a.nii.gz" in caplog.text
    table = tmp_path / "list.csv"
    table.write_text("case,image\nfirst,a.nii.gz\nsecond,a.nii.gz\n")
    assert [case.name for case in index_source(table)] == ["first"]


def test_two_files_of_one_channel(tmp_path: Path) -> None:
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTr/a_0000.nii")
    message = refusal("E_CHANNELS", index_source, tmp_path)
    assert "a_0000.nii and a_0000.nii.gz" in message


def test_archives_without_dicom(tmp_path: Path) -> None:
    archive = tmp_path / "scans" / "scans.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as content:
        content.writestr("a.nii.gz", "x")
    assert "Unpack it" in refusal("E_FORMAT", index_source, archive)
    assert "Unpack the archives in it, e.g. scans.zip" in refusal("E_NOT_FOUND", index_source, archive.parent)


def test_nnssls_index_of_preprocessed_data(tmp_path: Path) -> None:
    """By its name, by what it lists, and in a folder that holds nothing else."""
    file = nnssl(tmp_path / "a", {"ds": {"s": {"x": [image("$nowhere/a.nii.gz")]}}})
    renamed = file.rename(file.with_name("pretrain_data__onemmiso.json"))
    for code, source in (("E_FORMAT", renamed), ("E_NOT_FOUND", renamed.parent)):
        assert "pretrain_data.json of the raw folder" in refusal(code, index_source, source)
    file = nnssl(tmp_path / "b", {"ds": {"s": {"x": [image("$nowhere/a.b2nd")]}}})
    assert "pretrain_data.json of the raw folder" in refusal("E_FORMAT", index_source, file)


# --- corpus.json --------------------------------------------------------------------------------------------------


def described(tmp_path: Path) -> Case:
    a, anonymised = touch(tmp_path, "a.nii.gz", "anonymised.nii.gz")
    return Case("a", (a,), None, "s1", "T1w", "brains", anonymised)


def test_corpus_json_keeps_what_is_known(tmp_path: Path) -> None:
    case = described(tmp_path)
    plain = Case("b", tuple(touch(tmp_path, "b.nii.gz")))
    folder = register_corpus(tmp_path, NAME, [case, plain], ["MR"])
    assert load_cases(folder) == [case, plain]
    entries = json.loads((folder / "corpus.json").read_text())["cases"]
    assert set(entries[1]) == {"name", "images", "subject"}  # as older versions wrote it and read it
    # What is known changes by registering again; names stay.
    other = dataclasses.replace(case, name="x", modality="T2w", anonymisation_mask=None)
    register_corpus(tmp_path, NAME, [other, plain], ["MR"])
    assert load_cases(folder)[0] == dataclasses.replace(other, name="a")


def test_digests_depend_on_modality_dataset_and_masks(tmp_path: Path) -> None:
    case = described(tmp_path)
    variants = [
        case,
        dataclasses.replace(case, modality="CT"),
        dataclasses.replace(case, dataset="lungs"),
        dataclasses.replace(case, anonymisation_mask=None),
    ]
    assert len({signature([variant]) for variant in variants}) == len(variants)
    assert len({corpus_hash([variant]) for variant in variants}) == len(variants)
    before = signature([case]), corpus_hash([case])
    # Runs hold this hash: another one would not let them resume.
    sizes = {"images": [11], "anonymised": [12]}
    line = "a\0[11]\0('T1w', 'brains', {'anonymised': 12})"
    assert corpus_hash([case], {"a": sizes}) == hashlib.sha256(line.encode()).hexdigest()
    assert case.anonymisation_mask is not None
    case.anonymisation_mask.write_text("longer than it was before")
    assert signature([case]) != before[0]
    assert corpus_hash([case]) != before[1]
