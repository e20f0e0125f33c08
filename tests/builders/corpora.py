"""Files of corpora and raw datasets that hold no images, and the message of a refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mfm_nnunet.errors import MFMError

NAME = "Dataset701_Corpus"


def touch(root: Path, *names: str) -> list[Path]:
    files = [root / name for name in names]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(file.name)
    return files


def refusal(code: str, action: object, *arguments: object, words: tuple[object, ...] = ()) -> str:
    """The message of a refusal, with ``words`` in it."""
    with pytest.raises(MFMError) as error:
        action(*arguments)  # type: ignore[operator]
    assert error.value.code == code
    assert not [word for word in words if str(word) not in error.value.message]
    return error.value.message


def dataset(folder: Path, **changes: object) -> Path:
    content = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "a": 1},
        "numTraining": 2,
        "file_ending": ".nii.gz",
        **changes,
    }
    touch(folder / "imagesTr", "a_0000.nii.gz", "a_0001.nii.gz", "b_c_0000.nii.gz", "b_c_0001.nii.gz", "note.txt")
    touch(folder / "labelsTr", "a.nii.gz", "b_c.nii.gz")
    (folder / "dataset.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return folder
