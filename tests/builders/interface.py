"""Everything that scripts and files of users may rely on, as plain values: commands, settings, functions, codes."""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import mfm_nnunet
from mfm_nnunet.cli.info import COMMANDS
from mfm_nnunet.settings import MFMBlock, ProbeSettings, setting_names, to_dict
from mfm_nnunet.tasks.base import find_task
from mfm_nnunet.tasks.registry import list_tasks

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "mfm_nnunet"
RAISED = re.compile(r"""["'](E_[A-Z]+(?:_[A-Z]+)*)(?=["']|  )""")
"""A code as an argument, or at the beginning of a message."""


def parser_of(name: str) -> Any:
    """Return the parser of the command ``mfm_NAME``."""
    return importlib.import_module(f"mfm_nnunet.cli.{name}").build_parser()


def error_codes(folder: Path = PACKAGE) -> list[str]:
    """Return the error codes in the source files below ``folder``, sorted."""
    texts = (file.read_text(encoding="utf-8") for file in folder.rglob("*.py"))
    return sorted({code for text in texts for code in RAISED.findall(text)})


def exit_codes() -> list[str]:
    """Return the documented exit codes; tests of the commands reach each."""
    page = ROOT / "documentation" / "reference" / "errors.md"
    return re.findall(r"^\| (\d+) \|", page.read_text(encoding="utf-8"), re.MULTILINE)


def settings_of(settings: Any) -> dict[str, Any]:
    """Return the dotted name and default of each setting."""
    values, found = to_dict(settings), {}
    for name in setting_names(settings):
        value = values
        for part in name.split("."):
            value = value[part]
        found[name] = value
    return found


def interface() -> dict[str, dict[str, Any]]:
    """Return the interface: one table per kind of thing, each entry of it a plain JSON value."""
    tasks = {info.name: find_task(info.name).Config() for info in list_tasks()}
    names = [name for name in mfm_nnunet.__all__ if inspect.isfunction(getattr(mfm_nnunet, name))]
    parameters = {name: list(inspect.signature(getattr(mfm_nnunet, name)).parameters.values()) for name in names}
    return {
        "flags": {f"mfm_{name} {flag}": value for name in COMMANDS for flag, value in _flags(name).items()},
        "settings": settings_of(MFMBlock())
        | {f"probe.{name}": value for name, value in settings_of(ProbeSettings()).items()},
        "task settings": {
            f"{task} {name}": value for task, config in tasks.items() for name, value in settings_of(config).items()
        },
        "tasks": dict.fromkeys(tasks, True),
        "recipes": {file.stem: True for file in sorted((PACKAGE / "recipes").glob("*.json"))},
        "exit codes": dict.fromkeys(exit_codes(), True),
        "error codes": dict.fromkeys(error_codes(), True),
        "functions": {f"{name}({p.name})": _plain(p.default) for name in names for p in parameters[name]},
        "positions": {
            f"{name}[{number}]": p.name
            for name in names
            for number, p in enumerate(parameters[name])
            if p.kind is not inspect.Parameter.KEYWORD_ONLY
        },
    }


def _flags(name: str) -> dict[str, Any]:
    """Return default and number of values of each spelling of a flag, and each of its legal words."""
    found: dict[str, Any] = {}
    for action in parser_of(name)._actions:
        value = [_plain(action.default), 1 if action.nargs is None else action.nargs]
        for spelling in action.option_strings or [action.dest.upper()]:
            found[spelling] = [*value, "required"] if action.required else value
            found |= {f"{spelling} {word}": True for word in action.choices or ()}
    return found


def _plain(value: Any) -> Any:
    if value is inspect.Parameter.empty:
        return "required"
    if value is argparse.SUPPRESS:
        return None
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value
