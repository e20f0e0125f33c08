"""What a file does to a reader ends one reading with a code; voxels and properties are those of nnU-Net's reader."""

from __future__ import annotations

import gzip
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from PIL import Image

from mfm_nnunet.errors import MFMError, StoppedError
from mfm_nnunet.images import decode, decoder
from mfm_nnunet.images.reading import read_image, read_label, reader_for

SHAPE = (7, 8, 9)
READERS = ("SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient")


def array_of(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return (np.random.default_rng(0).normal(size=shape) * 100).astype(np.int16)


def nifti(file: Path) -> Path:
    matrix = np.array([[0, 2, 0, 3], [-1.5, 0, 0, 1], [0, 0, 1, -7], [0, 0, 0, 1]], float)
    nibabel.save(nibabel.Nifti1Image(array_of(), matrix), file)
    return file


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Children with the readers of :mod:`tests.builders.hostile_readers`."""
    decoder.end_all()
    start = decoder._START.replace("serve(", "from tests.builders import hostile_readers as h; h.install(); serve(")
    monkeypatch.setattr(decoder, "_START", start)
    yield
    decoder.end_all()


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        ("abort", "E_READER_CRASH"),
        ("hang", "E_READER_TIMEOUT"),
        ("kill", "E_READER_MEMORY"),
        ("fill", "E_READER_MEMORY"),
        ("shift", "E_FORMAT"),
        ("random", "E_FORMAT"),
        ("fail", "E_FORMAT"),
    ],
)
@pytest.mark.usefixtures("hostile")
def test_what_ends_a_reader_ends_one_file(tmp_path: Path, behaviour: str, code: str) -> None:
    file, good = nifti(tmp_path / f"{behaviour}_0000.nii.gz"), nifti(tmp_path / "good_0000.nii.gz")
    with pytest.raises(MFMError) as error:
        read_image([file], "SimpleITKIO")
    assert error.value.code == code
    assert str(file) in error.value.message
    if behaviour == "abort":
        assert "SIGABRT: terminate called after throwing an instance of 'std::logic_error'" in error.value.message
    read_image([good], "SimpleITKIO")


@pytest.mark.usefixtures("hostile")
def test_a_reader_that_sleeps_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder.warm()
    read_image([nifti(tmp_path / "good_0000.nii.gz")], "SimpleITKIO")
    monkeypatch.setattr(decoder, "WALL_SECONDS", 1.0)
    with pytest.raises(MFMError, match="E_READER_TIMEOUT  "):
        read_image([nifti(tmp_path / "sleep_0000.nii.gz")], "SimpleITKIO")


@pytest.mark.usefixtures("hostile")
def test_what_readers_print_goes_to_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG, "mfm_nnunet")
    for _ in range(2):  # the second is written where the first was
        read_image([nifti(tmp_path / "print_0000.nii.gz")], "SimpleITKIO")
    assert [(record.levelname, record.message.rpartition(": ")[2]) for record in caplog.records] == [
        ("WARNING", "a remark"),
        ("DEBUG", "a detail"),
    ] * 2
    assert {"a remark", "a detail"}.isdisjoint("".join(capfd.readouterr()).splitlines())


@pytest.mark.usefixtures("hostile")
def test_a_thread_that_waits_for_a_reader_ends_with_all_readers(tmp_path: Path) -> None:
    file = nifti(tmp_path / "sleep_0000.nii.gz")
    errors: list[BaseException] = []

    def read() -> None:
        try:
            read_image([file], "SimpleITKIO")
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    until = time.monotonic() + 60
    while not any(child.is_ready for child in decoder._living) and time.monotonic() < until:
        time.sleep(0.01)
    decoder.end_all()
    thread.join(30)
    assert [type(error) for error in errors] == [StoppedError]
    read_image([nifti(tmp_path / "good_0000.nii.gz")], "SimpleITKIO")


def test_an_idle_child_ends_and_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder.end_all()
    slow_exit = "import atexit, time; atexit.register(time.sleep, 5)"
    start = decoder._START.replace(
        "serve(", f"{slow_exit}; import mfm_nnunet.images.decode as d; d.IDLE_SECONDS = 0.1; serve("
    )
    file = nifti(tmp_path / "x_0000.nii.gz")
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "_START", start)
        read_image([file], "SimpleITKIO")
    (child,) = decoder._living
    with pytest.raises(EOFError):
        decoder.receive(child.socket)
    read_image([file], "SimpleITKIO")  # at once, though the child may still be ending
    assert child not in decoder._living


@pytest.mark.parametrize("reader", READERS)
def test_arrays_and_properties_are_the_readers(tmp_path: Path, reader: str) -> None:
    file = nifti(tmp_path / "x_0000.nii.gz")
    expected, expected_properties = decode.find_reader_class(reader)().read_images((str(file),))
    array, properties = read_image([file], reader)
    np.testing.assert_array_equal(array, expected)
    assert array.strides == expected.strides  # sums are rounded in the order of the memory
    assert array.flags.writeable
    assert repr(properties) == repr(expected_properties)


def test_a_forked_process_leaves_the_children_to_its_parent(tmp_path: Path) -> None:
    file = nifti(tmp_path / "x_0000.nii.gz")
    read_image([file], "SimpleITKIO")
    before = set(decoder._living)
    process = multiprocessing.get_context("fork").Process(target=read_image, args=([file], "SimpleITKIO"))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert before <= decoder._living
    read_image([file], "SimpleITKIO")


def test_a_module_in_the_current_folder_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("open('imported', 'w').close()")
    nifti(tmp_path / "x_0000.nii.gz")
    (tmp_path / "elsewhere.py").write_text(
        "from pathlib import Path\nfrom mfm_nnunet.images.reading import read_image\n"
        "import sys\nread_image([Path(sys.argv[1])], 'SimpleITKIO')\n"
    )
    script = tmp_path / "scripts" / "read.py"
    script.parent.mkdir()
    (tmp_path / "elsewhere.py").rename(script)
    subprocess.run([sys.executable, script, "x_0000.nii.gz"], cwd=tmp_path, check=True, timeout=120)
    assert not (tmp_path / "imported").exists()


def with_latin_1_name(folder: Path, ending: str) -> Path:
    """A path whose name is no UTF-8, as files from old archives have."""
    return Path(os.fsdecode(os.fsencode(folder) + b"/M\xfcller_0000" + ending.encode()))


@pytest.mark.parametrize("ending", [".nii.gz", ".mhd", ".gipl", ".png"])
def test_names_that_are_no_utf_8_are_read(tmp_path: Path, ending: str) -> None:
    plain, file = tmp_path / f"plain_0000{ending}", with_latin_1_name(tmp_path, ending)
    if ending in (".png", ".bmp", ".jpg"):
        Image.fromarray(array_of((20, 30)).astype(np.uint8)).save(plain)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(array_of()), plain)
    expected, _ = read_image([plain], reader_for(plain))
    plain.rename(file)
    found, _ = read_image([file], reader_for(file))
    np.testing.assert_array_equal(found, expected)


def test_a_tiff_stack_and_its_spacing_are_found_whatever_the_name(tmp_path: Path) -> None:
    file = with_latin_1_name(tmp_path, ".tif")
    with open(file, "wb") as handle:
        tifffile.imwrite(handle, array_of())
    spacing = Path(str(file).removesuffix("_0000.tif") + ".json")
    spacing.write_text(json.dumps({"spacing": [3, 2, 1]}))
    assert read_image([file], reader_for(file))[1]["spacing"] == [3, 2, 1]
    label = file.with_name(file.name.replace("_0000", ""))
    file.rename(label)
    assert read_label(label, "Tiff3DIO")[1]["spacing"] == [3, 2, 1]


def test_a_bomb_is_refused_before_it_is_inflated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape((32000, 32000, 32000))
    header["magic"], header["vox_offset"] = b"n+1", 352
    file = tmp_path / "bomb_0000.nii.gz"
    file.write_bytes(gzip.compress(header.binaryblock + bytes(1 << 20)))
    with pytest.raises(MFMError) as error:
        read_image([file], "SimpleITKIO")
    assert error.value.code == "E_SHORT_DATA"  # no gzip stream of its size holds that much
    monkeypatch.setattr(decode.integrity, "MAX_DEFLATE_RATIO", 1 << 40)
    with pytest.raises(MFMError, match="E_TOO_LARGE  "):
        decode.integrity.declared_by(file)


def test_a_child_does_not_load_torch() -> None:
    """It would take seconds and half a gigabyte, for each thread that reads."""
    load = "import sys; from mfm_nnunet.images import decode; decode.find_reader_class('SimpleITKIO')"
    check = f"{load}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False"


def test_memory_is_kept_for_the_next_file_and_given_back_where_it_is_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the order of sizes, each array is its own: earlier ones are not overwritten."""
    decoder.end_all()
    start = decoder._START.replace("serve(", "import mfm_nnunet.images.decode as d; d.KEPT_BYTES = 4096; serve(")
    monkeypatch.setattr(decoder, "_START", start)
    files, wanted = [], []
    for number, size in enumerate((5, 30, 4, 31, 30, 3)):
        files.append(tmp_path / f"x{number}_0000.nii.gz")
        wanted.append(array_of((size, 6, 7)) + np.int16(number))
        nibabel.save(nibabel.Nifti1Image(wanted[-1], np.eye(4)), files[-1])
    found = [read_image([file], "SimpleITKIO")[0] for file in files]
    for array, expected in zip(found, wanted):
        np.testing.assert_array_equal(array[0], expected.T)
    assert len(decoder._living) == 1
    decoder.end_all()


def test_a_child_that_is_killed_after_its_answer_serves_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = nifti(tmp_path / "x_0000.nii.gz")
    with monkeypatch.context() as patch:
        patch.setattr(decoder._Child, "log_printed", lambda *_: decoder.end_all())
        read_image([file], "SimpleITKIO")
    read_image([file], "SimpleITKIO")
