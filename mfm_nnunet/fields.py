"""Requests of jobs: a frozen dataclass whose fields are the flags of a command and the parameters in Python.

A field defines its default, its flag, its help and its legal values once. Nothing heavy is imported here, so that
``--help`` is fast.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from mfm_nnunet.errors import MFMError, nearest
from mfm_nnunet.files import is_file_name, shown, whole_number
from mfm_nnunet.settings import changes

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

SPACINGS = ("median", "onemm", "original")
ASSIGNMENT = re.compile(r"[A-Za-z_][\w.]*=")


@dataclass(frozen=True)
class Request:
    """Base of all requests. Raises MFMError (E_CONFIG) for an illegal value."""

    _: KW_ONLY
    workspace: str | Path | None = field(default=None, metadata={"help": "folder for all data and results"})

    def __post_init__(self) -> None:
        for item in fields(self):
            value, check = getattr(self, item.name), item.metadata.get("check")
            if check is None or value is None:
                continue
            try:
                object.__setattr__(self, item.name, check(value))
            except ValueError as error:
                words = value if isinstance(value, (list, tuple)) else [value]
                given = f"{item.metadata['spellings'][0]} {shown(' '.join(map(str, words)))}"
                raise MFMError("E_CONFIG", f"{given}: {str(error).removesuffix('.')}.") from None


def flag(spellings: str, help_text: str, **details: Any) -> dict[str, Any]:
    """Return the metadata of a field: its help, and the spellings of its flag, separated by spaces.

    ``check`` converts a value to the legal one or raises ValueError. ``position=True`` also accepts a positional
    argument. ``parts`` are the settings accepted by ``--set``. Other details are passed to argparse.
    """
    return {"spellings": spellings.split(), "help": help_text, **details}


def option(default: Any, spellings: str, help_text: str, **details: Any) -> Any:
    """Return a dataclass field with a default; see :func:`flag`."""
    return field(default=default, metadata=flag(spellings, help_text, **details))


def takes(request: Callable[P, R]) -> Callable[[Callable[[R], T]], Callable[P, T]]:
    """Let a job accept the fields of its request: ``train(4, "2d", 0)`` runs ``TrainRequest(4, "2d", 0)``.

    The function's signature and documentation show all fields.
    """

    def decorate(job: Callable[[R], T]) -> Callable[P, T]:
        @functools.wraps(job)
        def call(*arguments: P.args, **options: P.kwargs) -> T:
            return job(request(*arguments, **options))

        lines = [f"{item.name}: {item.metadata['help']}" for item in fields(request)]  # type: ignore[arg-type]
        call.__doc__ = "\n".join([inspect.cleandoc(job.__doc__ or ""), "", *lines])
        returned = inspect.signature(job).return_annotation
        call.__signature__ = inspect.signature(request).replace(return_annotation=returned)  # type: ignore[attr-defined]
        return call

    return decorate


def assignments(examples: str, *parts: str) -> Any:
    """Return the field of ``--set``, which accepts these parts of the settings and those outside all parts.

    In Python it also takes a dict, nested or with dotted names, or a settings dataclass: what it has otherwise than the
    defaults is changed.
    """
    text = f"change a setting; several may follow, e.g. {examples}"
    check_each = each(matching(rf"(?s){ASSIGNMENT.pattern}.*", "expected name=value"))

    def check(values: Any) -> tuple[str, ...]:
        given = changes(values) if dataclasses.is_dataclass(values) else values
        return check_each(as_assignments(given) if isinstance(given, Mapping) else given)

    return option((), "--set", text, action="append", metavar="NAME=VALUE", parts=parts, check=check)


def as_assignments(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return settings, nested or with dotted names, as ``name=value`` strings."""
    found: list[str] = []
    for name, value in settings.items():
        is_nested = isinstance(value, Mapping)
        found += as_assignments(value, f"{prefix}{name}.") if is_nested else [f"{prefix}{name}={as_text(value)}"]
    return found


def as_text(value: Any) -> str:
    """Format a value as for ``--set name=``."""
    if value is None:
        return "none"
    return ",".join(map(as_text, value)) if isinstance(value, (list, tuple)) else str(value)


# Legal values


def at_least_one(value: Any) -> int:
    """Convert ``value`` to a whole number of at least 1."""
    if number := whole_number(str(value)):
        return number
    raise ValueError("expected a number of at least 1")


def at_least_zero(value: Any) -> int:
    """Convert ``value`` to a whole number from 0."""
    if (number := whole_number(str(value))) is None:
        raise ValueError("expected a number from 0")
    return number


def number_between(low: float, high: float, rule: str) -> Callable[[Any], float]:
    """Return a check for numbers above ``low`` up to ``high``; ``rule`` ends its message."""

    def check(value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not low < number <= high:
            raise ValueError(f"expected a number {rule}")
        return number

    return check


def to_fold(value: Any) -> int | str:
    """Convert ``value`` to the number of a fold, or ``all``."""
    number = whole_number(str(value))
    if number is None and value != "all":
        raise ValueError("expected a number from 0, or 'all'")
    return "all" if number is None else number


def to_spacing(value: Any) -> str | tuple[float, ...]:
    """Convert ``value`` to a word for a spacing, or to three lengths in mm."""
    words = [value] if isinstance(value, str) else list(value)
    if len(words) == 1 and words[0] in SPACINGS:
        return str(words[0])
    try:
        lengths = tuple(float(word) for word in words)
    except (TypeError, ValueError):
        lengths = ()
    if len(lengths) != 3 or not all(1e-3 <= length <= 1e3 for length in lengths):
        raise ValueError("expected median, onemm, original or three lengths in mm")
    return lengths


def one_of(*legal: str) -> Callable[[Any], str]:
    """Return a check for a set of words; its message suggests the nearest one."""

    def check(value: Any) -> str:
        if value not in legal:
            raise ValueError(f"unknown. {nearest(str(value), legal)}")
        return str(value)

    return check


def matching(pattern: str, rule: str) -> Callable[[str], str]:
    """Return a check for names that match the whole ``pattern``; ``rule`` is its message."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(rule)
        return value

    return check


def each(check: Callable[[Any], T]) -> Callable[[Sequence[Any]], tuple[T, ...]]:
    """Return a check for sequences that applies ``check`` to each item."""
    return lambda values: tuple(check(value) for value in values)


def to_file_name(value: str) -> str:
    """Return the plain name of a file in a fold's folder."""
    if not is_file_name(value) or "*" in value:
        raise ValueError("expected the name of a file in the fold folders, without a path")
    return value


@dataclass(frozen=True)
class PartRequest(Request):
    """Base of requests whose cases several commands may share, e.g. the tasks of a job array."""

    _: KW_ONLY
    num_parts: int = option(
        1, "-num_parts --num-parts", "number of commands that share the cases", metavar="N", check=at_least_one
    )
    part_id: int = option(0, "-part_id --part-id", "number of this command, from 0", metavar="I", check=at_least_zero)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.part_id >= self.num_parts:
            raise MFMError("E_CONFIG", f"-part_id {self.part_id}: parts are numbered from 0 to -num_parts minus 1.")
