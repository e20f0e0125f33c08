"""Print the sizes of the package: ``python setup_scripts/figures.py`` (with ``--spine`` each module of the spine too).

``tests/test_architecture.py`` holds the ceilings.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mfm_nnunet"
SPINE = {
    "List the scans": "jobs.plan jobs.registration data.sources data.dicom data.cases data.corpus data.labelled "
    "data.loops",
    "Let them in": "images.reading images.decoder images.decode images.integrity images.headers images.nifti "
    "images.geometry",
    "Plan": "planning.fingerprint planning.planner planning.derive planning.like dataset plan "
    "plan_rules settings values models.networks models.families models.unet models.sizing models.memory",
    "Preprocess": "data.preprocess data.sizes data.resampling data.storage data.volumes",
    "Draw crops": "jobs.pretrain data.crops data.warp data.loading",
    "Pretrain": "tasks.base tasks.masks tasks.mae tasks.losses models.backbone engine.pretraining "
    "engine.engine engine.optim engine.state checkpoint",
    "Fine-tune": "jobs.train finetune.pretrained models.transfer finetune.splits finetune.fold finetune.loading "
    "finetune.augmentation finetune.settings finetune.groups finetune.trainer tasks.segmentation finetune.validation",
    "Predict": "jobs.predict prediction.cases prediction.model prediction.export prediction.journal",
}
"""The modules that one volume passes with MAE, from scan to mask, in this order, by stage.

Commands, the utilities at the root, image formats other than NIfTI and networks other than ResEnc are beside the way.
"""
IN_EVERY_COMMAND = ("build_parser", "main", "_run")
"""Names that each command defines on purpose."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


def spine_modules() -> list[str]:
    return [name for names in SPINE.values() for name in names.split()]


class Sources:
    """The modules of a package, read once: their lines, syntax trees and imports of each other."""

    def __init__(self, package: Path = PACKAGE) -> None:
        self.package = package
        self.files = {self._module(file): file for file in sorted(package.rglob("*.py"))}
        self.lines = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in self.files.items()}
        self.trees = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in self.files.items()}
        self.imports = {name: self._imports(tree) for name, tree in self.trees.items()}

    def _module(self, file: Path) -> str:
        parts = file.relative_to(self.package).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__"

    def _imports(self, tree: ast.Module) -> set[str]:
        """Return the modules of the package that a module imports; blocks for type checkers do not count."""
        found = set()
        for node in walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == self.package.name:
                for alias in node.names:
                    base = str(node.module)[len(self.package.name) + 1 :]
                    module = f"{base}.{alias.name}".lstrip(".")
                    found.add(module if module in self.files else base)
        return found & set(self.files)

    def functions(self) -> Iterator[tuple[str, Function]]:
        """Yield every function and method with its module."""
        for name, tree in self.trees.items():
            yield from ((name, node) for node in ast.walk(tree) if isinstance(node, Function))

    def names_defined_twice(self) -> dict[str, list[str]]:
        """Return the top-level functions and classes of the same name, with their modules."""
        places = defaultdict(list)
        for module, tree in self.trees.items():
            for node in tree.body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in IN_EVERY_COMMAND:
                    places[node.name].append(module)
        return {name: modules for name, modules in sorted(places.items()) if len(set(modules)) > 1}

    def with_one_importer(self) -> list[str]:
        """Return the modules that exactly one other module imports."""
        importers = {name: [m for m, targets in self.imports.items() if name in targets] for name in self.files}
        return sorted(name for name, modules in importers.items() if len(modules) == 1)

    def optimisation_steps(self) -> list[str]:
        """Return the functions in which an optimizer steps."""
        return [
            f"{module}.{function.name}"
            for module, function in self.functions()
            if any(is_step(node) for node in ast.walk(function))
        ]


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below ``node``, those in ``if TYPE_CHECKING`` left out."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield child
            yield from walk(child)


def is_step(node: ast.AST) -> bool:
    """Return whether a node calls ``optimizer.step()`` or a scaler's; a solver that takes a closure is no training."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr != "step":
        return False
    owner = ast.unparse(node.func.value)
    return owner.endswith("scaler") or (owner.endswith("optimizer") and not node.args)


def num_parameters(function: Function) -> int:
    """Return the number of parameters, ``self`` and ``cls`` not counted."""
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def num_lines(function: Function) -> int:
    return int(function.end_lineno or 0) - function.lineno + 1


def find_cycles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Return the paths along imports that come back to their start, at most one for each module they start from."""
    done: set[str] = set()
    cycles: list[list[str]] = []

    def visit(node: str, path: list[str]) -> None:
        if node in path:
            cycles.append([*path[path.index(node) :], node])
        elif node not in done:
            for target in sorted(imports.get(node, ())):
                visit(target, [*path, node])
            done.add(node)

    for node in sorted(imports):
        visit(node, [])
    return cycles


def figures(sources: Sources) -> dict[str, tuple[int, list[str]]]:
    """Return each figure with the places behind it."""
    functions = list(sources.functions())
    many = [f"{m}.{f.name} {num_parameters(f)}" for m, f in functions if num_parameters(f) > 8]
    long = [f"{m}.{f.name} {num_lines(f)}" for m, f in functions if num_lines(f) > 60]
    modules = [f"{name} {lines}" for name, lines in sources.lines.items() if lines > 420]
    twice = [f"{name}: {', '.join(places)}" for name, places in sources.names_defined_twice().items()]
    spine = [name for name in spine_modules() if name in sources.files]
    cycles = [" -> ".join(cycle) for cycle in find_cycles(sources.imports)]
    steps, single = sources.optimisation_steps(), sources.with_one_importer()
    return {
        "package lines": (sum(sources.lines.values()), []),
        "spine lines": (sum(sources.lines[name] for name in spine), []),
        "files": (len(sources.files), []),
        "files with one importer": (len(single), single),
        "modules over 420 lines": (len(modules), modules),
        "functions with over 8 parameters": (len(many), many),
        "functions over 60 lines": (len(long), long),
        "names defined twice": (len(twice), twice),
        "import cycles": (len(cycles), cycles),
        "optimisation steps": (len(steps), steps),
    }


def main() -> None:
    """Print the figures, and behind each the places that it counts."""
    sources = Sources(Path(sys.argv[1]) if sys.argv[1:] and not sys.argv[1].startswith("-") else PACKAGE)
    for title, (number, places) in figures(sources).items():
        print(f"{number:7,}  {title}" + (f": {'; '.join(places)}" if places else ""))
    if "--spine" in sys.argv:
        print("\n".join(f"{sources.lines[name]:7,}  {name}" for name in spine_modules() if name in sources.files))


if __name__ == "__main__":
    main()
