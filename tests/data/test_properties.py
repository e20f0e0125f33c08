"""nnU-Net's pickles of properties: read as they are where they are plain, refused where they could run code."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mfm_nnunet.data.volumes import read_properties
from mfm_nnunet.errors import MFMError
from tests.builders import crafted


def properties_of(num_classes: int = 3) -> dict[str, Any]:
    """What nnU-Net stores, and the kinds of NumPy's values that its readers may add."""
    rng = np.random.default_rng(0)
    affine = rng.normal(size=(4, 4))
    return {
        "sitk_stuff": {"spacing": (1.0, 2.0, 3.0), "origin": (0.0, -1.5, 1e300), "direction": (1.0,) * 9},
        "nibabel_stuff": {"original_affine": affine, "reoriented_affine": np.asfortranarray(affine)},
        "spacing": [1.0, np.float32(2), np.float64(3)],
        "shape_before_cropping": (np.int64(10), 20, 30),
        "bbox_used_for_cropping": [[0, np.int64(10)], [0, 20], [0, 30]],
        "class_locations": {
            **{np.int64(label): rng.integers(0, 99, (10_000, 4)) for label in range(num_classes)},
            (1, 2): rng.integers(0, 99, (7, 4)),
            9: np.zeros((0, 4), np.int64),
            10: [],
        },
        "more": OrderedDict(a=None, b=True, c="\u00e9", d=b"\0", e=np.array([True, False])),
    }


def assert_same(one: Any, other: Any) -> None:
    """Equal with the types of all values; an ordered dictionary may have become a plain one."""
    if isinstance(other, dict):
        assert list(map(repr, one)) == list(map(repr, other))
        for key in other:
            assert_same(one[key], other[key])
    elif isinstance(other, (list, tuple)):
        assert (type(one), len(one)) == (type(other), len(other))
        for pair in zip(one, other):
            assert_same(*pair)
    else:
        assert type(one) is type(other)
        assert np.array_equal(one, other)
        if isinstance(other, np.ndarray):
            assert (one.dtype, one.shape, one.flags.writeable) == (other.dtype, other.shape, True)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_plain_properties_are_read_as_they_were_written(tmp_path: Path, protocol: int) -> None:
    file, written = tmp_path / "a.pkl", properties_of()
    file.write_bytes(pickle.dumps(written, protocol))
    assert_same(read_properties(file), written)


def test_names_of_both_numpy_versions_are_known(tmp_path: Path) -> None:
    file, written = tmp_path / "a.pkl", {"a": np.arange(3), "b": np.float32(2)}
    content = pickle.dumps(written, 3)
    current, other = (
        (b"numpy._core.", b"numpy.core.") if b"numpy._core." in content else (b"numpy.core.", b"numpy._core.")
    )
    assert current in content
    file.write_bytes(content.replace(current, other))
    assert_same(read_properties(file), written)


@pytest.mark.parametrize("name", list(crafted.pickles(Path("mark"))))
def test_pickles_that_could_run_code_are_refused(tmp_path: Path, name: str) -> None:
    file, mark = tmp_path / "a.pkl", tmp_path / "ran"
    file.write_bytes(crafted.pickles(mark)[name])
    with pytest.raises(MFMError) as caught:
        read_properties(file)
    assert (caught.value.code, caught.value.message.partition(":")[0]) == ("E_DATA_UNSAFE", str(file))
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b".", b"I1\n.", b"\x80\x04", b"N.", b"garbage", bytes(100), b"}", b"\x80\x04]q\x00h\x00a."),
        b"]" * 100_000 + b"a" * 99_999 + b".",  # deeper than Python's stack
        b"Nr\xff\xff\xff\xff0N.",  # a place in the memo that would take 64 GB in C
        b"\x8e" + (1 << 40).to_bytes(8, "little") + b"abc",
        b"\x96" + (1 << 40).to_bytes(8, "little") + b"abc",
        b"\x82\x01.",
    ],
)
def test_damaged_pickles_are_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.pkl"
    file.write_bytes(content)
    with pytest.raises(MFMError, match=r"E_SHORT_DATA  .*a\.pkl: the preprocessed file cannot be read"):
        read_properties(file)


def test_lists_that_hold_each_other_are_read_in_no_time(tmp_path: Path) -> None:
    value: Any = [1]
    for _ in range(60):  # as a tree it has 2 ** 60 leaves
        value = [value, value]
    file = tmp_path / "a.pkl"
    file.write_bytes(pickle.dumps({"a": value}))
    assert list(read_properties(file)) == ["a"]


def test_changed_arrays_do_not_reach_beyond_their_content(tmp_path: Path) -> None:
    file, content = tmp_path / "a.pkl", pickle.dumps({"a": np.zeros((3, 4), np.int64)}, 4)
    assert content.count(b"K\x03K\x04\x86") == 1
    file.write_bytes(content.replace(b"K\x03K\x04\x86", b"K\x30K\x04\x86"))
    with pytest.raises(MFMError, match="E_SHORT_DATA"):
        read_properties(file)
