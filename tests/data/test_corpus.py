"""Indexing scans where they lie, registering a corpus, and the cases of raw datasets."""

from __future__ import annotations

from pathlib import Path

import pytest
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.corpus import corpus_hash, is_corpus, load_cases, read_dataset_json, register_corpus, signature
from mfm_nnunet.data.labelled import warn_of_differences
from mfm_nnunet.data.sources import index_source
from tests.builders.corpora import NAME, dataset, refusal, touch


def names(source: Path) -> list[str]:
    return [case.name for case in index_source(source)]


# --- folder trees -------------------------------------------------------------------------------------------------


def test_tree(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "b.nii", "deep/er/c.mha", "d.PNG", "e.nrrd", ".hidden.nii", ".git/f.nii", "notes.txt")
    touch(tmp_path, "labelsTr/g.nii.gz", "__MACOSX/h.nii", "x.mhd", "x.raw", "._a.nii.gz")
    cases = index_source(tmp_path)
    assert [case.name for case in cases] == ["a", "b", "c", "e", "x"]
    assert all(len(case.images) == 1 and case.images[0].is_absolute() and case.label is None for case in cases)
    assert [case.subject for case in cases] == [case.name for case in cases]


def test_names_are_unique_whatever_the_file_system_does_with_case(tmp_path: Path) -> None:
    touch(tmp_path, "p1/T1.nii.gz", "p2/T1.nii.gz", "p2/T2.nii.gz", "a.nii", "a.nii.gz", "B.nii.gz", "b.nii.gz")
    found = names(tmp_path)
    assert len({name.casefold() for name in found}) == len(found) == 7
    assert {"p1__T1", "p2__T1", "T2"} <= set(found)
    assert sum(name.startswith("a_") for name in found) == 2
    assert found == names(tmp_path)


def test_names_are_safe_for_file_systems_and_for_nnunet(tmp_path: Path) -> None:
    long = "n" * 240
    touch(tmp_path, "a b\n<c>.nii", "-dash.nii", "Schädel.nii", "脳.nii", "脳/脳.nii", f"{long}.nii", f"{long}x.nii")
    touch(tmp_path, "x..nii")
    cases = [*index_source(tmp_path), *index_source(*touch(tmp_path, "case_seg.nii"))]
    for case in cases:
        assert case.name.isascii()
        assert not set(case.name) & set("/\\ \n<>:*?\"'|")
        assert case.name[0] not in "-."
        assert len(case.name) <= 120
        assert not case.name.endswith("_seg")
    assert len({case.name.casefold() for case in cases}) == len(cases) == 9


def test_bids_subjects(tmp_path: Path) -> None:
    touch(tmp_path, "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz", "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz")
    touch(tmp_path, "flat/sub-02_T1w.nii.gz", "other/x.nii.gz", "derivatives/sub-02/y.nii.gz")
    subjects = {case.name: case.subject for case in index_source(tmp_path)}
    assert subjects["sub-01_ses-1_T1w"] == subjects["sub-01_ses-2_T1w"] == "sub-01"
    assert subjects["sub-02_T1w"] == subjects["y"] == "sub-02"
    assert subjects["x"] == "x"


def test_links_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path, "scans/a.nii.gz", "elsewhere/b.nii.gz")
    (tmp_path / "scans" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "scans" / "loop").symlink_to(tmp_path / "scans")
    (tmp_path / "scans" / "lost.nii.gz").symlink_to(tmp_path / "nowhere")
    assert names(tmp_path / "scans") == ["a", "lost", "b"]  # the gate reports the lost one


def test_sources_without_images(tmp_path: Path) -> None:
    touch(tmp_path, "folder/readme.txt", "empty.csv")
    (tmp_path / "empty.csv").write_text("image\n")
    for source in (tmp_path / "folder", tmp_path / "missing", tmp_path / "empty.csv"):
        refusal("E_NOT_FOUND", index_source, source)
    refusal("E_FORMAT", index_source, tmp_path / "folder" / "readme.txt")


def test_a_single_image(tmp_path: Path) -> None:
    (file,) = touch(tmp_path, "scan.nii.gz")
    assert index_source(file) == [Case("scan", (file,))]


# --- CSV ----------------------------------------------------------------------------------------------------------


def test_csv(tmp_path: Path) -> None:
    files = touch(tmp_path, "in/a.nii.gz", "in/b.nii.gz", "out/a.nii.gz")
    table = tmp_path / "in" / "list.csv"
    table.write_text(f"\ufeffImage;Subject\na.nii.gz;anna\n b.nii.gz ;\n{files[2]};anna\n", encoding="utf-8")
    cases = index_source(table)
    assert [case.name for case in cases] == ["in__a", "b", "out__a"]
    assert [case.subject for case in cases] == ["anna", "b", "anna"]
    assert [case.images for case in cases] == [(file,) for file in files]


def test_csv_with_channels_and_names(tmp_path: Path) -> None:
    touch(tmp_path, "a1.nii", "a2.nii", "b1.nii", "b2.nii")
    table = tmp_path / "list.csv"
    table.write_text("case,image_1,image_0\nanna k,a2.nii,a1.nii\nbert,b2.nii,b1.nii\n")
    cases = index_source(table)
    assert [case.name for case in cases] == ["anna_k", "bert"]
    assert [[file.name for file in case.images] for case in cases] == [["a1.nii", "a2.nii"], ["b1.nii", "b2.nii"]]
    table.write_text("case,image_0,image_1\nA,a1.nii,x.nii\na,b1.nii,\n")
    refusal("E_NOT_FOUND", index_source, table, words=("line 2", "x.nii", "line 3"))
    table.write_text("case,image\nA,a1.nii\na,b1.nii\n")
    assert "A, a" in refusal("E_CONFIG", index_source, table)
    table.write_text("image\na1.nii\na1.nii\n")
    refusal("E_CONFIG", index_source, table)


def test_csv_that_is_none(tmp_path: Path) -> None:
    table = tmp_path / "list.csv"
    table.write_text("path,label\nx.nii,1\n")
    assert "path, label" in refusal("E_FORMAT", index_source, table)
    table.write_bytes(b"\xff\xfe\x00")
    refusal("E_FORMAT", index_source, table)


# --- nnU-Net raw folders without labels ---------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "inside"), [("imagesTr", False), ("imagesTs", True)])
def test_raw_folder(tmp_path: Path, folder: str, inside: bool) -> None:
    touch(tmp_path / folder, "a_0000.nii.gz", "a_0001.nii.gz", "b_x_0001.nii.gz", "b_x_0000.nii.gz")
    touch(tmp_path, "labelsTr/a.nii.gz")
    cases = index_source(tmp_path / folder if inside else tmp_path)
    assert [case.name for case in cases] == ["a", "b_x"]
    assert [[file.name[-8] for file in case.images] for case in cases] == [["0", "1"], ["0", "1"]]


def test_raw_folder_with_missing_channels(tmp_path: Path) -> None:
    touch(tmp_path / "imagesTr", "a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "c_0001.nii.gz")
    message = refusal("E_CHANNELS", index_source, tmp_path)
    assert "b_0001" in message
    assert "c_0000" in message
    assert "a_000" not in message
    touch(tmp_path / "imagesTr", "strange.nii.gz")
    assert "strange.nii.gz" in refusal("E_FORMAT", index_source, tmp_path)


def test_decathlon_folder_without_channel_numbers(tmp_path: Path) -> None:
    touch(tmp_path / "imagesTr", "liver_1.nii.gz", "liver_2.nii.gz")
    touch(tmp_path / "labelsTr", "liver_1.nii.gz")
    assert names(tmp_path) == ["liver_1", "liver_2"]


# --- registering --------------------------------------------------------------------------------------------------


def test_register_and_load(tmp_path: Path) -> None:
    touch(tmp_path / "scans", "sub-1/a.nii.gz", "sub-1/b.nii.gz")
    cases = index_source(tmp_path / "scans")
    folder = register_corpus(tmp_path / "raw", NAME, cases, ["MR"])
    assert folder == tmp_path / "raw" / NAME
    assert is_corpus(folder)
    assert sorted(file.name for file in folder.iterdir()) == ["corpus.json", "dataset.json"]
    assert load_cases(folder) == cases
    assert {case.subject for case in cases} == {"sub-1"}
    assert load_json(folder / "dataset.json") == {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    before = {file: file.read_bytes() for file in folder.iterdir()}
    register_corpus(tmp_path / "raw", NAME, index_source(tmp_path / "scans"), ["MR"])
    assert before == {file: file.read_bytes() for file in folder.iterdir()}


def test_registering_again_keeps_names_and_adds_files(tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    touch(scans, "p1/T1.nii.gz", "p1/T2.nii.gz")
    folder = register_corpus(tmp_path, NAME, index_source(scans), ["MR"])
    assert [case.name for case in load_cases(folder)] == ["T1", "T2"]
    touch(scans, "p2/T1.nii.gz", "p0/p1__T1.nii.gz")
    register_corpus(tmp_path, NAME, index_source(scans), ["MR"])
    cases = {case.images[0].relative_to(scans).as_posix(): case.name for case in load_cases(folder)}
    assert cases.pop("p0/p1__T1.nii.gz").startswith("p")
    assert cases == {"p1/T1.nii.gz": "T1", "p1/T2.nii.gz": "T2", "p2/T1.nii.gz": "p2__T1"}
    assert load_json(folder / "dataset.json")["numTraining"] == 4
    (scans / "p1" / "T2.nii.gz").unlink()
    register_corpus(tmp_path, NAME, index_source(scans), ["MR"])
    assert len(load_cases(folder)) == 3


def test_a_new_name_never_takes_that_of_a_registered_scan(tmp_path: Path) -> None:
    first, second = touch(tmp_path, "one/x.nii.gz", "two/x.nii.gz")
    folder = register_corpus(tmp_path, NAME, [Case("x", (first,))], ["MR"])
    register_corpus(tmp_path, NAME, [Case("y", (first,)), Case("X", (second,))], ["MR"])
    found = {case.images[0]: case.name for case in load_cases(folder)}
    assert found[first] == "x"
    assert found[second].casefold() != "x"
    assert {case.subject for case in load_cases(folder)} == set(found.values())


@pytest.mark.parametrize("name", ["Dataset1_X", "Corpus", "Dataset701_", "Dataset701_a/b", "Dataset701_a b"])
def test_dataset_names(tmp_path: Path, name: str) -> None:
    refusal("E_CONFIG", register_corpus, tmp_path, name, index_source(touch(tmp_path, "a.nii")[0]), ["MR"])


def test_number_of_channels(tmp_path: Path) -> None:
    a, b, c = touch(tmp_path, "a.nii", "b.nii", "c.nii")
    cases = [Case("x", (a, b)), Case("y", (c,))]
    assert "y: 1" in refusal("E_CHANNELS", register_corpus, tmp_path, NAME, cases, ["T1", "T2"])
    assert "x: 2" in refusal("E_CHANNELS", register_corpus, tmp_path, NAME, cases, ["T1"])
    refusal("E_NOT_FOUND", register_corpus, tmp_path, NAME, [], ["T1"])
    picture = index_source(touch(tmp_path, "rgb.png")[0])
    assert is_corpus(register_corpus(tmp_path, NAME, picture, ["R", "G", "B"]))


@pytest.mark.parametrize(
    ("files", "ending", "reader"),
    [
        (["a.nii.gz", "b.nii.gz", "c.mha"], ".nii.gz", "SimpleITKIO"),
        (["a.nii.gz", "b.nii.gz", "c.nii"], ".nii.gz", "NibabelIO"),
        (["a.mhd"], ".mhd", "SimpleITKIO"),
        (["a.jpg"], ".jpg", "NaturalImage2DIO"),
        (["a.png", "b.tif"], ".png", "NaturalImage2DIO"),
        (["a.tif", "b.tiff"], ".tif", None),
    ],
)
def test_file_ending_and_reader(tmp_path: Path, files: list[str], ending: str, reader: str | None) -> None:
    touch(tmp_path / "scans", *files)
    folder = register_corpus(tmp_path, NAME, index_source(tmp_path / "scans"), ["x"])
    dataset_json = load_json(folder / "dataset.json")
    assert dataset_json["file_ending"] == ending
    assert dataset_json.get("overwrite_image_reader_writer") == reader


def test_volumes_and_pictures_do_not_mix(tmp_path: Path) -> None:
    touch(tmp_path / "scans", "a.nii", "b.png", "c.png")
    message = refusal("E_FORMAT", register_corpus, tmp_path, NAME, index_source(tmp_path / "scans"), ["x"])
    assert "2 .png, 1 .nii" in message
    assert str(tmp_path / "scans" / "a.nii") in message


# --- raw datasets -------------------------------------------------------------------------------------------------


def as_stock(folder: Path) -> dict[str, tuple[list[str], str]]:
    found = get_filenames_of_train_images_and_targets(str(folder))
    return {str(name): (list(entry["images"]), entry["label"]) for name, entry in found.items()}


def test_labelled_dataset_equals_nnunets_listing(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "Dataset001_X")
    cases = load_cases(folder)
    assert {case.name: ([str(file) for file in case.images], str(case.label)) for case in cases} == as_stock(folder)
    assert not is_corpus(folder)
    assert [case.subject for case in cases] == ["a", "b_c"]


def test_map_of_files_with_variables_equals_nnunets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MFM_TEST_SCANS", str(tmp_path / "scans"))
    folder = tmp_path / "Dataset001_X"
    touch(tmp_path, "scans/a.nii.gz", "scans/a_label.nii.gz", "Dataset001_X/own/b.nii.gz", "Dataset001_X/b_l.nii.gz")
    entries = {
        "a": {"images": ["$MFM_TEST_SCANS/a.nii.gz"], "label": "${MFM_TEST_SCANS}/a_label.nii.gz"},
        "b": {"images": ["own/b.nii.gz"], "label": "own/../b_l.nii.gz"},
    }
    dataset(folder, channel_names={"0": "T1"}, dataset=entries)
    cases = load_cases(folder)
    assert {case.name: ([str(file) for file in case.images], str(case.label)) for case in cases} == as_stock(folder)
    entries["b"]["label"] = None  # type: ignore[assignment]
    dataset(folder, channel_names={"0": "T1"}, dataset=entries)
    assert [case.label is None for case in load_cases(folder)] == [False, True]
    entries["b"]["images"] = ["own/lost.nii.gz"]
    entries["a"]["label"] = "$MFM_TEST_SCANS/lost_label.nii.gz"
    dataset(folder, channel_names={"0": "T1"}, dataset=entries)
    refusal("E_NOT_FOUND", load_cases, folder, words=("lost.nii.gz", "lost_label.nii.gz"))


def test_all_missing_files_are_listed(tmp_path: Path) -> None:
    folder = dataset(tmp_path)
    touch(folder / "imagesTr", "c_0000.nii.gz", "c_0001.nii.gz", "d_0000.nii.gz", "d_0001.nii.gz")
    message = refusal("E_NOT_FOUND", load_cases, folder)
    assert "labelsTr/c.nii.gz" in message
    assert "labelsTr/d.nii.gz" in message
    assert "labelsTr/a.nii.gz" not in message
    (folder / "imagesTr" / "a_0001.nii.gz").unlink()
    touch(folder / "imagesTr", "d_0002.nii.gz")
    refusal("E_CHANNELS", load_cases, folder, words=("a_0001", "d_0002.nii.gz"))


@pytest.mark.parametrize(
    "stray",
    [
        "imagesTr/c_0000.NII.GZ", "imagesTr/deep/c_0000.nii.gz", "labelsTr/a.nii", "imagesTr/screenshot.png",
    ],
)  # fmt: skip
def test_images_that_would_be_left_out_are_refused(tmp_path: Path, stray: str) -> None:
    folder = dataset(tmp_path)
    touch(folder, stray, "imagesTr/.hidden.nii", "labelsTr/._a.nii.gz", "imagesTr/readme.md")
    refusal("E_FORMAT", load_cases, folder, words=("1 image files", stray))


@pytest.mark.parametrize(("one", "other"), [("Case", "case"), ("\u00c5ke", "A\u030ake")])
@pytest.mark.parametrize("is_mapped", [False, True])
def test_names_that_some_disks_take_for_one_are_refused(tmp_path: Path, one: str, other: str, is_mapped: bool) -> None:
    names = {name: {"images": ["imagesTr/a_0000.nii.gz"], "label": "labelsTr/a.nii.gz"} for name in (one, other)}
    folder = dataset(tmp_path, channel_names={"0": "T1"}, dataset=names if is_mapped else None)
    for file in (folder / "imagesTr").glob("*_0001*"):
        file.unlink()
    if not is_mapped:
        for name in names:
            touch(folder, f"imagesTr/{name}_0000.nii.gz", f"labelsTr/{name}.nii.gz")
    assert "2 cases" in refusal("E_CONFIG", load_cases, folder)


def test_a_label_whose_name_is_written_otherwise_is_explained(tmp_path: Path) -> None:
    folder = dataset(tmp_path)
    (folder / "labelsTr" / "a.nii.gz").rename(folder / "labelsTr" / "A.nii.gz")
    assert "letter case or Unicode form" in refusal("E_NOT_FOUND", load_cases, folder)


def test_a_case_that_the_map_holds_twice_is_refused(tmp_path: Path) -> None:
    """JSON takes the last of the two."""
    folder = dataset(tmp_path, dataset={"a": {"images": ["1.nii"]}, "z": {"images": ["2.nii"]}})
    file = folder / "dataset.json"
    file.write_text(file.read_text().replace('"z":', '"a":'))
    assert "'a' appears twice" in refusal("E_FORMAT", load_cases, folder)


def test_what_dataset_json_and_the_files_disagree_about_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {"images": ["imagesTr/a_0000.nii.gz"], "label": "labelsTr/a.nii.gz"}
    folder = dataset(tmp_path, channel_names={"0": "T1"}, dataset={"a": files, "again": files}, numTraining=9)
    warn_of_differences(folder, read_dataset_json(folder), load_cases(folder))
    assert "numTraining is 9, and there are 2 cases" in caplog.text
    assert "4 image files are left out" in caplog.text
    assert "a and again" in caplog.text
    caplog.clear()
    folder = dataset(tmp_path / "good")
    warn_of_differences(folder, read_dataset_json(folder), load_cases(folder))
    assert not caplog.messages


def test_colour_pictures_hold_their_channels_in_one_file(tmp_path: Path) -> None:
    dataset(tmp_path, file_ending=".png", channel_names={"0": "R", "1": "G", "2": "B"})
    for file in [*tmp_path.glob("*/*.nii.gz")]:
        file.unlink()
    touch(tmp_path, "imagesTr/a_0000.png", "labelsTr/a.png")
    assert [len(case.images) for case in load_cases(tmp_path)] == [1]


# --- hashes -------------------------------------------------------------------------------------------------------


def test_hash_and_signature(tmp_path: Path) -> None:
    a, b = touch(tmp_path, "anna.nii", "bert.nii")
    cases = [Case("anna", (a,)), Case("bert", (b,), a)]
    assert corpus_hash(cases) == corpus_hash(cases[::-1])
    assert "anna" not in corpus_hash(cases)
    assert len(corpus_hash(cases)) == 64
    assert corpus_hash(cases) != corpus_hash(cases[:1])
    hash_before, signature_before = corpus_hash(cases), signature(cases)
    assert signature(cases[::-1]) == signature_before
    b.write_text("longer than before")
    assert corpus_hash(cases) != hash_before
    assert signature(cases) != signature_before
    a.unlink()
    assert signature(cases) != signature_before
    assert len(corpus_hash([Case("without files", ())])) == 64


def test_real_datasets(shared_data: Path) -> None:
    folders = [folder for folder in sorted(shared_data.iterdir()) if folder.name.startswith("Dataset")]
    for folder in folders:
        cases = load_cases(folder)
        assert len(cases) == load_json(folder / "dataset.json")["numTraining"]
        assert all(case.label is not None and case.label.is_file() for case in cases)
        assert len(index_source(folder)) == len(cases)
    assert len(index_source(shared_data / "unlabelled" / "XRAY")) == 140
    assert len({case.name for case in index_source(shared_data / "unlabelled")}) == 183


def test_a_table_beside_the_dataset_names_the_subjects(tmp_path: Path) -> None:
    folder = dataset(tmp_path)
    (folder / "subjects.csv").write_text("case,subject\na,p1\nb_c,p1\n")
    assert {case.name: case.subject for case in load_cases(folder)} == {"a": "p1", "b_c": "p1"}
    (folder / "subjects.csv").write_text("case,subject\na,p1\n")
    refusal("E_CONFIG", load_cases, folder, words=("subjects.csv", "b_c"))
