"""The rules of nnU-Net's ``dataset.json``, checked before anything is planned: all that is wrong in one message.

Stock nnU-Net has the same rules and finds a breach late, as an assertion or an index error in the loss. Fields that it
does not know are legal.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mfm_nnunet.errors import MFMError

ADVICE = "See nnU-Net's documentation/dataset_format.md."


def check_dataset_json(content: Mapping[str, Any], file: Path, code: str = "E_FORMAT") -> None:
    """Raise MFMError (``code``) with everything that is wrong in a dataset.json; ``file`` is for the message."""
    lacking = [key for key in ("labels", "file_ending") if key not in content]
    if lacking:
        raise MFMError(code, f"{file}: has no '{lacking[0]}'. Is this a dataset of nnU-Net v1? Convert it first.")
    problems = [] if isinstance(content["file_ending"], str) else ["file_ending must be a text such as .nii.gz"]
    problems += _channel_problems(content) + _label_problems(content["labels"], content.get("regions_class_order"))
    problems += _case_problems(content.get("dataset", {}))
    if problems:
        raise MFMError(code, f"{file}: {'; '.join(problems)}. {ADVICE}")


def _channel_problems(content: Mapping[str, Any]) -> list[str]:
    names = content.get("channel_names") or content.get("modality")
    if not isinstance(names, Mapping) or not all(isinstance(name, str) for name in names.values()):
        return ['channel_names must be a table of numbers and names such as {"0": "CT"}']
    return []


def _label_problems(labels: Any, order: Any) -> list[str]:
    if not isinstance(labels, Mapping):
        return ['labels must be a table of names and values such as {"background": 0, "liver": 1}']
    values = {str(name): _values(value) for name, value in labels.items()}
    wrong = sorted(name for name, numbers in values.items() if numbers is None)
    if wrong:
        return [f"labels: '{wrong[0]}' must have a number or a list of numbers, and not {labels[wrong[0]]!r}"]
    problems = [] if values.get("background") == [0] else ["labels: background must be there and be 0"]
    ignore = values.pop("ignore", None)
    used = sorted({number for numbers in values.values() for number in numbers or ()})
    if problems == [] and used != list(range(len(used))):
        problems.append(f"labels: the values must be 0, 1, 2, ... without a gap and are {', '.join(map(str, used))}")
    if ignore is not None and ignore != [len(used)]:
        problems.append(f"labels: ignore must be the highest value, here {len(used)}")
    if any(len(numbers or ()) > 1 for numbers in values.values()):
        wanted = sum(numbers != [0] for numbers in values.values())
        if not isinstance(order, list) or len(order) != wanted:
            problems.append(f"regions need a regions_class_order, a list of {wanted} numbers, one per region")
    return problems


def _values(value: Any) -> list[int] | None:
    """The numbers of a label or region, sorted; None for anything else."""
    items = value if isinstance(value, (list, tuple)) else [value]
    if not items or not all(isinstance(item, (int, str)) and str(item).lstrip("-").isdigit() for item in items):
        return None
    return sorted({int(item) for item in items})


def _case_problems(cases: Any) -> list[str]:
    """What is wrong with the map of cases that replaces the folders imagesTr and labelsTr."""
    if not isinstance(cases, Mapping):
        return ["dataset must be a table of case names"]
    wrong = sorted(
        str(name)
        for name, entry in cases.items()
        if not isinstance(entry, Mapping) or not isinstance(entry.get("images"), list) or not entry["images"]
    )
    if wrong:
        return [f'dataset: {len(wrong)} cases have no list of "images", e.g. {wrong[0]}']
    return []
