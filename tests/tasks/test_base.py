"""Finding pretext tasks by name: the built-in ones, and private ones that need no fork."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.families import BUILT_IN, family_named
from mfm_nnunet.tasks.base import PretextTask, find_task, list_tasks
from mfm_nnunet.tasks.masks import MaskingConfig
from tests.builders.tiny_plans import tiny_backbone

PRIVATE = """
from mfm_nnunet.tasks.base import PretextTask
from mfm_nnunet.tasks.mae import MAE
from mfm_nnunet.tasks.masks import MaskingConfig

class First(PretextTask):
    name = "first"
    Config = MaskingConfig
    transform = classmethod(lambda cls, config, patch_size: None)
    def forward(self, batch):
        return None
"""


def test_the_file_name_is_the_name_and_the_list_agrees_with_the_class() -> None:
    tasks, built_in = list_tasks(), list(dict.fromkeys(map(family_named, BUILT_IN)))
    assert {"mae", "volume_fusion"} <= {task.name for task in tasks}
    for task in tasks:
        found = find_task(task.name)
        assert issubclass(found, PretextTask)
        assert found.name == task.name
        assert (found.needs, found.citations) == (task.needs, task.citations)
        assert task.backbones == tuple(family.name for family in built_in if family.meets(task.needs))


def test_listing_imports_no_torch() -> None:
    code = "import sys; from mfm_nnunet.tasks import registry; registry.list_tasks(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(MFMError, match="Did you mean 'volume_fusion'") as caught:
        find_task("volume_fusoin")
    assert caught.value.code == "E_CONFIG"
    for helper in ("base", "masks", "registry", "losses"):
        with pytest.raises(MFMError, match="E_CONFIG"):
            find_task(helper)


def test_a_private_task_by_its_dotted_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "private_tasks_of_mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text(PRIVATE)
    (package / "two.py").write_text(PRIVATE + PRIVATE.replace("First", "Second"))
    monkeypatch.syspath_prepend(tmp_path)
    assert find_task("private_tasks_of_mine.one").__name__ == "First"
    assert find_task("private_tasks_of_mine.one.First") is find_task("private_tasks_of_mine.one")
    assert find_task("private_tasks_of_mine.two.Second").__name__ == "Second"
    for bad in (
        "private_tasks_of_mine.two",
        "private_tasks_of_mine.one.Third",
        "private_tasks_of_mine.three",
        "no.such",
    ):
        with pytest.raises(MFMError, match="E_CONFIG"):
            find_task(bad)


@pytest.mark.parametrize(
    ("task", "network", "need"), [("simmim", "resenc", "tokens"), ("spark3d", "primus", "sparse encoder")]
)
def test_a_task_refuses_a_network_that_it_cannot_work_on(task: str, network: str, need: str) -> None:
    with pytest.raises(MFMError, match=f"E_CONFIG.*{task} needs a network with {need}.*network is {network}"):
        find_task(task)(MaskingConfig(cell_size=(8, 8, 8)), tiny_backbone(network, (16, 16, 16)))
