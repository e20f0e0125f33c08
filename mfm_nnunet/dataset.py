"""nnU-Net's ``dataset.json``: read once and checked before planning; a single error lists all faults.

Stock nnU-Net has the same rules but finds a fault late, as an assertion or an index error in the loss. It also orders
channels by line instead of by number. Unknown fields are legal.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mfm_nnunet.errors import MFMError, nearest
from mfm_nnunet.files import IMAGE_ENDINGS, is_same, read_json

ADVICE = "See nnU-Net's documentation/dataset_format.md."
MAX_LABEL = (1 << 15) - 1
"""Limit of 16-bit label maps."""
MAX_CHANNELS = 10_000
"""Limit of the four channel digits in file names."""
_CHANNEL = re.compile(r"_?([0-9]{1,9})")
_LABEL = re.compile(r"-?[0-9]{1,9}")

SHARED_KEYS = (
    "channel_names", "modality", "labels", "regions_class_order", "numTraining", "file_ending",
    "overwrite_image_reader_writer", "name", "description", "reference", "licence", "license", "release",
    "task", "classes",
)  # fmt: skip
"""Keys copied into model folders and checkpoints; none of them names or locates a case."""
IMAGE_TASKS = ("classification", "multilabel", "regression")
"""Values of ``task`` for datasets with a label per image, in ``labels.csv``, instead of a mask."""


@dataclass(frozen=True)
class DatasetJson:
    """A valid dataset.json. ``content`` is the file's, for nnU-Net's own classes; do not modify it."""

    content: Mapping[str, Any]

    @classmethod
    def read(cls, file: Path, advice: str, code: str = "E_FORMAT", of_model: bool = False) -> DatasetJson:
        """Read, check and normalise a dataset.json.

        In the folder of a model (``of_model``) channels numbered other than 0, 1, 2, ... are legal: stock nnU-Net
        trained with them in the order of their lines. Raises MFMError: E_NOT_FOUND, else ``code`` with all faults;
        ``advice``, a sentence, ends the message.
        """
        content = _with_labels(read_json(file, advice, code))
        check_dataset_json(content, file, code, of_model)
        return cls(normalise(content))

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> DatasetJson:
        """Wrap a dataset.json that was just created or was checked with :func:`check_dataset_json`."""
        return cls(content)

    @classmethod
    def of_checkpoint(cls, init_args: Mapping[str, Any]) -> DatasetJson | None:
        """Return the dataset.json in a fine-tuned checkpoint; None if there is none with labels."""
        content = init_args.get("dataset_json")
        if isinstance(content, Mapping) and isinstance(content.get("labels"), Mapping):
            return cls(content)
        return None

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels, ordered by number; old datasets call the field ``modality``."""
        return tuple(self.content[_channel_key(self.content)].values())

    @property
    def labels(self) -> Mapping[str, Any]:
        """Names of all labels, including background and ignore, with their value or list of values."""
        return self.content["labels"]

    @functools.cached_property
    def foreground(self) -> dict[str, tuple[int, ...]]:
        """Names and values of the labels except background and ignore; a region has several values."""
        labels = {name: _as_tuple(value) for name, value in self.labels.items()}
        return {name: values for name, values in labels.items() if name != "ignore" and values != (0,)}

    @property
    def has_regions(self) -> bool:
        """True if any label is a region, i.e. has several values."""
        return any(isinstance(value, (list, tuple)) and len(value) > 1 for value in self.labels.values())

    @property
    def ignore(self) -> int | None:
        """Value of the label ``ignore``, if there is one."""
        value = self.labels.get("ignore")
        return None if value is None else int(value)

    @property
    def task(self) -> str:
        """One of :data:`IMAGE_TASKS` if images have labels as a whole, else ``segmentation``."""
        task = self.content.get("task")
        return str(task) if task in IMAGE_TASKS else "segmentation"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes of whole images, in the order of the outputs; empty if the field is absent."""
        return tuple(self.content.get("classes") or ())

    @property
    def file_ending(self) -> str:
        """Ending of the image files, with its dot."""
        return self.content["file_ending"]

    def differences(self, other: DatasetJson) -> list[str]:
        """Return the names of the differing fields that affect the meaning of images and labels."""
        return [name for name, value in self._meaning.items() if not is_same(value, other._meaning[name])]

    def shared(self) -> dict[str, Any]:
        """Return the part that may leave this computer: no names or paths of cases."""
        return {key: self.content[key] for key in SHARED_KEYS if key in self.content}

    @property
    def _meaning(self) -> dict[str, Any]:
        channels = self.content.get("channel_names") or self.content.get("modality")
        numbers = channel_numbers(channels) if isinstance(channels, Mapping) else None
        if isinstance(channels, Mapping) and numbers is not None:
            channels = {number: channels[name] for number, name in numbers.items()}
        return {
            "labels": list(self.labels.items()) if self.has_regions else self.labels,  # order of the outputs
            "regions_class_order": self.content.get("regions_class_order"),
            "channel_names": channels,
            "task": self.task,
            "classes": self.classes,
        }


def _with_labels(content: dict[str, Any]) -> dict[str, Any]:
    """Add the labels that nnU-Net's classes need to the dataset.json of a dataset without masks."""
    has_none = content.get("task") in IMAGE_TASKS and "labels" not in content
    return {**content, "labels": {"background": 0}} if has_none else content


def read_dataset_json(file: Path, advice: str, code: str = "E_FORMAT", of_model: bool = False) -> dict[str, Any]:
    """Return nnU-Net's dict of a dataset.json, read and checked as by :meth:`DatasetJson.read`."""
    return dict(DatasetJson.read(file, advice, code, of_model).content)


def normalise(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a valid dataset.json with channels "0", "1", ... in order, and a file ending that starts with a dot."""
    key = _channel_key(content)
    numbers = channel_numbers(content[key])
    channels = content[key] if numbers is None else {str(n): content[key][name] for n, name in sorted(numbers.items())}
    ending = content["file_ending"]
    return {**content, key: dict(channels), "file_ending": ending if ending.startswith(".") else f".{ending}"}


def channel_names(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the channel names by number as text; old datasets call the field ``modality``."""
    return dict(content[_channel_key(content)])


def channel_numbers(names: Mapping[Any, Any]) -> dict[int, Any] | None:
    """Return the key of each channel by its number; None unless the numbers are 0 to the number of channels - 1.

    ``0``, ``0000`` and ``_0000`` are the same number.
    """
    matches = {name: _CHANNEL.fullmatch(str(name)) for name in names}
    numbers = {int(match[1]): name for name, match in matches.items() if match}
    return numbers if sorted(numbers) == list(range(len(names))) else None


def check_dataset_json(content: Mapping[str, Any], file: Path, code: str = "E_FORMAT", of_model: bool = False) -> None:
    """Raise MFMError (``code``) with all faults of a dataset.json; ``file`` is for the message.

    ``of_model`` is as in :meth:`DatasetJson.read`.
    """
    lacking = [key for key in ("labels", "file_ending") if key not in content]
    if "labels" in lacking and "task" in content:
        raise MFMError(code, f"{file}: the task is {content['task']!r}, and must be one of {', '.join(IMAGE_TASKS)}.")
    if lacking:
        raise MFMError(code, f"{file}: has no '{lacking[0]}'. Is this a dataset of nnU-Net v1? Convert it first.")
    problems = _ending_problems(content["file_ending"]) + _channel_problems(content, of_model)
    problems += _label_problems(content["labels"], content.get("regions_class_order"))
    problems += _case_problems(content.get("dataset", {})) + _class_problems(content)
    if not isinstance(content.get("overwrite_image_reader_writer", ""), str):
        problems.append("overwrite_image_reader_writer must be the name of a reader")
    number = content.get("numTraining", 0)
    if type(number) is not int or number < 0:
        problems.append("numTraining must be the number of cases, from 0")
    if problems:
        raise MFMError(code, f"{file}: {'; '.join(problems)}. {ADVICE}")


def _as_tuple(value: Any) -> tuple[int, ...]:
    return tuple(int(item) for item in value) if isinstance(value, (list, tuple)) else (int(value),)


def _ending_problems(ending: Any) -> list[str]:
    """Require a known ending, in upper or lower case, because it becomes part of the names of written files."""
    if not isinstance(ending, str):
        return ["file_ending must be a text such as .nii.gz"]
    if f".{ending.lower().removeprefix('.')}" not in IMAGE_ENDINGS:
        return [f"file_ending {ending[:40]!r} is none that is read. {nearest(ending[:40], IMAGE_ENDINGS).rstrip('.')}"]
    return []


def _channel_key(content: Mapping[str, Any]) -> str:
    return "channel_names" if content.get("channel_names") else "modality"


def _channel_problems(content: Mapping[str, Any], of_model: bool) -> list[str]:
    names = content.get(_channel_key(content))
    if not isinstance(names, Mapping) or not 0 < len(names) <= MAX_CHANNELS:
        return ['channel_names must be a table of numbers and names such as {"0": "CT"}']
    if wrong := [key for key, name in names.items() if not isinstance(name, str)]:
        found = f"{str(wrong[0])[:40]!r}: {str(names[wrong[0]])[:40]}"
        return [f'channel_names must be a table of numbers and names such as {{"0": "CT"}}, number first, not {found}']
    other = content.get("modality")
    if other and (not isinstance(other, Mapping) or len(other) != len(names)):
        return ["channel_names and modality mean the same, and have different numbers of channels: remove modality"]
    if not of_model and channel_numbers(names) is None:
        wanted = "0" if len(names) == 1 else f"0 to {len(names) - 1}"
        found = ", ".join(str(key)[:40] for key in [*names][:5])
        return [f"channel_names: the numbers must be {wanted}, as in the names of the files (_0000), and are {found}"]
    return []


def _label_problems(labels: Any, order: Any) -> list[str]:
    if not isinstance(labels, Mapping):
        return ['labels must be a table of names and values such as {"background": 0, "liver": 1}']
    values = {str(name): _values(value) for name, value in labels.items()}
    wrong = sorted(name for name, numbers in values.items() if numbers is None)
    if wrong:
        found = str(labels[wrong[0]])[:60]
        return [f"labels: '{wrong[0]}' must have a number or a list of numbers, and not {found!r}"]
    problems = [] if values.get("background") == [0] else ["labels: background must be there and be 0"]
    ignore = values.pop("ignore", None)
    used = sorted({number for numbers in values.values() for number in numbers or ()})
    if problems == [] and used != list(range(len(used))):
        shown = ", ".join(map(str, used[:20])) + (", ..." if len(used) > 20 else "")
        problems.append(f"labels: the values must be 0, 1, 2, ... without a gap and are {shown}")
    if len(used) > MAX_LABEL:
        problems.append(f"labels: {len(used)} values, and at most {MAX_LABEL} can be stored")
    if ignore is not None and ignore != [len(used)]:
        problems.append(f"labels: ignore must be the highest value, here {len(used)}")
    if any(len(numbers or ()) > 1 for numbers in values.values()):
        wanted = sum(numbers != [0] for numbers in values.values())
        is_list = isinstance(order, list) and not any(isinstance(item, list) for item in order)
        numbers = [_values(item) for item in order] if is_list else []
        if len(numbers) != wanted or any(number is None or not 0 < number[0] <= MAX_LABEL for number in numbers):
            problems.append(f"regions need a regions_class_order, a list of {wanted} numbers, one per region")
    return problems


def _values(value: Any) -> list[int] | None:
    """Return the numbers of a label or region, sorted; None for anything else."""
    items = value if isinstance(value, (list, tuple)) else [value]
    if not items or not all(type(item) in (int, str) and _LABEL.fullmatch(str(item)) for item in items):
        return None
    return sorted({int(item) for item in items})


def _case_problems(cases: Any) -> list[str]:
    """Return the faults of the table of cases that replaces the folders imagesTr and labelsTr."""
    if not isinstance(cases, Mapping):
        return ["dataset must be a table of case names"]
    if wrong := sorted(str(name) for name, entry in cases.items() if not _is_case(entry)):
        return [
            f'dataset: {len(wrong)} cases have no list of paths as "images", or no path as "label", e.g. {wrong[0]}'
        ]
    return []


def _is_case(entry: Any) -> bool:
    """Return whether an entry names its files; surrogates, which stand for bytes that are not UTF-8, are legal."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("images"), list) or not entry["images"]:
        return False
    paths = [*entry["images"], *([entry["label"]] if entry.get("label") else [])]
    return all(isinstance(path, str) and path and "\0" not in path for path in paths)


def _class_problems(content: Mapping[str, Any]) -> list[str]:
    """Return the faults of the classes of whole images."""
    classes = content.get("classes")
    if content.get("task") not in IMAGE_TASKS or classes is None:
        return []
    are_names = isinstance(classes, list) and all(
        isinstance(name, str) and name.strip() == name != "" for name in classes
    )
    if not are_names or len(set(classes)) < len(classes):
        return ['classes must be a list of different names such as ["normal", "abnormal"]']
    return []
