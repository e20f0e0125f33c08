"""The arrows and the sizes: who may import whom, how large things may be, and rules that keep the code safe and quiet.

Everything is read from the source text. Raising a number is a decision, written down in ``documentation/decisions``.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator

import pytest

from setup_scripts.figures import Sources, figures, find_cycles, spine_modules

ROOT = "mfm_nnunet"
SOURCES = Sources()
CEILINGS = {
    "package lines": 39_802,
    "spine lines": 16_996,
    "files": 203,
    "files with one importer": 33,
    "modules over 420 lines": 0,
    "functions with over 8 parameters": 0,
    "functions over 60 lines": 0,
    "names defined twice": 11,
    "import cycles": 0,
    "optimisation steps": 1,
}
"""The names are those of ``setup_scripts/figures.py``, which prints what is behind a number."""
LEAVES = {
    *("errors", "version", "workspace", "checkpoint", "plan", "plan_rules", "dataset", "settings"),
    *("fields", "requests", "study_requests", "values"),
    *("modalities", "processes", "signals", "device", "metrics", "terminal", "files"),
}
"""Importable by all; they may import each other but nothing else of ours."""

ALLOWED: dict[str, set[str]] = {
    "images": set(),
    "data": {"images", "reports.progress"},
    "models": set(),
    "interchange": {"models"},
    "planning": {"data", "images", "models"},
    "tasks": {"models", "data.crops"},
    "reports": set(),
    "engine": {"tasks.base", "data", "images", "models", "reports"},
    "prediction": {"data", "images", "models", "reports.progress"},
    "finetune": {"engine", "tasks", "models", "data", "images", "prediction", "interchange", "reports"},
    "jobs": {
        *("data", "images", "planning", "models", "tasks"),
        *("engine", "finetune", "prediction", "interchange", "reports"),
    },
    "api": {"jobs"},
    "study": {"jobs", "reports"},
    "demo": {"jobs", "reports"},
    "cli": {"images", "models", "tasks", "study", "demo"},
}
"""Leaves and the own package come on top."""

ONLY = {"checkpoint": {"errors", "files"}, "settings": {"errors", "values"}, "values": {"errors"}}
"""Modules that may import no more than this."""
_HEAVY = {"torch", "numpy", "nnunetv2"}
FORBIDDEN = {"tasks": {"nnunetv2"}, "settings": _HEAVY, "values": _HEAVY}
LIGHT = {
    *("cli", "errors", "files", "version", "workspace", "settings", "terminal"),
    *("fields", "requests", "study_requests"),
}
"""What a command may import before it runs its job, besides the standard library."""
MAY_PRINT = {"cli", "reports.progress"}
UNPICKLES = "data.volumes"
UNSAFE = {
    *("blosc2.open", "blosc2.load", "blosc2.from_cframe"),  # they follow what a file names: see data.volumes
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "load_pickle", "eval", "exec"),
    *("yaml.load", "joblib.load", "dill.load", "marshal.loads", "os.system", "sys.exit", "exit", "quit"),
}

MODULES = SOURCES.files
"""Module names inside the package (``data.reading``; ``data`` for its ``__init__``) and their files."""


@pytest.mark.parametrize("title", CEILINGS)
def test_sizes(title: str) -> None:
    number, places = figures(SOURCES)[title]
    assert number <= CEILINGS[title], places


def test_the_modules_of_the_spine_exist() -> None:
    """A module that was renamed would silently count as none."""
    assert not set(spine_modules()) - set(SOURCES.files)


def test_every_figure_has_a_ceiling() -> None:
    assert list(CEILINGS) == list(figures(SOURCES))


def package_of(module: str) -> str:
    """The row of ALLOWED that a module belongs to."""
    return module if module in ALLOWED or module in LEAVES else module.partition(".")[0]


def imports(module: str, top_level_only: bool = False) -> set[str]:
    """Everything that a module imports, dotted, TYPE_CHECKING blocks left out."""
    found: set[str] = set()
    for node in walk(SOURCES.trees[module], top_level_only):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import in line {node.lineno}"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                is_module = name.removeprefix(f"{ROOT}.") in MODULES
                found.add(name if is_module else str(node.module))
    return found


def walk(node: ast.AST, top_level_only: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        if not (top_level_only and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            yield from walk(child, top_level_only)


def own_imports(module: str, top_level_only: bool = False) -> set[str]:
    """Modules of this package that a module imports, without the package's name."""
    names = imports(module, top_level_only)
    return {name.removeprefix(f"{ROOT}.") for name in names if name.startswith(f"{ROOT}.")}


def is_within(module: str, allowed: set[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


def test_modules_import_only_what_the_arrows_allow() -> None:
    wrong = []
    for module in (name for name in MODULES if name != "__init__"):
        package = package_of(module)
        allowed = LEAVES | (set() if package in LEAVES else {package} | ALLOWED[package])
        allowed = ONLY.get(module, allowed)
        wrong += [f"{module} imports {name}" for name in own_imports(module) if not is_within(name, allowed)]
    assert not wrong


def test_forbidden_libraries() -> None:
    for module in MODULES:
        found = {name.partition(".")[0] for name in imports(module)} & FORBIDDEN.get(package_of(module), set())
        assert not found, f"{module} imports {found}"
        assert not {"unittest", "unittest.mock"} & imports(module), module


def test_engine_knows_no_concrete_task() -> None:
    tasks = {name for name in MODULES if name.startswith("tasks.")} - {"tasks.base"}
    assert not [name for name in MODULES if name.startswith("engine") and own_imports(name) & tasks]


def test_nobody_imports_the_commands() -> None:
    for module in (name for name in MODULES if not name.startswith("cli")):
        assert not [name for name in own_imports(module) if is_within(name, {"cli"})], module


def test_commands_import_nothing_heavy_before_they_run() -> None:
    for module in (name for name in MODULES if is_within(name, {"cli"})):
        for name in imports(module, top_level_only=True):
            is_light = name.partition(".")[0] in sys.stdlib_module_names
            is_light |= name.startswith(ROOT) and is_within(name.removeprefix(f"{ROOT}."), LIGHT)
            assert is_light, f"{module} imports {name} at the top; move it into the function that needs it"


def test_no_import_cycles_between_packages() -> None:
    """``settings`` counts as a package of its own: everybody reads settings."""
    graph: dict[str, set[str]] = {}
    for module in (name for name in MODULES if name != "__init__"):
        targets = {package_of(name) for name in own_imports(module)}
        graph.setdefault(package_of(module), set()).update(targets - {package_of(module)})
    assert find_cycles(graph) == []


def test_find_cycles_finds_one() -> None:
    assert find_cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"]]
    assert find_cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_star_imports_and_no_print() -> None:
    for module, tree in SOURCES.trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert "*" not in [alias.name for alias in node.names], f"{module} line {node.lineno}"
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
                assert is_within(module, MAY_PRINT), f"{module} line {node.lineno}: use logging"


def test_no_unsafe_loading() -> None:
    """No pickle, eval or exec; torch.load only with weights_only=True; numpy.load never with allow_pickle."""
    for module, tree in SOURCES.trees.items():
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name, keywords = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            where = f"{module} line {node.lineno}: {name}"
            assert name not in UNSAFE, where
            assert not name.endswith((".extractall", "pydoc.locate")), where
            assert name != "torch.load" or keywords.get("weights_only") == "True", where
            assert keywords.get("allow_pickle", "False") == "False", where
            assert keywords.get("weights_only", "True") == "True", where
            assert keywords.get("shell", "False") == "False", where


def test_pickles_are_read_in_one_place() -> None:
    """nnU-Net's files of properties, with a list of the names that they may hold and no object behind any of them."""
    for module, tree in SOURCES.trees.items():
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            assert module == UNPICKLES or not [b for b in node.bases if "Unpickler" in ast.unparse(b)], module
