"""Recipes: settings of a run in a JSON file, for ``--recipe NAME`` (shipped) or ``--recipe FILE``.

A recipe is ``{"about": text, "command": text, "settings": {"pretrain.epochs": 1000, ...}}``. The optional keys
``"pretext"`` (a task) and ``"network"`` (a family) restrict its use. Settings override the plan; ``--set`` overrides
them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mfm_nnunet.errors import MFMError, about, nearest
from mfm_nnunet.fields import as_assignments
from mfm_nnunet.files import read_json
from mfm_nnunet.settings import override

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent.parent / "recipes"
KEYS = ("about", "command", "settings", "pretext", "network")
BELONGS = {"pretrain": "mfm_pretrain", "pretext": "mfm_pretrain", "probe": "mfm_pretrain", "finetune": "mfm_train"}
"""Command by group of settings; other groups are common to both commands."""


@dataclass(frozen=True)
class Recipe:
    """A recipe; ``pretext`` and ``network`` are None if it is not restricted to one."""

    file: Path
    about: str
    command: str
    assignments: tuple[str, ...]
    """Settings as ``name=value``, as for ``--set``."""
    pretext: str | None = None
    network: str | None = None

    def require_for(self, command: str, *, pretext: str | None, network: str) -> None:
        """Raise MFMError (E_CONFIG) if the recipe is for another command, task or network family.

        ``pretext`` is None for fine-tuning.
        """
        for assignment in self.assignments:
            name = assignment.partition("=")[0]
            owner = BELONGS.get(name.partition(".")[0], command)
            if owner != command:
                raise MFMError("E_CONFIG", f"{self.file}: {name} is a setting of {owner}, this is {command}.")
        if pretext and self.pretext not in (None, pretext):
            raise MFMError(
                "E_CONFIG", f"{self.file}: this recipe is for --pretext {self.pretext}, not {pretext}. Give that task."
            )
        if self.network not in (None, network):
            raise MFMError(
                "E_CONFIG",
                f"{self.file}: this recipe is for {self.network}, but the plan's network is {network}. Give a plan of "
                "that network with -p, or choose another recipe.",
            )


def shipped_recipes() -> list[str]:
    """List the names of the recipes in this package."""
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def read_recipe(name: str | Path) -> Recipe:
    """Read a shipped recipe by name, or a ``.json`` file.

    Raises MFMError: E_CONFIG for an unknown name or an invalid file, E_NOT_FOUND for a missing file.
    """
    file = Path(name)
    if file.suffix != ".json" and len(file.parts) == 1:
        if str(name) not in shipped_recipes():
            raise MFMError(
                "E_CONFIG",
                f"--recipe {name}: there is no such recipe. {nearest(str(name), shipped_recipes())} Your own "
                "recipe must be a .json file.",
            )
        file = FOLDER / f"{name}.json"
    content = read_json(file, "A recipe is a JSON file with about, command and settings.", "E_CONFIG")
    if problem := _problem(content):
        raise MFMError("E_CONFIG", f"{file}: {problem}")
    assignments = tuple(as_assignments(content["settings"]))
    return Recipe(
        file, content["about"], content["command"], assignments, content.get("pretext"), content.get("network")
    )


def apply_recipe(name: str | Path, run: Any, network: str, pretext: str | None = None) -> tuple[str, ...]:
    """Validate a recipe for ``run`` and return its settings as ``name=value``; ``pretext`` is None for fine-tuning.

    Raises MFMError (E_CONFIG) if the recipe is for something else or has an unknown setting.
    """
    recipe = read_recipe(name)
    recipe.require_for("mfm_pretrain" if pretext else "mfm_train", pretext=pretext, network=network)
    with about(recipe.file):
        override(run, recipe.assignments)
    logger.info("recipe %s: %s", recipe.file.stem, recipe.about)
    return recipe.assignments


def _problem(content: Mapping[str, Any]) -> str:
    """Describe the first problem of a recipe; empty if it is valid."""
    if unknown := [key for key in content if key not in KEYS]:
        return f"a recipe has no '{unknown[0]}'. {nearest(unknown[0], KEYS)}"
    if not isinstance(content.get("settings"), dict):
        return "a recipe needs 'settings', a table of names and values."
    texts = [key for key in KEYS if key != "settings" and (key in content or key in ("about", "command"))]
    if wrong := [key for key in texts if not isinstance(content.get(key), str)]:
        return f"a recipe needs '{wrong[0]}', a text."
    nested = [name for name, value in content["settings"].items() if isinstance(value, dict)]
    return f"{nested[0]} is a table; write its settings with dotted names." if nested else ""
