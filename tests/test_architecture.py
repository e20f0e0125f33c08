"""The arrows: who may import whom, read from the source text, and rules that keep the code safe and quiet."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mfm_nnunet"
ROOT = "mfm_nnunet"
LEAVES = {
    *("errors", "version", "workspace", "checkpoint", "children", "plan", "plan_rules", "dataset", "settings"),
    *("processes", "device", "metrics", "terminal", "files", "fields", "requests"),
}
"""Importable by all; they may import each other but nothing else of ours."""

ALLOWED: dict[str, set[str]] = {
    "images": set(),
    "data": {"images"},
    "models": set(),
    "interchange": {"models"},
    "planning": {"data", "images", "models", "interchange"},
    "tasks": {"models", "data.augment"},
    "reports": set(),
    "engine": {"tasks.base", "data", "images", "models", "reports"},
    "prediction": {"data", "images", "models"},
    "finetune": {"engine", "models", "data", "images", "prediction", "interchange"},
    "jobs": {
        "data",
        "images",
        "planning",
        "models",
        "tasks",
        "engine",
        "finetune",
        "prediction",
        "interchange",
        "reports",
    },
    "study": {"jobs", "data", "images", "planning", "models", "finetune", "interchange"},
    "api": {
        "jobs",
        "data",
        "images",
        "planning",
        "models",
        "tasks",
        "engine",
        "finetune",
        "prediction",
        "study",
        "interchange",
    },
    "demo": {"api", "data", "images", "reports"},
    "cli": {"api", "jobs", "data", "images", "planning", "models", "tasks", "engine", "finetune", "prediction", "demo"},
}
"""Leaves and the own package come on top."""

FORBIDDEN_EXTERNAL = {"tasks": {"nnunetv2"}, "settings": {"torch", "numpy", "nnunetv2"}}
LIGHT = {"cli", "errors", "files", "version", "workspace", "settings", "terminal", "fields", "requests"}
"""What a command may import before it runs its job, besides the standard library."""


def all_modules() -> dict[str, Path]:
    """Module names inside the package (``data.reading``; ``data`` for its ``__init__``) and their files."""
    modules = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return modules


MODULES = all_modules()


def package_of(module: str) -> str:
    """The row of ALLOWED that a module belongs to."""
    return module if module in ALLOWED or module in LEAVES else module.partition(".")[0]


def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports(module: str, top_level_only: bool = False) -> set[str]:
    """Everything that a module imports, dotted, TYPE_CHECKING blocks left out."""
    found: set[str] = set()
    for node in walk(tree_of(module), top_level_only):
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


@pytest.mark.parametrize("module", [module for module in MODULES if module])
def test_imports_only_what_the_arrows_allow(module: str) -> None:
    package = package_of(module)
    allowed = LEAVES | (set() if package in LEAVES else {package} | ALLOWED[package])
    if package == "settings":
        allowed = {"errors"}
    wrong = sorted(name for name in own_imports(module) if not is_within(name, allowed))
    assert not wrong, f"{module} imports {', '.join(wrong)}, but {package} may only import {', '.join(sorted(allowed))}"


@pytest.mark.parametrize("package", sorted(FORBIDDEN_EXTERNAL))
def test_forbidden_libraries(package: str) -> None:
    for module in (name for name in MODULES if package_of(name) == package):
        found = {name.partition(".")[0] for name in imports(module)} & FORBIDDEN_EXTERNAL[package]
        assert not found, f"{module} imports {found}"


def test_checkpoint_and_schema_import_next_to_nothing() -> None:
    assert own_imports("checkpoint") <= {"errors", "files"}
    assert own_imports("settings") <= {"errors"}


def test_engine_knows_no_concrete_task() -> None:
    assert not {name for module in MODULES if module.startswith("engine") for name in own_imports(module)} & {
        f"tasks.{file.stem}" for file in (PACKAGE / "tasks").glob("*.py") if file.stem != "base"
    }


def test_nobody_imports_the_commands() -> None:
    guilty = [
        module for module in MODULES if not module.startswith("cli") and is_within_any(own_imports(module), "cli")
    ]
    assert not guilty


def is_within_any(names: set[str], package: str) -> bool:
    return any(is_within(name, {package}) for name in names)


@pytest.mark.parametrize("module", [module for module in MODULES if module == "cli" or module.startswith("cli.")])
def test_commands_import_nothing_heavy_before_they_run(module: str) -> None:
    for name in imports(module, top_level_only=True):
        own = name.removeprefix(f"{ROOT}.")
        is_light = is_within(own, LIGHT) if name.startswith(ROOT) else name.partition(".")[0] in sys.stdlib_module_names
        assert is_light, f"{module} imports {name} at the top; move it into the function that needs it"


def test_no_import_cycles_between_modules() -> None:
    graph = {module: own_imports(module) & set(MODULES) for module in MODULES if module}
    cycle = find_cycle(graph)
    assert cycle is None, " -> ".join(cycle or [])


def test_no_import_cycles_between_packages() -> None:
    """``settings`` counts as a package of its own: everybody reads settings."""
    graph: dict[str, set[str]] = {}
    for module in (name for name in MODULES if name):
        targets = {package_of(name) for name in own_imports(module)}
        graph.setdefault(package_of(module), set()).update(targets - {package_of(module)})
    cycle = find_cycle(graph)
    assert cycle is None, " -> ".join(cycle or [])


def find_cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """A path that comes back to its start, if there is one."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for target in sorted(graph.get(node, ())):
            cycle = visit(target, [*path, node])
            if cycle:
                return cycle
        done.add(node)
        return None

    return next((cycle for node in sorted(graph) if (cycle := visit(node, []))), None)


def test_find_cycle_finds_one() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


@pytest.mark.parametrize("module", list(MODULES))
def test_no_star_imports(module: str) -> None:
    stars = [
        node.lineno
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]
    assert not stars, f"{module}: star import in lines {stars}"


@pytest.mark.parametrize("module", [m for m in MODULES if not m.startswith("cli") and m != "reports.progress"])
def test_no_print(module: str) -> None:
    lines = [node.lineno for node in calls(module) if isinstance(node.func, ast.Name) and node.func.id == "print"]
    assert not lines, f"{module}: print in lines {lines}; use logging"


@pytest.mark.parametrize("module", list(MODULES))
def test_no_unsafe_loading(module: str) -> None:
    """No pickle, eval or exec; torch.load only with weights_only=True; numpy.load never with allow_pickle."""
    for node in calls(module):
        name, keywords = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        where = f"{module} line {node.lineno}: {name}"
        assert name not in UNSAFE, where
        assert not name.endswith((".extractall", "pydoc.locate")), where
        assert name != "torch.load" or keywords.get("weights_only") == "True", where
        assert keywords.get("allow_pickle", "False") == "False", where
        assert keywords.get("weights_only", "True") == "True", where
        assert keywords.get("shell", "False") == "False", where


@pytest.mark.parametrize("module", list(MODULES))
def test_pickles_are_read_in_one_place(module: str) -> None:
    """nnU-Net's files of properties, with a list of the names that they may hold and no object behind any of them."""
    bases = {
        ast.unparse(base)
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.ClassDef)
        for base in node.bases
        if "Unpickler" in ast.unparse(base)
    }
    assert not bases or module == "data.properties", f"{module} unpickles with a subclass of {bases}"


UNSAFE = {
    *("blosc2.open", "blosc2.load", "blosc2.from_cframe"),  # they follow what a file names: see data.volumes
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "load_pickle", "eval", "exec"),
    *("yaml.load", "joblib.load", "dill.load", "marshal.loads", "os.system", "sys.exit", "exit", "quit"),
}


def calls(module: str) -> list[ast.Call]:
    return [node for node in ast.walk(tree_of(module)) if isinstance(node, ast.Call)]
