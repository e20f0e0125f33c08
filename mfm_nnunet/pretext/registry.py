"""Which pretext tasks there are: every file of this folder that defines a PretextTask; the file name is the name.

Read from the source text, so that ``--list`` imports no torch.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TaskInfo:
    """A pretext task's name (for ``--pretext``) and what it is in one line."""

    name: str
    summary: str


def list_tasks() -> list[TaskInfo]:
    """The built-in pretext tasks in alphabetical order."""
    trees = {
        file.stem: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(Path(__file__).parent.glob("*.py"))
    }
    return [TaskInfo(name, _summary(tree)) for name, tree in trees.items() if _defines_task(tree)]


def _defines_task(tree: ast.Module) -> bool:
    bases = [base for node in tree.body if isinstance(node, ast.ClassDef) for base in node.bases]
    return any(isinstance(base, ast.Name) and base.id == "PretextTask" for base in bases)


def _summary(tree: ast.Module) -> str:
    return (ast.get_docstring(tree) or "").partition("\n")[0]
