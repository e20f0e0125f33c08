"""The documentation is true: commands parse, code runs, links lead somewhere, and names and defaults are the code's.

Whatever is compared here is read from the code, so a flag, setting or key that changes fails until its page says so.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import re
import shlex
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

import mfm_nnunet
from mfm_nnunet import api, checkpoint, workspace
from mfm_nnunet import settings as mfm_settings
from mfm_nnunet.cli.common import StrictParser
from mfm_nnunet.demo import run as demo
from mfm_nnunet.errors import MFMError
from mfm_nnunet.finetune import settings as finetune_settings
from mfm_nnunet.finetune import state
from mfm_nnunet.finetune.trainer import MFMTrainer
from mfm_nnunet.jobs.plan import read_source
from mfm_nnunet.jobs.pretrain import PretrainRun
from mfm_nnunet.models.networks import build_network
from mfm_nnunet.planning import derive
from mfm_nnunet.prediction.predictor import load_model
from mfm_nnunet.tasks.base import find_task, list_tasks
from tests.builders import tiny, tiny_run
from tests.builders.tiny_plans import CONFIGURATION, tiny_backbone

ROOT = Path(__file__).parent.parent
DOCUMENTATION = ROOT / "documentation"
REFERENCE = DOCUMENTATION / "reference"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCUMENTATION.rglob("*.md"))]
COMMANDS = ("plan_and_preprocess", "pretrain", "train", "predict", "checkpoint", "demo", "study")
PLACEHOLDERS = {"XXX": "4", "FOLD": "0"}
FORM = (
    "Idea",
    "What is hidden or mixed",
    "Settings",
    "Cost",
    "When it helps, and when not",
    "Paper",
    "Command",
    "Curve",
)
"""The sections of a pretext task's page."""
SCRIPTS = sorted(file for file in (ROOT / "tests" / "benchmarks").glob("*.py") if file.stem != "__init__")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


# What a page holds


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def code_spans(page: Path) -> list[str]:
    """What stands in single backticks, outside of code blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE))


def shell_lines(page: Path) -> Iterator[list[str]]:
    """The words of every command in the bash blocks; continuations are joined, comments and variables left out."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = [word for word in shlex.split(line, comments=True) if word != "&" and not word.startswith("$")]
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words = words[1:]
            if words:
                yield words


def sections(page: Path) -> dict[str, str]:
    """The text under each heading of the second level."""
    parts = re.split(r"^## (.+)$", page.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def tables(text: str) -> Iterator[tuple[list[str], list[dict[str, str]]]]:
    """Header and rows of each table; a row maps the column's title to its cell."""
    for table in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
        header, _, *rows = (
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()
        )
        assert all(len(row) == len(header) for row in rows), table
        yield header, [dict(zip(header, row)) for row in rows]


def rows_with(text: str, *columns: str) -> list[dict[str, str]]:
    """The rows of all tables that begin with these columns."""
    return [row for header, rows in tables(text) if tuple(header[: len(columns)]) == columns for row in rows]


def names_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# Commands


def parser_of(name: str) -> StrictParser:
    return importlib.import_module(f"mfm_nnunet.cli.{name}").build_parser()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What the commands would do: their jobs do nothing here but note the arguments."""
    monkeypatch.chdir(tmp_path)
    seen: dict[str, Any] = {}

    def record(name: str, result: Any) -> Callable[..., Any]:
        def job(*arguments: Any, **keywords: Any) -> Any:
            seen.update(job=name, arguments=arguments, **keywords)
            return result

        return job

    planned = [SimpleNamespace(file="plan")]
    monkeypatch.setattr(mfm_nnunet, "plan_and_preprocess", record("plan_and_preprocess", planned))
    for name in ("pretrain", "train", "predict", "describe_checkpoint", "convert_checkpoint"):
        monkeypatch.setattr(mfm_nnunet, name, record(name, "result"))
    monkeypatch.setattr(demo, "run_demo", record("demo", SimpleNamespace(overlays=[], masks=[])))
    monkeypatch.setattr(demo, "format_result", lambda result: "")
    (tmp_path / "table.md").touch()
    for name in ("run_study", "renew_study"):
        monkeypatch.setattr(api, name, record(name, tmp_path))
    return seen


def run(words: list[str], calls: dict[str, Any]) -> None:
    """Run a command line as its command reads it, and check what only the job itself would find."""
    name = words[0].removeprefix("mfm_")
    line = " ".join(words[1:])
    for placeholder, value in PLACEHOLDERS.items():
        line = line.replace(placeholder, value)
    calls.clear()
    assert importlib.import_module(words[0].replace("mfm_", "mfm_nnunet.cli.", 1)).main(shlex.split(line)) == 0, words
    if name == "pretrain" and calls:
        is_ours = "." not in calls["pretext"]
        config = find_task(calls["pretext"]).Config() if is_ours else None
        mfm_settings.override(PretrainRun(mfm_settings.PretrainSettings(), config, 0, None), calls["settings"])
    elif name == "train" or calls.get("job") == "run_study":
        finetune_settings.resolve(mfm_settings.MFMBlock(), calls["settings"], None)
    elif name == "demo":
        mfm_settings.override(mfm_settings.MFMBlock(), calls["arguments"][2])


@every_page
def test_every_command_line_is_understood(page: Path, calls: dict[str, Any]) -> None:
    for words in shell_lines(page):
        if words[0].removeprefix("mfm_") in COMMANDS:
            run(words, calls)
        assert words[0].removeprefix("mfm_") in COMMANDS or not words[0].startswith("mfm_"), words


@every_page
def test_commands_in_the_text_have_legal_flags(page: Path) -> None:
    for span in code_spans(page):
        words = span.split()
        if words[0].startswith("mfm_") and words[0].removeprefix("mfm_") in COMMANDS:
            legal = parser_of(words[0].removeprefix("mfm_")).flags()
            assert not [w for w in words if w.startswith("-") and w not in legal], span


def test_a_misspelt_line_would_be_found(calls: dict[str, Any]) -> None:
    for line in ("mfm_train 4 2d 0 -q mfmPlans", "mfm_predict -i a -o b", "mfm_pretrain 1 2d --set pretrain.epoch=3"):
        with pytest.raises((SystemExit, MFMError)):
            run(line.split(), calls)


@every_page
def test_scripts_and_their_flags_exist(page: Path, calls: dict[str, Any]) -> None:
    for words in shell_lines(page):
        script = " ".join(words).partition("python -m ")[2].split(" ")[0].replace(".", "/") + ".py"
        files = [w for w in [*words, script] if re.fullmatch(r"(tests|setup_scripts)/[\w/]+\.(py|sh)", w)]
        for file in files:
            assert (ROOT / file).is_file(), words
            if file.endswith(".py"):
                text = (ROOT / file).read_text()
                if "tests.benchmarks.study" in text:
                    text += (ROOT / "tests" / "benchmarks" / "study.py").read_text()
                flags = set(re.findall(r'"(--[\w-]+)"', text))
                assert {w for w in words if w.startswith("--")} <= flags, words
        if files and files[0].endswith("quickstart.sh"):
            run(["mfm_demo", *words[words.index(files[0]) + 1 :]], calls)


def test_commands_page_lists_exactly_the_flags() -> None:
    found = sections(REFERENCE / "commands.md")
    assert [title for title in found if title.startswith("mfm_")] == [f"mfm_{name}" for name in COMMANDS]
    shared = rows_with(found["All commands"], "flag", "meaning", "default")
    for name in COMMANDS:
        parser = parser_of(name)
        rows = shared + rows_with(found[f"mfm_{name}"], "flag", "meaning", "default")
        by_flag: dict[str, dict[str, str]] = {}
        for row in rows:
            for flag in re.findall(r"`(-{1,2}[\w-]+)", row["flag"]):
                assert flag not in by_flag, f"{flag} of mfm_{name} is listed twice"
                by_flag[flag] = row
        assert sorted(by_flag) == parser.flags(), name
        for action in (a for a in parser._actions if a.option_strings):
            owners = {id(by_flag[flag]) for flag in action.option_strings}
            assert len(owners) == 1, f"the spellings {action.option_strings} are in different rows"
            row = by_flag[action.option_strings[0]]
            if action.choices:
                assert r"\|".join(action.choices) in row["flag"], row
            if action.required:
                assert row["default"] == "required", row
            if action.default not in (None, False, [], "==SUPPRESS=="):
                default = " ".join(action.default) if isinstance(action.default, list) else str(action.default)
                assert f"`{default}`" in row["default"], row


# Settings


def default_of(cell: str, name: str, settings: Any) -> Any:
    """``settings`` with ``name`` set to what a table says."""
    return mfm_settings.override(settings, [f"{name}={cell}"])


def type_name(hint: Any) -> str:
    """A field's type as the tables call it."""
    options = [option for option in get_args(hint) if option is not type(None)]
    if type(None) in get_args(hint):
        return f"{type_name(options[0])} or none"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(type_name(option) for option in options)
    if get_origin(hint) is Literal:
        return "word"
    if get_origin(hint) is dict:
        return "table"
    if get_origin(hint) is tuple:
        word = "word" if options[0] is str else options[0].__name__
        return f"{word}s" if ... in options else f"{len(options)} {options[0].__name__}s"
    return hint.__name__


def hint_of(name: str, settings: Any) -> Any:
    *path, last = name.split(".")
    for part in path:
        settings = getattr(settings, part)
    return get_type_hints(type(settings))[last]


def test_settings_page_lists_exactly_the_settings_of_a_plan() -> None:
    block = mfm_settings.MFMBlock()
    rows = rows_with((REFERENCE / "settings.md").read_text(), "name", "type", "default")
    names = [name for row in rows for name in names_in(row["name"])]
    assert sorted(names) == sorted(mfm_settings.setting_names(block))
    for row in rows:
        name, hint = names_in(row["name"])[0], hint_of(names_in(row["name"])[0], block)
        assert default_of(row["default"], name, block) == block, row
        assert row["type"] == type_name(hint), row
        if get_origin(hint) is Literal and "legal values" in row:
            assert row["legal values"] == ", ".join(get_args(hint)), row


def test_settings_page_says_which_command_takes_what() -> None:
    block, rows = mfm_settings.MFMBlock(), rows_with((REFERENCE / "settings.md").read_text(), "name", "type", "default")
    for row in rows:
        name = names_in(row["name"])[0]
        assignment = f"{name}={row['default']}"
        if "legal values" not in row or name.startswith("pretrain."):
            with pytest.raises(MFMError):
                finetune_settings.resolve(block, [assignment], None)
        else:
            finetune_settings.resolve(block, [assignment], None)


def test_settings_page_lists_the_settings_of_every_task() -> None:
    rows = rows_with((REFERENCE / "settings.md").read_text(), "task", "name", "type", "default")
    for info in list_tasks():
        config = find_task(info.name).Config()
        mine = {
            names_in(row["name"])[0].removeprefix("pretext."): row for row in rows if f"`{info.name}`" == row["task"]
        }
        assert list(mine) == mfm_settings.setting_names(config)
        for name, row in mine.items():
            assert default_of(row["default"], name, config) == config, row
            assert row["type"] == type_name(hint_of(name, config)), row
    assert {names_in(row["task"])[0] for row in rows} == {info.name for info in list_tasks()}


def test_what_the_planner_writes() -> None:
    rows = rows_with((REFERENCE / "settings.md").read_text(), "setting")
    listed = set()
    for family, is_cpu in ((f, c) for f in ("resenc", "primus") for c in (False, True)):
        column = {"resenc": "ResEnc", "primus": "Primus"}[family] + (", CPU preset" if is_cpu else ", GPU")
        planned = mfm_settings.MFMBlock(*derive.settings_for(family, is_cpu, 2))
        for row in rows:
            for name in names_in(row["setting"]):
                assert default_of(row[column], name, planned) == planned, (column, row)
                listed.add(name)
        # What no row names is the default everywhere.
        for name in set(mfm_settings.setting_names(planned)) - listed - {"network"}:
            *path, last = name.split(".")
            values = [getattr(getattr(b, path[0]) if path else b, last) for b in (planned, mfm_settings.MFMBlock())]
            assert values[0] == values[1], name


def test_the_block_in_the_settings_page_is_a_plans() -> None:
    (text,) = blocks(REFERENCE / "settings.md", "json")
    assert json.loads(text) == mfm_settings.to_dict(mfm_settings.MFMBlock())
    assert mfm_settings.MFMBlock(*derive.settings_for("resenc", False, 2)) == mfm_settings.MFMBlock()


def _task_of(config: object) -> str:
    return type(config).__module__.rpartition(".")[2]


@every_page
def test_settings_in_the_text_exist(page: Path) -> None:
    known = set(mfm_settings.setting_names(mfm_settings.MFMBlock()))
    tasks = [find_task(info.name).Config() for info in list_tasks()]
    known |= {f"pretext.{name}" for config in tasks for name in mfm_settings.setting_names(config)}
    for name, value in re.findall(
        r"\b((?:pretrain|finetune|pretext)\.(?!md\b)[a-z_]+)(?:=([\w.,+-]*\w))?", page.read_text()
    ):
        is_file = (ROOT / "mfm_nnunet" / f"{name.replace('.', '/')}.py").is_file()
        assert is_file or name in known, f"{name} is no setting"
        if value and name.startswith("pretext."):
            of_page = [config for config in tasks if f"pretext_{_task_of(config)}" == page.stem] or tasks
            (config, *_) = (config for config in of_page if name[8:] in mfm_settings.setting_names(config))
            mfm_settings.override(config, [f"{name[8:]}={value}"])
        elif value:
            mfm_settings.override(mfm_settings.MFMBlock(), [f"{name}={value}"])


# Pretext tasks


@pytest.mark.parametrize("task", [info.name for info in list_tasks()])
def test_each_task_has_a_page_of_the_fixed_form(task: str) -> None:
    page = REFERENCE / f"pretext_{task}.md"
    found = sections(page)
    assert tuple(found) == FORM
    task_class = find_task(task)
    config = task_class.Config()
    rows = rows_with(found["Settings"], "name", "default", "legal values")
    assert [names_in(row["name"])[0] for row in rows] == [
        f"pretext.{name}" for name in mfm_settings.setting_names(config)
    ]
    for row in rows:
        name = names_in(row["name"])[0].removeprefix("pretext.")
        assert default_of(row["default"], name, config) == config, row
        hint = hint_of(name, config)
        if get_origin(hint) is Literal:
            assert row["legal values"] == ", ".join(get_args(hint)), row
    assert f"--pretext {task} " in found["Command"]
    for citation in (text for entry in task_class.citations for text in entry["apa_citations"]):
        surname, year = citation.partition(",")[0], re.search(r"\((\d{4})\)", citation)
        assert surname in found["Paper"], citation
        assert year is not None, citation
        assert year[1] in found["Paper"], citation
    assert "benchmarks/README.md" in found["Curve"]
    picture = f"pictures/pretext_{task}.png"
    assert f"]({picture})" in found["What is hidden or mixed"]
    assert 2_000 < (REFERENCE / picture).stat().st_size <= 150_000


def test_the_page_of_all_tasks_says_what_the_list_says() -> None:
    text = (REFERENCE / "pretext_tasks.md").read_text()
    rows = {row["task"].partition("]")[0][1:]: row for row in rows_with(text, "task", "ResEnc", "Primus")}
    assert list(rows) == [task.name for task in list_tasks()]
    for task in list_tasks():
        row = rows[task.name]
        assert f"(pretext_{task.name}.md)" in row["task"]
        assert (row["hidden or mixed"], row["published"], row["paper"]) == (task.hides, task.recipe, task.paper)
        assert [row["ResEnc"], row["Primus"]] == [
            "x" if family in task.backbones else "-" for family in ("resenc", "primus")
        ]
    for name in (name for part in re.findall(r"^\* (.*?): (.*?);?$", text, re.MULTILINE) for name in names_in(part[1])):
        line = next(line for line in text.splitlines() if line.startswith("* ") and f"`{name}`" in line)
        assert find_task(name).trains_decoder == line.startswith("* encoder and decoder"), name


# Checkpoints


@pytest.fixture(scope="module", params=["resenc", "primus"])
def pretrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A real checkpoint of ``mfm_pretrain``, of one step."""
    here = tiny_run.prepare(tmp_path_factory.mktemp(request.param), request.param, num_cases=3)
    short = ("pretrain.epochs=1", "pretrain.iterations_per_epoch=1", "num_workers=0")
    return request.param, tiny_run.run(here, "mae", short)


def keys_in(title: str) -> tuple[list[str], list[str]]:
    """Keys of the file and of its ``mfm`` table, as a section of the page names them."""
    text = sections(REFERENCE / "checkpoint.md")[title]
    listed = [rows_with(text, column, "content") for column in ("key", "`mfm` key")]
    return tuple([name for row in rows for name in names_in(next(iter(row.values())))] for rows in listed)  # type: ignore[return-value]


def test_keys_of_a_pretrained_checkpoint(pretrained: tuple[str, Path]) -> None:
    content = checkpoint.load(pretrained[1])
    assert keys_in("Pretrained") == (list(content), list(content["mfm"]))
    assert set(content["mfm"]["corpus"]) == {"num_cases", "num_subjects", "hash"}
    resume = checkpoint.load(pretrained[1].with_name("resume.pth"))
    assert keys_in("resume.pth")[0] == list(resume)


def test_a_checkpoint_names_nobody(pretrained: tuple[str, Path]) -> None:
    def texts(value: Any) -> Iterator[str]:
        for item in value.items() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
            yield from texts(item)
        if isinstance(value, str):
            yield value

    for file in (pretrained[1], pretrained[1].with_name("resume.pth")):
        assert not [text for text in texts(checkpoint.load(file)) if re.search(r"case\d|/|\\", text)], file


def test_what_loads_where(pretrained: tuple[str, Path]) -> None:
    family, file = pretrained
    rows = rows_with(sections(REFERENCE / "checkpoint.md")["What loads where"], "file")
    (row,) = (row for row in rows if row["file"].lower() == f"pretrained, {family}")
    mfm = checkpoint.load(file)["mfm"]
    network = build_network(mfm["plans"], mfm["configuration"], 1, 3, deep_supervision=family == "resenc")
    try:
        load_pretrained_weights(network, str(file))
        loads_in_stock = True
    except AssertionError:
        loads_in_stock = False
    assert row["stock `nnUNetv2_train -pretrained_weights`"].startswith("yes" if loads_in_stock else "no")
    assert row["`--like`"] == "yes"
    assert read_source(file).entry["pretext"] == "mae"
    assert row["`mfm_predict`"].startswith("no")
    model = file.parent / "model"
    (model / "fold_0").mkdir(parents=True)
    file_there = model / "fold_0" / "checkpoint_final.pth"
    file_there.write_bytes(file.read_bytes())
    (model / "plans.json").write_text(json.dumps(mfm["plans"]))
    dataset = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}
    (model / "dataset.json").write_text(json.dumps(dataset))
    with pytest.raises(MFMError, match="E_MODEL_MISMATCH"):
        load_model(model, device="cpu")


def test_keys_of_a_fine_tuned_checkpoint(tmp_path: Path) -> None:
    tiny.make(tmp_path)
    with workspace.use(tmp_path) as here:
        plans = json.loads(here.plans_file(tiny.NAME, "mfmPlans").read_text()) | {"continue_training": False}
        dataset_json = json.loads((here.preprocessed / tiny.NAME / "dataset.json").read_text())
        trainer = MFMTrainer(plans, CONFIGURATION, 0, dataset_json, torch.device("cpu"))
        trainer.initialize()
        content = state.content_of(trainer)
    keys, of_mfm = keys_in("Fine-tuned")
    assert sorted(keys) == sorted(content)
    assert of_mfm == list(content["mfm"])
    (row,) = (
        r for r in rows_with(sections(REFERENCE / "checkpoint.md")["Fine-tuned"], "key") if "init_args" in r["key"]
    )
    assert set(names_in(row["content"])) == set(content["init_args"])


# Code in Python


@every_page
def test_python_blocks_compile_and_call_the_api_as_it_is(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                if isinstance(owner, ast.Name) and owner.id == "mfm":
                    keywords = {str(keyword.arg): None for keyword in node.keywords}
                    inspect.signature(getattr(mfm_nnunet, node.func.attr)).bind(*node.args, **keywords)


@pytest.mark.parametrize("family", ["resenc", "primus"])
def test_the_task_of_the_how_to_works(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = blocks(DOCUMENTATION / "how_to" / "add_a_pretext_task.md", "python")
    package = tmp_path / f"my_package_{family}"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "denoising.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    task_class = find_task(f"{package.name}.denoising")
    assert find_task(f"{package.name}.denoising.Denoising") is task_class
    patch, config = (16, 16, 16), mfm_settings.override(task_class.Config(), ["noise=0.25"])
    backbone = tiny_backbone(family, patch, 2, task_class.num_outputs(config, 2), restoring=task_class.restoring)
    task = task_class(task_class.resolve(config, backbone.geometry()), backbone)
    items = []
    for index in range(2):
        rng = np.random.default_rng(index)
        transform = task_class.transform(task.config, patch)
        crops = [rng.normal(size=(2, *request.size)).astype(np.float32) for request in transform.requests(rng)]
        items.append(transform(crops, rng))
    batch = {key: torch.from_numpy(np.stack([item[key] for item in items])) for key in items[0]}
    output = task.train()(batch)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    trained = [weight for weight in task.parameters() if weight.requires_grad]
    assert all(weight.grad is not None for weight in trained)
    assert set(task.eval()(batch).pictures or {}) == {"noisy", "restored"}
    assert f"{package.name}.denoising" in sys.modules


# Links, names and form


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), target
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{name_of(page)}: {target} does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{name_of(page)}: {target} has no such heading"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, queue = set(), [ROOT / "README.md"]
    while queue:
        page = queue.pop()
        if page in reached or not page.is_file():
            continue
        reached.add(page)
        targets = [t.partition("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if ":" not in t]
        for target in (page.parent / t for t in targets if t):
            queue += [p.resolve() for p in (target.glob("*.md") if target.is_dir() else [target]) if p.suffix == ".md"]
    assert not [name_of(page) for page in PAGES if page.parent != ROOT and page not in reached]


@every_page
def test_files_and_modules_in_the_text_exist(page: Path) -> None:
    packages = {entry.name for entry in (ROOT / "mfm_nnunet").iterdir() if entry.is_dir()}
    for span in code_spans(page):
        if re.fullmatch(r"(tests|setup_scripts|documentation|mfm_nnunet)/[\w/.]*", span):
            assert (ROOT / span).exists(), span
        module = span.partition(".")[0]
        if (
            re.fullmatch(r"[a-z]+\.(?!json|pth|png)[a-z_]+(\.[A-Z]\w+)?", span)
            and module in packages
            and page.parent != REFERENCE
        ):
            file = ROOT / "mfm_nnunet" / module / f"{span.split('.')[1]}.py"
            is_setting = module == "finetune" and span.split(".")[1] in mfm_settings.setting_names(
                mfm_settings.FinetuneSettings()
            )
            assert is_setting or file.is_file(), span


def test_benchmarks_page_names_every_script_and_results_have_a_date() -> None:
    page = DOCUMENTATION / "benchmarks" / "README.md"
    text = page.read_text()
    for script in SCRIPTS:
        assert f"tests/benchmarks/{script.name}" in text or f"tests.benchmarks.{script.stem}" in text, script.name
    for file in page.parent.rglob("*.md"):
        assert file == page or re.fullmatch(r"\w[\w-]*_[\w-]+_\d{4}-\d\d-\d\d", file.stem), file.name


@every_page
def test_form(page: Path) -> None:
    lines = page.read_text().splitlines()
    assert lines[0].startswith("# "), "a page begins with its title"
    assert not [number for number, line in enumerate(lines, start=1) if len(line) > 160]
    assert not [number for number, line in enumerate(lines, start=1) if line != line.rstrip()]
    limit = 150 if page == ROOT / "README.md" else 60 if page.parent.name == "decisions" else 10**6
    assert len(lines) <= limit
    assert page.read_text().count("```") % 2 == 0


def test_decisions_are_numbered() -> None:
    files = sorted((DOCUMENTATION / "decisions").glob("*.md"))
    assert [int(file.name[:4]) for file in files] == list(range(1, len(files) + 1))
    for number, file in enumerate(files, start=1):
        assert file.read_text().startswith(f"# {number}. ")


def test_nothing_is_left_to_fill_in() -> None:
    for page in PAGES:
        assert not re.findall(r"@[A-Z]+@|TODO|FIXME|lorem ipsum", page.read_text()), name_of(page)


@every_page
def test_no_word_about_how_it_was_made(page: Path) -> None:
    words = r"sessions?|sandbox|chatbot|language model|assistant|subagents?|prompt(s|ed)?|founder"
    assert not re.findall(rf"\b({words})\b", page.read_text(), re.IGNORECASE)


def test_no_path_of_one_computer_anywhere() -> None:
    # Written in pieces, or this file would be found.
    forbidden = [f"/{root}/" for root in ("work", "root")] + ["/tmp/" + "venv", "/home/" + "user"]
    folders = ("mfm_nnunet", "tests", "documentation", "setup_scripts", ".ci")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*") if file.is_file()]
    files += [file for file in ROOT.iterdir() if file.suffix in (".md", ".toml")]
    for file in files:
        if file.suffix in (".md", ".py", ".sh", ".toml", ".json", ".typed", ""):
            text = file.read_text(encoding="utf-8")
            assert not [path for path in forbidden if path in text], file


@pytest.mark.parametrize("name", ["plan_and_preprocess", "pretrain", "train", "predict"])
def test_the_api_is_documented(name: str) -> None:
    text = inspect.getdoc(getattr(mfm_nnunet, name)) or ""
    assert all(f"\n{parameter}: " in text for parameter in inspect.signature(getattr(mfm_nnunet, name)).parameters)


def test_settings_dataclasses_are_what_the_page_is_about() -> None:
    """A further dataclass in the block would need a section of its own."""
    nested = [
        f.name
        for f in dataclasses.fields(mfm_settings.MFMBlock)
        if dataclasses.is_dataclass(getattr(mfm_settings.MFMBlock(), f.name))
    ]
    assert nested == ["pretrain", "finetune"]
