"""Which pretext tasks there are: every file of this folder that defines a PretextTask; the file name is the name.

Read from the source text, so that ``--list`` imports no torch.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard


@dataclass(frozen=True)
class TaskInfo:
    """A pretext task's name (for ``--pretext``), what it is in one line, and what its class says of itself."""

    name: str
    summary: str
    backbones: tuple[str, ...]
    hides: str
    recipe: str
    paper: str


def list_tasks() -> list[TaskInfo]:
    """The built-in pretext tasks in alphabetical order."""
    trees = {
        file.stem: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(Path(__file__).parent.glob("*.py"))
    }
    return [_info(name, tree, task) for name, tree in trees.items() for task in tree.body if _is_task(task)]


def _is_task(node: ast.stmt) -> TypeGuard[ast.ClassDef]:
    bases = node.bases if isinstance(node, ast.ClassDef) else []
    return any(isinstance(base, ast.Name) and base.id == "PretextTask" for base in bases)


def _info(name: str, tree: ast.Module, task: ast.ClassDef) -> TaskInfo:
    about: dict[str, Any] = {"backbones": ("resenc", "primus")}
    for node in task.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id in ("backbones", "hides", "recipe", "paper"):
            about[target.id] = ast.literal_eval(node.value)  # type: ignore[attr-defined]
    return TaskInfo(name, (ast.get_docstring(tree) or "").partition("\n")[0], **about)
