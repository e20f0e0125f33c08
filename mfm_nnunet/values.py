"""Values of settings: legal ranges of numbers, and values typed from JSON or from the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_args, get_origin

from mfm_nnunet.errors import MFMError

LARGEST = 10**9
"""Limit of all numbers: a larger one is a typing error that would run for ever or fill the memory."""
_NO_FINETUNING = "Probes are linear. Fine-tune a checkpoint for a few epochs with mfm_train, or compare with mfm_study."
REMOVED = {
    **dict.fromkeys(("probe.kind=finetune", "probe.steps", "probe.learning_rate"), _NO_FINETUNING),
    "pretrain.anatomy_fraction": "It was removed: crops are drawn from anywhere in the image.",
    "pretrain.balance_temperature": "It was removed: pretrain.balance_by draws all groups equally often.",
}
"""Advice about settings, or values of settings, of earlier versions."""


@dataclass(frozen=True)
class Range:
    """Legal values of a number: from ``low`` to ``high``; ``above`` and ``below`` exclude the limits themselves."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        is_high_enough = value > self.low if self.above else value >= self.low
        return is_high_enough and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        if self.above and self.below:
            return f"between {self.low:g} and {self.high:g}"
        low, high = "above" if self.above else "at least", "below" if self.below else "at most"
        return f"{low} {self.low:g} and {high} {self.high:.10g}"


def ranged(
    default: Any, low: float, high: float, *, above: bool = False, below: bool = False, ascending: bool = False
) -> Any:
    """Make a dataclass field with a legal range, also for each number of a tuple.

    None is legal if it is the default. ``ascending``: the numbers must be in ascending order.
    """
    return field(default=default, metadata={"range": Range(low, high, above, below), "ascending": ascending})


def require_in_range(settings: Any, prefix: str = "") -> None:
    """Raise MFMError (E_CONFIG) for the first number of a settings dataclass outside its range."""
    for item in dataclasses.fields(settings):
        value, name = getattr(settings, item.name), f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            require_in_range(value, f"{name}.")
            continue
        legal = item.metadata.get("range", Range(-LARGEST, LARGEST))
        values = value if isinstance(value, tuple) else (value,)
        shown = ",".join(map(str, values))
        if any(isinstance(number, (int, float)) and number not in legal for number in values):
            raise MFMError("E_CONFIG", f"{name}={shown}: must be {legal}.")
        if item.metadata.get("ascending") and list(values) != sorted(values):
            raise MFMError("E_CONFIG", f"{name}={shown}: the smaller number comes first.")


def parse_value(value: Any, hint: Any, name: str) -> Any:
    """Convert ``value`` (JSON or a string from the command line) to the annotated type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if type(None) in arguments and (value is None or str(value).lower() in ("none", "null")):
            return None
        options = [option for option in arguments if option is not type(None)]
        for option in options:
            try:
                return parse_value(value, option, name)
            except MFMError:
                if len(options) == 1:
                    raise
        raise MFMError("E_CONFIG", f"{name}={value}: expected {' or '.join(map(_describe, options))}.")
    if origin is Literal:
        if value in arguments:
            return value
        advice = REMOVED.get(f"{name}={value}") or f"legal values are {', '.join(map(str, arguments))}."
        raise MFMError("E_CONFIG", f"{name}={value}: {advice}")
    if origin is tuple:
        return _parse_tuple(value, arguments, name)
    if origin is dict:
        if isinstance(value, dict):
            return value
        raise MFMError("E_CONFIG", f"{name}={value}: expected a table of names and values.")
    return _parse_scalar(value, hint, name)


def _describe(hint: Any) -> str:
    if get_origin(hint) is tuple:
        arguments = get_args(hint)
        return "values" if arguments[-1] is Ellipsis else f"{len(arguments)} values"
    return getattr(hint, "__name__", str(hint))


def _parse_tuple(value: Any, arguments: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    items = value.strip("[]()").replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)):
        items = (items,)
    variadic = len(arguments) == 2 and arguments[1] is Ellipsis
    if variadic and isinstance(value, str) and value.lower() == "none":
        return ()
    if not variadic and len(items) != len(arguments):
        raise MFMError("E_CONFIG", f"{name}={value}: expected {len(arguments)} values.")
    types_ = [arguments[0]] * len(items) if variadic else list(arguments)
    return tuple(parse_value(item, hint, name) for item, hint in zip(items, types_))


def _parse_scalar(value: Any, hint: Any, name: str) -> Any:
    if hint is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "1", "yes", "false", "0", "no"):
            return value.lower() in ("true", "1", "yes")
    elif hint is str:
        return str(value)
    elif isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            number = hint(value)
            if (hint is float or float(value) == number) and math.isfinite(number):
                return number
    raise MFMError("E_CONFIG", f"{name}={value}: expected {hint.__name__}.")
