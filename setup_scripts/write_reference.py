"""Write what the reference pages say about the code: flags, settings, recipes, names of nnU-Net, the tree of files.

    python setup_scripts/write_reference.py

The script replaces tables, lists and blocks in the pages and keeps everything else. In a table it keeps the words that
a person wrote, e.g. the meaning of a flag; a new row begins with the help text or the docstring from the code.
``tests/test_documentation.py`` compares.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import textwrap
from argparse import Action
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import mfm_nnunet  # noqa: E402
from mfm_nnunet.jobs.info import IN_THE_PLAN_ONLY, describe_setting, setting_text  # noqa: E402
from mfm_nnunet.models.families import GROUP  # noqa: E402
from mfm_nnunet.planning.derive import settings_for  # noqa: E402
from mfm_nnunet.settings import MFMBlock, ProbeSettings, setting_names, to_dict  # noqa: E402
from mfm_nnunet.tasks.base import find_task  # noqa: E402
from mfm_nnunet.tasks.registry import list_tasks  # noqa: E402
from setup_scripts.figures import SPINE, Sources, walk  # noqa: E402
from tests.builders.interface import COMMANDS, PACKAGE, parser_of  # noqa: E402

DOCUMENTATION = ROOT / "documentation"
REFERENCE = DOCUMENTATION / "reference"
FAMILY = ("nnunetv2", "dynamic_network_architectures", "acvl_utils", "batchgenerators", "batchgeneratorsv2")
"""nnU-Net and the packages of its authors that come with it."""
WIDTH = 150
Row = dict[str, str]


def put_table(text: str, title: str, rows: list[Row], key: Callable[[Row], set[str]]) -> str:
    """Return ``text`` with new rows in the first table below a heading that has the first column of ``rows``.

    Columns that ``rows`` lack keep what the page says, else they begin as the row's ``else`` says. Rows with a common
    element of ``key`` are the same row.
    """
    column = next(iter(rows[0]))
    for table in re.finditer(r"(?:^\|.*\|\n)+", text[text.index(f"\n{title}\n") :], re.MULTILINE):
        header, _, *lines = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table[0].splitlines()]
        if header[0] == column:
            break
    else:
        raise SystemExit(f"no table with the column {column} under {title}")
    old, new = [dict(zip(header, line)) for line in lines], [header, ["---"] * len(header)]
    for row in rows:
        before = next((other for other in old if key(other) & key(row)), {})
        cells = {name: before.get(name, row.get("else", "")) for name in header}
        cells |= {name: value for name, value in row.items() if value and not _is_explained(name, value, cells)}
        new.append([cells[name] for name in header])
    content = "".join("|" + "|".join(f" {c} " if c and c != "---" else c or " " for c in line) + "|\n" for line in new)
    return text.replace(table[0], content, 1) if text.count(table[0]) == 1 else _refuse(title)


def _is_explained(name: str, value: str, cells: Row) -> bool:
    """Return whether the page has the same default or legal values with words behind them."""
    page = cells.get(name, "")
    return name in ("default", "legal values") and page.startswith(value) and page[len(value) : len(value) + 1] in ":;,"


def _refuse(title: str) -> str:
    raise SystemExit(f"the table under {title} is there twice")


def put_block(text: str, title: str, language: str, content: str) -> str:
    """Return ``text`` with the first code block of a language below a heading replaced."""
    head, heading, rest = text.partition(f"\n{title}\n")
    block = f"```{language}\n{content.rstrip()}\n```\n"
    return head + heading + re.sub(rf"```{language}\n.*?```\n", lambda _: block, rest, count=1, flags=re.DOTALL)


def names_in(cell: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", cell))


# Commands


def commands_page(text: str) -> str:
    """Write the flags of each command; those that all have stand in a table of their own, by hand."""
    everywhere = set.intersection(*(set(parser_of(name).flags()) for name in COMMANDS))
    for name in COMMANDS:
        actions = [a for a in parser_of(name)._actions if a.option_strings and not everywhere & set(a.option_strings)]
        text = put_table(text, f"## mfm_{name}", [_flag(action) for action in actions], flags_in)
    return text


def flags_in(row: Row) -> set[str]:
    return set(re.findall(r"`(-{1,2}[\w-]+)", row["flag"]))


def _flag(action: Action) -> Row:
    value = "" if action.nargs == 0 else str(action.metavar or action.dest.upper())
    if action.choices:
        installed = {entry.name for entry in entry_points(group=GROUP)}  # networks of other packages
        value = "|".join(name for name in action.choices if name not in installed)
    if action.nargs == "+":
        value = f"{value} [{value} ...]"
    elif type(action).__name__ == "_AppendAction":
        value += " [...]"
    *others, last = action.option_strings
    spelling = ", ".join(f"`{flag}`" for flag in (*others, f"{last} {value}".strip())).replace("|", r"\|")
    row = {"flag": spelling, "else": re.sub(r" \(default: [^)]*\)", "", action.help or "")}
    if action.required:
        row["default"] = "required"
    elif action.default not in (None, False, [], "==SUPPRESS=="):
        default = " ".join(action.default) if isinstance(action.default, list) else action.default
        row["default"] = f"`{default}`"
    return row


# Settings


def settings_page(text: str) -> str:
    """Write the settings of a plan, of the probe and of the tasks, what the planner writes, recipes and the block."""
    block = MFMBlock()
    names = [name for name in setting_names(block) if name not in IN_THE_PLAN_ONLY]
    in_part = lambda part: [_setting(name, block) for name in names if name.rpartition(".")[0] == part]  # noqa: E731
    by_name: Callable[[Row], set[str]] = lambda row: names_in(row.get("name", row.get("probe", "")))  # noqa: E731
    text = put_table(text, "## Both", in_part(""), by_name)
    text = put_table(text, "## Pretraining", in_part("pretrain"), by_name)
    text = put_table(text, "## Fine-tuning", in_part("finetune"), by_name)
    text = put_table(text, "## Unlabelled images", in_part("semi"), by_name)
    probe = [_setting(name, ProbeSettings(), "probe.", "probe") for name in setting_names(ProbeSettings())]
    text = put_table(text, "## The probe", probe, by_name)
    tasks = [
        {"task": f"`{info.name}`"} | _setting(name, find_task(info.name).Config(), "pretext.")
        for info in list_tasks()
        for name in setting_names(find_task(info.name).Config())
    ]
    text = put_table(text, "## Pretext tasks", tasks, lambda row: {f"{row['task']} {row['name']}"})
    only = [_setting(name, block) for name in IN_THE_PLAN_ONLY]
    text = put_table(text, "## In the plan only", only, by_name)
    recipes = {file.stem: json.loads(file.read_text()) for file in sorted((PACKAGE / "recipes").glob("*.json"))}
    rows = [
        {"recipe": f"`{name}`", "command": f"`{content['command'].split()[0]}`", "else": content["about"]}
        for name, content in recipes.items()
    ]
    text = put_table(text, "## Recipes", rows, lambda row: names_in(row["recipe"]))
    text = put_table(text, "## What the planner writes", list(_planned()), lambda row: names_in(row["setting"]))
    return put_block(text, "## The block", "json", _wrapped_json(to_dict(block)))


def task_page(name: str) -> Callable[[str], str]:
    """Return what writes the settings of a pretext task into its page."""

    def write(text: str) -> str:
        config = find_task(name).Config()
        rows = [_setting(setting, config, "pretext.") for setting in setting_names(config)]
        return put_table(text, "## Settings", rows, lambda row: names_in(row["name"]))

    return write


def _setting(name: str, settings: Any, prefix: str = "", column: str = "name") -> Row:
    row = describe_setting(name, settings, prefix)
    return {column: f"`{row.pop('name')}`", "else": row.pop("meaning"), **row}


def _planned() -> Iterator[Row]:
    """Yield the settings that some planned block has otherwise than the defaults, equal ones in one row."""
    columns = {
        f"{word}, {preset}": MFMBlock(*settings_for(family, preset != "GPU", 2))
        for preset in ("GPU", "CPU preset")
        for family, word in (("resenc", "ResEnc"), ("primus", "Primus"))
    }
    grouped: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in setting_names(MFMBlock()):
        values = [_value(name, block) for block in (MFMBlock(), *columns.values())]
        if len(set(values)) > 1:
            grouped[(name.rpartition(".")[2], *values[1:])].append(name)
    for (_, *values), names in grouped.items():
        yield {"setting": ", ".join(f"`{name}`" for name in names)} | dict(zip(columns, values))


def _value(name: str, settings: Any) -> str:
    for part in name.split("."):
        settings = getattr(settings, part)
    return setting_text(settings)


def _wrapped_json(content: dict[str, Any]) -> str:
    parts = [f"{json.dumps(key)}: {json.dumps(value)}".replace(": ", ":~") for key, value in content.items()]
    wrap = textwrap.TextWrapper(WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    tables = [wrap.fill(part + ",") for part in parts if part.endswith("}")]
    return (
        "{\n"
        + "\n".join([*tables, "  " + ", ".join(p for p in parts if not p.endswith("}"))]).replace(":~", ": ")
        + "\n}"
    )


# Names of nnU-Net, and the tree


def imports_of_nnunet(sources: Sources) -> dict[str, list[str]]:
    """Return the names that the package imports from nnU-Net's family, inside functions too, and where."""
    found = defaultdict(list)
    for module, tree in sources.trees.items():
        names = set()
        for node in walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
        for name in names:
            if name.partition(".")[0] in FAMILY:
                found[name].append(module)
    return {name: sorted(found[name]) for name in sorted(found)}


def nnunet_page(text: str) -> str:
    """Write the list of imported names; what each is for stays as the page says."""
    head, title, rest = text.partition("\n## Names that we import\n\n")
    listed, separator, tail = rest.partition("\n\n## ")
    kept = {
        match[1]: " ".join(match[2].split())
        for match in re.finditer(r"^\* `([^`]+)` in [^:]*:\s(.*?)(?=^\* |\Z)", listed, re.MULTILINE | re.DOTALL)
    }
    wrap = textwrap.TextWrapper(WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    lines = [
        wrap.fill(f"* `{name}` in {', '.join(f'`{m}`' for m in modules)}: {kept.get(name, 'say what for.')}")
        for name, modules in imports_of_nnunet(Sources()).items()
    ]
    return head + title + "\n".join(lines) + separator + tail


def design_page(text: str) -> str:
    """Write the tree of all files with the first sentence of each, and the spine."""
    sources = Sources()
    lines: dict[str, list[str]] = defaultdict(list)
    for name, file in sources.files.items():
        folder, _, path = file.relative_to(PACKAGE).as_posix().rpartition("/")
        folder, _, inner = folder.partition("/")
        phrase = (ast.get_docstring(sources.trees[name]) or "").partition("\n")[0].rstrip(".")
        if path == "__init__.py" and folder:
            lines[folder].insert(0, f"{folder}/".ljust(28) + phrase)
        else:
            lines[folder].append(f"{'  ' if folder else ''}{inner}{'/' if inner else ''}{path}".ljust(28) + phrase)
    tree = [line[:WIDTH].rstrip() for folder in sorted(lines) for line in lines[folder]]
    text = put_block(text, "## The tree", "text", "\n".join(tree))
    stages = []
    for stage, names in SPINE.items():
        chain = " -> ".join(name for name in names.split() if name in sources.files)
        wrap = textwrap.TextWrapper(WIDTH, initial_indent=f"{stage}:".ljust(18), subsequent_indent=" " * 18)
        stages.append(wrap.fill(chain))
    return put_block(text, "## The spine", "text", "\n".join(stages))


# The Python functions


def python_page(text: str) -> str:
    """Write a section for each public name: its docstring, and its signature or a list of its parameters."""
    head, _, _ = text.partition("\n## ")
    wrap = textwrap.TextWrapper(WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    sections = []
    for name in (name for name in mfm_nnunet.__all__ if not name.startswith("_")):
        thing = getattr(mfm_nnunet, name)
        words, parameters = inspect.getdoc(thing) or "", []
        bare = inspect.Signature()
        if inspect.isfunction(thing):
            signature = inspect.signature(thing)
            bare = inspect.Signature([p.replace(annotation=p.empty) for p in signature.parameters.values()])
            parameters = list(signature.parameters.values())
        items = []
        for parameter in parameters:
            if found := re.search(rf"^{parameter.name}: (.*)$", words, re.MULTILINE):
                words = words.replace(found[0], "")
                default = "required" if parameter.default is parameter.empty else f"`{parameter.default!r}`"
                items.append(wrap.fill(f"* `{parameter.name}`, {default}: {found[1]}"))
        words = re.sub(r":(?:func|class|mod):`(?:mfm_nnunet\.)?([\w.]+)`", r"`\1`", words).replace("``", "`").strip()
        parts = [textwrap.fill(" ".join(part.split()), WIDTH) for part in words.split("\n\n")]
        parts += ["\n".join(items)] if items else [f"`{name}{bare}`"] if parameters else []
        sections.append(f"## {name}\n\n" + "\n\n".join(parts) + "\n")
    return head + "\n" + "\n".join(sections)


PAGES: dict[Path, Callable[[str], str]] = {
    REFERENCE / "python.md": python_page,
    REFERENCE / "commands.md": commands_page,
    REFERENCE / "settings.md": settings_page,
    REFERENCE / "nnunet_surface.md": nnunet_page,
    DOCUMENTATION / "all_of_mfm.md": design_page,
    **{REFERENCE / f"pretext_{info.name}.md": task_page(info.name) for info in list_tasks()},
}


def main() -> None:
    """Write the pages, and print those that changed."""
    for file, write in PAGES.items():
        before = file.read_text(encoding="utf-8")
        after = write(before)
        if after != before:
            file.write_text(after, encoding="utf-8")
            print(f"wrote {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
