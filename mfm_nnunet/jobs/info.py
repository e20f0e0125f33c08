"""Lists of what a command accepts: settings with defaults and legal values, recipes, tasks, networks, checkpoints."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mfm_nnunet.errors import MFMError, nearest
from mfm_nnunet.interchange.published import published_weights
from mfm_nnunet.models.families import family_named, network_names
from mfm_nnunet.planning.recipes import read_recipe, shipped_recipes
from mfm_nnunet.settings import MFMBlock, ProbeSettings, setting_names
from mfm_nnunet.tasks.base import find_task
from mfm_nnunet.tasks.registry import list_tasks
from mfm_nnunet.terminal import Rows

IN_THE_PLAN_ONLY = (
    *("finetune.checkpoint", "semi.corpus", "source", "modalities", "corpus", "universal", "network", "format"),
)
"""Fields of a plan's block that ``--set`` does not take."""
Row = dict[str, str]


def info(topic: Literal["settings", "recipes", "tasks", "networks", "checkpoints"]) -> list[Row]:
    """Return a table, a dict per row, of the settings, shipped recipes, pretext tasks, networks or published weights.

    Raises MFMError (E_CONFIG) for another topic.
    """
    tables = {
        "settings": _settings,
        "recipes": _recipes,
        "tasks": _tasks,
        "networks": _list_networks,
        "checkpoints": published_weights,
    }
    if topic not in tables:
        raise MFMError("E_CONFIG", f"no table of {topic}. {nearest(topic, tables)}")
    return Rows(tables[topic]())


def _settings() -> list[Row]:
    block, probe = MFMBlock(), ProbeSettings()
    rows = [describe_setting(name, block) for name in setting_names(block) if name not in IN_THE_PLAN_ONLY]
    rows += [describe_setting(name, probe, "probe.") for name in setting_names(probe)]
    for task in list_tasks():
        config = find_task(task.name).Config()
        own = [describe_setting(name, config, "pretext.") for name in setting_names(config)]
        rows += [{**row, "name": f"{row['name']} ({task.name})"} for row in own]
    return rows


def _recipes() -> list[Row]:
    recipes = {name: read_recipe(name) for name in shipped_recipes()}
    return [
        {"recipe": name, "about": recipe.about, "settings": " ".join(recipe.assignments), "command": recipe.command}
        for name, recipe in recipes.items()
    ]


def _tasks() -> list[Row]:
    return [
        {
            "task": task.name,
            "networks": ", ".join(task.backbones),
            "hidden or mixed": task.hides,
            "published batch x patch": task.recipe,
            "paper": task.paper,
        }
        for task in list_tasks()
    ]


def _list_networks() -> list[Row]:
    return [{"network": name, "kind": family_named(name).title} for name in network_names()]


def describe_setting(name: str, settings: Any, prefix: str = "") -> Row:
    """Return name, type, default, legal values and meaning of a setting with a dotted name."""
    *path, last = name.split(".")
    for part in path:
        settings = getattr(settings, part)
    item = next(item for item in dataclasses.fields(settings) if item.name == last)
    hint = get_type_hints(type(settings))[last]
    return {
        "name": prefix + name,
        "type": type_name(hint),
        "default": setting_text(getattr(settings, last)),
        "legal values": _legal(hint, item.metadata.get("range")),
        "meaning": _docstring(type(settings), last),
    }


def type_name(hint: Any) -> str:
    """Return a field's type as the tables call it."""
    options = [option for option in get_args(hint) if option is not type(None)]
    if type(None) in get_args(hint):
        return f"{type_name(options[0])} or none"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(type_name(option) for option in options)
    if get_origin(hint) is tuple:
        word = "word" if options[0] is str else options[0].__name__
        return f"{word}s" if ... in options else f"{len(options)} {options[0].__name__}s"
    return {Literal: "word", dict: "table"}.get(get_origin(hint)) or hint.__name__


def setting_text(value: Any) -> str:
    """Return a value as ``--set`` takes it."""
    if isinstance(value, tuple):
        return ",".join(map(setting_text, value)) or "none"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _legal(hint: Any, legal: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(get_args(hint))
    if hint is bool:
        return "true, false"
    if legal is None:
        return ""
    if legal.high >= 1024:
        return f"{'above' if legal.above else 'from'} {legal.low:g}"
    if legal.above and legal.below:
        return f"between {legal.low:g} and {legal.high:g}"
    low = f"above {legal.low:g}, up to" if legal.above else f"{legal.low:g} to"
    return f"{low} {'below ' if legal.below else ''}{legal.high:g}"


def _docstring(cls: type, name: str) -> str:
    """Return the string below a field in the source of its class."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    body = node.body if isinstance(node, ast.ClassDef) else []
    for item, after in itertools.pairwise(body):
        is_field = isinstance(item, ast.AnnAssign) and ast.unparse(item.target) == name
        if is_field and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            return " ".join(str(after.value.value).split())
    return ""
