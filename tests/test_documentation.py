"""The documentation is true: pages are as the code says, commands parse, code runs, links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

import mfm_nnunet
from mfm_nnunet import checkpoint, workspace
from mfm_nnunet.cli.common import options_of
from mfm_nnunet.errors import MFMError
from mfm_nnunet.finetune.trainer import MFMTrainer
from mfm_nnunet.jobs.plan import read_source
from mfm_nnunet.models.families import BUILT_IN, family_named
from mfm_nnunet.models.networks import build_network
from mfm_nnunet.prediction.model import load_model
from mfm_nnunet.settings import MFMBlock, ProbeSettings, override, setting_names
from mfm_nnunet.tasks.base import find_task
from mfm_nnunet.tasks.registry import list_tasks
from setup_scripts.write_reference import PAGES, REFERENCE, flags_in, names_in
from tests.builders import tiny, tiny_run
from tests.builders.interface import COMMANDS, error_codes, parser_of
from tests.builders.tiny_plans import CONFIGURATION, tiny_backbone

ROOT = Path(__file__).parent.parent
DOCUMENTATION = ROOT / "documentation"
ALL_PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCUMENTATION.rglob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in ALL_PAGES}
HISTORY = {ROOT / "CHANGELOG.md", DOCUMENTATION / "log.md", *(DOCUMENTATION / "decisions").glob("*.md")}
"""Pages that may name what is gone."""
PLACEHOLDERS = {"XXX": "4", "FOLD": "0"}
TASK_PAGE = (
    *("Idea", "What is hidden or mixed", "Settings", "Cost", "When it helps, and when not", "Paper", "Command"),
    "Curve",
)
"""The sections of a pretext task's page."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXTS[page], re.DOTALL | re.MULTILINE)


def code_spans(page: Path) -> list[str]:
    """Return the words in single backticks outside of code blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", TEXTS[page], flags=re.DOTALL | re.MULTILINE))


def shell_lines(page: Path) -> Iterator[list[str]]:
    """Yield the words of each command in the bash blocks, without comments and variables."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = [word for word in shlex.split(line, comments=True) if word != "&" and not word.startswith("$")]
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words = words[1:]
            if words:
                yield words


def sections(page: Path) -> dict[str, str]:
    parts = re.split(r"^## (.+)$", TEXTS[page], flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def rows_with(text: str, *columns: str) -> list[dict[str, str]]:
    """Return the rows of all tables that begin with these columns."""
    found = []
    for table in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
        header, _, *rows = ([c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines())
        assert all(len(row) == len(header) for row in rows), table
        found += [dict(zip(header, row)) for row in rows if tuple(header[: len(columns)]) == columns]
    return found


# Pages that are written from the code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_is_what_the_code_says(page: Path) -> None:
    assert PAGES[page](TEXTS[page]) == TEXTS[page], "run: python setup_scripts/write_reference.py"


def test_the_flags_of_all_commands_have_their_own_table() -> None:
    rows = rows_with(sections(REFERENCE / "commands.md")["All commands"], "flag", "meaning", "default")
    everywhere = set.intersection(*(set(parser_of(name).flags()) for name in COMMANDS))
    assert set.union(*map(flags_in, rows)) == everywhere


def test_error_codes_are_those_raised() -> None:
    rows = rows_with(TEXTS[REFERENCE / "errors.md"], "code", "what happened", "typical cause", "what to do")
    assert [row["code"].strip("`") for row in rows] == error_codes()
    assert all(all(row.values()) for row in rows)
    assert set(error_codes()) <= set(error_codes(ROOT / "tests")), "some test reaches each code"


# Commands and settings in the text


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a command check its line and its request; its job does nothing. Then check the settings."""
    name, line = words[0].removeprefix("mfm_"), " ".join(words[1:])
    for placeholder, value in PLACEHOLDERS.items():
        line = line.replace(placeholder, value)
    module, seen = importlib.import_module(f"mfm_nnunet.cli.{name}"), []
    monkeypatch.setattr(module, "run_command", lambda *arguments: seen.extend(arguments) or 0)
    assert module.main(shlex.split(line)) == 0, words
    request = next((item for name, item in vars(module).items() if name.endswith("Request")), None)
    if request and len(seen) > 1 and seen[0].__name__ == "_run":
        options_of(request, seen[1])
    for assignment in next((vars(item).get("settings") or () for item in seen if hasattr(item, "workspace")), ()):
        check_setting(*assignment.partition("=")[::2])


def check_setting(name: str, value: str) -> None:
    """Raise an error unless there is a setting of this name; a value must be legal too."""
    part, _, last = name.rpartition(".")
    owners: list[Any] = [MFMBlock()]
    if part in ("pretext", "probe"):
        owners = [ProbeSettings()] if part == "probe" else [find_task(info.name).Config() for info in list_tasks()]
        owners, name = [owner for owner in owners if last in setting_names(owner)], last
    assert owners, f"{name} is no setting"
    assert name in setting_names(owners[0]), f"{name} is no setting"
    if value:
        override(owners[0], [f"{name}={value}"])


def test_every_command_line_is_understood(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for page in ALL_PAGES:
        for words in shell_lines(page):
            name = words[0].removeprefix("mfm_")
            if name in COMMANDS:
                run(words, monkeypatch)
            assert name in COMMANDS or not words[0].startswith("mfm_"), words
            if "setup_scripts/quickstart.sh" in words:
                run(["mfm_demo", *words[words.index("setup_scripts/quickstart.sh") + 1 :]], monkeypatch)
    for line in ("mfm_train 4 2d 0 -q mfmPlans", "mfm_predict -i a -o b", "mfm_pretrain 1 2d --set pretrain.epoch=3"):
        with pytest.raises((SystemExit, MFMError, AssertionError)):
            run(line.split(), monkeypatch)


def test_flags_and_settings_in_the_text_exist() -> None:
    setting = re.compile(r"\b((?:pretrain|finetune|pretext)\.(?!md\b|py\b)[a-z_]+)(?:=([\w.,+-]*\w))?")
    for page in ALL_PAGES:
        for words in (span.split() for span in code_spans(page)):
            if words[0].startswith("mfm_") and words[0].removeprefix("mfm_") in COMMANDS:
                legal = parser_of(words[0].removeprefix("mfm_")).flags()
                assert not [word for word in words if word.startswith("-") and word not in legal], words
        for name, value in setting.findall(TEXTS[page] if page not in HISTORY else ""):
            if not (ROOT / "mfm_nnunet" / f"{name.replace('.', '/')}.py").is_file():
                check_setting(name, value)


def test_scripts_and_their_flags_exist() -> None:
    for words in (words for page in ALL_PAGES for words in shell_lines(page)):
        script = " ".join(words).partition("python -m ")[2].split(" ")[0].replace(".", "/") + ".py"
        for file in [w for w in [*words, script] if re.fullmatch(r"(tests|setup_scripts)/[\w/]+\.(py|sh)", w)]:
            assert (ROOT / file).is_file(), words
            if file.endswith(".py"):
                text = (ROOT / file).read_text()
                if "tests.benchmarks.study" in text:
                    text += (ROOT / "tests" / "benchmarks" / "study.py").read_text()
                assert {w for w in words if w.startswith("--")} <= set(re.findall(r'"(--[\w-]+)"', text)), words


# Pretext tasks


@pytest.mark.parametrize("task", [info.name for info in list_tasks()])
def test_each_task_has_a_page_of_the_fixed_form(task: str) -> None:
    found = sections(REFERENCE / f"pretext_{task}.md")
    assert tuple(found) == TASK_PAGE
    assert f"--pretext {task} " in found["Command"]
    for citation in (text for entry in find_task(task).citations for text in entry["apa_citations"]):
        assert citation.partition(",")[0] in found["Paper"], citation
        assert re.search(r"\((\d{4})\)", citation)[1] in found["Paper"], citation  # type: ignore[index]
    assert "benchmarks/README.md" in found["Curve"]
    picture = f"pictures/pretext_{task}.png"
    assert f"]({picture})" in found["What is hidden or mixed"]
    assert 2_000 < (REFERENCE / picture).stat().st_size <= 150_000


def test_the_page_of_all_tasks_says_what_the_list_says() -> None:
    text = TEXTS[REFERENCE / "pretext_tasks.md"]
    families = {family.title.split()[0]: family.name for family in map(family_named, BUILT_IN)}
    rows = {row["task"].partition("]")[0][1:]: row for row in rows_with(text, "task", *families)}
    assert list(rows) == [task.name for task in list_tasks()]
    for task in list_tasks():
        row = rows[task.name]
        assert (row["hidden or mixed"], row["published"], row["paper"]) == (task.hides, task.recipe, task.paper)
        assert [row[title] for title in families] == ["x" if f in task.backbones else "-" for f in families.values()]
    for line in re.findall(r"^\* .*$", text, re.MULTILINE):
        for name in names_in(line.partition(": ")[2]):
            assert find_task(name).trains_decoder == line.startswith("* encoder and decoder"), name


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
    patch, config = (16, 16, 16), override(task_class.Config(), ["noise=0.25"])
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
    assert all(weight.grad is not None for weight in task.parameters() if weight.requires_grad)
    assert set(task.eval()(batch).pictures or {}) == {"noisy", "restored"}
    assert f"{package.name}.denoising" in sys.modules


# Checkpoints


@pytest.fixture(scope="module", params=["resenc", "primus"])
def pretrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A real checkpoint of ``mfm_pretrain``, of one step."""
    here = tiny_run.prepare(tmp_path_factory.mktemp(request.param), request.param, num_cases=3)
    short = ("pretrain.epochs=1", "pretrain.iterations_per_epoch=1", "num_workers=0")
    return request.param, tiny_run.run(here, "mae", short)


def keys_in(title: str) -> tuple[list[str], list[str]]:
    """Return the keys of a file and of its ``mfm`` table, as a section of the page names them."""
    text = sections(REFERENCE / "checkpoint.md")[title]
    first, second = (
        [name for row in rows_with(text, column, "content") for name in re.findall(r"`([^`]+)`", row[column])]
        for column in ("key", "`mfm` key")
    )
    return first, second


def test_keys_of_a_pretrained_checkpoint_and_no_names_in_it(pretrained: tuple[str, Path]) -> None:
    content, resume = checkpoint.load(pretrained[1]), checkpoint.load(pretrained[1].with_name("resume.pth"))
    assert keys_in("Pretrained") == (list(content), list(content["mfm"]))
    assert set(content["mfm"]["corpus"]) == {"num_cases", "num_subjects", "hash"}
    assert keys_in("resume.pth")[0] == list(resume)
    assert not [text for text in texts_in([content, resume]) if re.search(r"case\d|/|\\", text)]


def texts_in(value: Any) -> Iterator[str]:
    for item in value.items() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        yield from texts_in(item)
    if isinstance(value, str):
        yield value


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
    (model / "fold_0" / "checkpoint_final.pth").write_bytes(file.read_bytes())
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
        trainer.save_checkpoint(str(tmp_path / "model.pth"))
    content = checkpoint.load(tmp_path / "model.pth")
    keys, of_mfm = keys_in("Fine-tuned")
    assert sorted(keys) == sorted(content)
    assert of_mfm == list(content["mfm"])
    rows = rows_with(sections(REFERENCE / "checkpoint.md")["Fine-tuned"], "key")
    (row,) = (row for row in rows if "init_args" in row["key"])
    assert names_in(row["content"]) == set(content["init_args"])


# Code, links, names and form


def test_python_blocks_call_the_functions_as_they_are() -> None:
    for node in (n for page in ALL_PAGES for block in blocks(page, "python") for n in ast.walk(ast.parse(block))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("mfm."):
            function = getattr(mfm_nnunet, ast.unparse(node.func).removeprefix("mfm."))
            keywords = {str(keyword.arg): None for keyword in node.keywords}
            inspect.signature(function).bind(*node.args, **keywords)
    assert all(inspect.getdoc(getattr(mfm_nnunet, name)) for name in mfm_nnunet.__all__)


def test_links_lead_somewhere_and_every_page_is_reached_from_the_readme() -> None:
    reached, queue = set(), [ROOT / "README.md"]
    while queue:
        page = queue.pop().resolve()
        if page.is_dir():
            queue += page.glob("*.md")
        elif page.suffix == ".md" and page not in reached:
            reached.add(page)
            queue += links_of(page)
    assert not [page for page in ALL_PAGES if page.parent != ROOT and page not in reached]
    for page in ALL_PAGES:
        links_of(page)


def links_of(page: Path) -> list[Path]:
    """Return the files and folders that a page links to; each must exist, and a heading that is named too."""
    files = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), target
            continue
        path, _, anchor = target.partition("#")
        files.append(page.parent / path if path else page)
        assert files[-1].exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", files[-1].read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{page}: {target}"
    return files


def test_files_and_modules_in_the_text_exist() -> None:
    packages = {entry.name for entry in (ROOT / "mfm_nnunet").iterdir() if entry.is_dir()}
    settings = {name.rpartition(".")[2] for name in setting_names(MFMBlock())}
    for page, span in ((file, span) for file in ALL_PAGES for span in code_spans(file)):
        if re.fullmatch(r"(tests|setup_scripts|documentation|mfm_nnunet)/[\w/.]*", span) and page not in HISTORY:
            assert (ROOT / span).exists(), f"{page}: {span}"
        module = re.fullmatch(r"([a-z]+)\.(?!json|pth|png)([a-z_]+)(\.[A-Z]\w+)?", span)
        if module and module[1] in packages and page.parent.name != "reference" and page not in HISTORY:
            file = ROOT / "mfm_nnunet" / module[1] / f"{module[2]}.py"
            assert file.is_file() or module[2] in settings, f"{page}: {span}"


def test_benchmarks_page_names_every_script_and_results_have_a_date() -> None:
    page = DOCUMENTATION / "benchmarks" / "README.md"
    for script in (file for file in (ROOT / "tests" / "benchmarks").glob("*.py") if file.stem != "__init__"):
        assert re.search(rf"tests[/.]benchmarks[/.]{script.stem}", TEXTS[page]), script.name
    for file in page.parent.rglob("*.md"):
        assert file == page or re.fullmatch(r"\w[\w-]*_[\w-]+_\d{4}-\d\d-\d\d", file.stem), file.name


def test_form() -> None:
    made_how = r"\b(sessions?|sandbox|chatbot|language model|assistant|subagents?|prompt(s|ed)?|founder)\b"
    for page, text in TEXTS.items():
        lines = text.splitlines()
        assert lines[0].startswith("# "), f"{page}: a page begins with its title"
        assert not [n for n, line in enumerate(lines, start=1) if len(line) > 160 or line != line.rstrip()], page
        assert len(lines) <= {"README.md": 150}.get(page.name if page.parent == ROOT else "", 10**6), page
        assert len(lines) <= 60 or page.parent.name != "decisions", page
        assert text.count("```") % 2 == 0, page
        assert not re.findall(r"@[A-Z]+@|TODO|FIXME|lorem ipsum", text), page
        assert not re.findall(made_how, text, re.IGNORECASE), page


def test_decisions_are_numbered() -> None:
    numbers = []
    for page in sorted((DOCUMENTATION / "decisions").glob("*.md")):
        numbers.append(int(page.name[:4]))
        assert TEXTS[page].startswith(f"# {numbers[-1]}. ")
    assert len(numbers) == len(set(numbers))


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
