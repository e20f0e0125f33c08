"""The studies of tests/benchmarks: what is finished is not mixed with what was made otherwise, and is whole."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mfm_nnunet.study.design import Cell
from tests.benchmarks.hippocampus import HippocampusStudy
from tests.benchmarks.label_efficiency import LabelStudy
from tests.benchmarks.over_all_labels import over_all, with_fewer
from tests.benchmarks.pretext_pairs import PairsStudy
from tests.benchmarks.study import Study


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data" / "imagesTr").mkdir(parents=True)
    for number in range(200):
        (tmp_path / "data" / "imagesTr" / f"case{number}_0000.nii.gz").touch()
    (tmp_path / "data" / "dataset.json").write_text("{}")
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def _no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Study, "command", lambda *words, **options: None)


def arguments(data: Path, **changes: Any) -> argparse.Namespace:
    asked = {"seeds": 1, "jobs": 1, "pretrain": ["pretrain.epochs=2"], "finetune": ["finetune.epochs=2"]}
    more = {"scans": "hippocampus", "network": "resenc", "budget": 1.0, "disable_tta": False, "pairs": []}
    return argparse.Namespace(data=data, work=data.parent / "work", **{**asked, **more, **changes})


@pytest.mark.parametrize(
    ("kind", "changes", "may_change"),
    [
        (HippocampusStudy, {"finetune": []}, {"seeds": 3}),
        (LabelStudy, {"pretrain": []}, {"finetune": []}),  # mfm_study minds these itself
        (LabelStudy, {"network": "primus"}, {}),
        (PairsStudy, {"budget": 2.0}, {"seeds": 3}),
    ],
)
def test_other_settings_need_another_folder(
    data: Path, kind: type[Study], changes: dict[str, Any], may_change: dict[str, Any]
) -> None:
    folder = data.parent / "work"
    folder.mkdir()  # one that tells no settings is taken for one of these
    (folder / "costs.json").write_text("{}")
    kind(arguments(data)).prepare()
    kind(arguments(data, **may_change)).prepare()
    (name,) = changes
    with pytest.raises(SystemExit, match=rf"study\.json: what is finished was made with other {name}\. Use another"):
        kind(arguments(data, **changes)).prepare()


def test_a_result_is_whole_or_not_there(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(arguments(data))
    cell = study.cell("scratch", 0)
    cell.mkdir(parents=True)
    monkeypatch.setattr(Study, "dice", lambda self, name, masks: [0.5, 0.6])

    def finish(seed: Any) -> None:
        study.finetune_once(cell, {"seed": seed}, dataset="704_A", plans="mfmPlans", weights=None, core=0)

    real = json.dumps
    monkeypatch.setattr(json, "dumps", lambda *values, **options: real(*values, **options)[:5] + "\udfff")
    with pytest.raises(UnicodeEncodeError):  # it ends while it writes
        finish(0)
    assert not (cell / "result.json").exists()
    monkeypatch.setattr(json, "dumps", real)
    finish(0)
    assert json.loads((cell / "result.json").read_text())["dice"][study.test[0]] == [0.5, 0.6]


@pytest.mark.parametrize(("network", "plans"), [("resenc", "mfmPlans"), ("primus", "mfmPrimusPlans")])
def test_starts_have_pretrainings_of_their_own(
    data: Path, monkeypatch: pytest.MonkeyPatch, network: str, plans: str
) -> None:
    """One pretraining per checkpoint; its own settings replace those of all; scratch alone has further labels."""
    commands: list[list[str]] = []
    monkeypatch.setattr(Study, "command", lambda self, *words, **options: commands.append([str(w) for w in words]))
    asked = {"arms": ["vf_encoder", "vf_long_encoder", "vf"], "labels": ["8"], "scratch_labels": ["32"]}
    study = LabelStudy(arguments(data, network=network, **asked))
    for start in study.starts():
        study.pretrain(start, core=0)
    (study.folder / "study").mkdir(parents=True)
    (study.folder / "study" / "table.md").touch()
    study.compare()
    runs = [(line[line.index("--run-name") + 1], line[line.index("--set") + 1 :]) for line in commands[:2]]
    assert runs == [("labels", ["pretrain.epochs=2", "seed=0"]), ("vf_long", ["pretrain.epochs=120", "seed=0"])]
    assert all(line[line.index("-p") + 1] == plans for line in commands[:2])
    compared = [line[line.index("--labels") + 1 : line.index("--seeds")] for line in commands[2:]]
    assert [words[:3] for words in compared] == [["8", "--arms", "scratch"], ["32", "--arms", "scratch"]]
    assert [word.partition("=")[0] for word in compared[0][3:]] == asked["arms"]
    assert not compared[1][3:]
    assert compared[0][4].endswith(f"__{plans}__3d_fullres__vf_long/checkpoint_final.pth,finetune.parts=encoder")


def test_which_cells_a_start_is_compared_with() -> None:
    cells = [Cell(count, seed, arm) for count in (8, 32) for seed in range(2) for arm in ("scratch", "mae")]
    scores = {cell: np.array([place]) for place, cell in enumerate(cells) if cell != Cell(32, 1, "mae")}
    assert list(over_all(scores)) == [("mae", [(1, 0), (3, 2), (5, 4)])]
    fewer = dict(with_fewer(scores, 32))
    assert fewer == {"mae, 8 labels": [(1, 4), (3, 6)], "scratch, 8 labels": [(0, 4), (2, 6)]}
