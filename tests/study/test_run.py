"""The plan and the starts of a study: what they share, and what is refused before anything is trained."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mfm_nnunet import workspace
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import digest_of, sha256, write_json
from mfm_nnunet.jobs.preflight import RawDataset, read_raw_dataset
from mfm_nnunet.plan import Plan
from mfm_nnunet.study import run
from mfm_nnunet.study.cells import all_steps
from mfm_nnunet.study.design import Arm
from mfm_nnunet.study.folder import Study, link_corpus
from mfm_nnunet.study_requests import StudyRequest
from tests.builders import small, tiny
from tests.builders.architectures import natural
from tests.builders.tiny_data import pretrained_checkpoint
from tests.builders.training import pretrained_file


def pretrained(file: Path, settings: tuple[str, ...] = ()) -> Arm:
    return Arm(str(file), "hash", settings)


def test_an_arm_that_does_not_fit_the_plan(tmp_path: Path) -> None:
    small.write_raw(tmp_path)
    other = pretrained(pretrained_checkpoint(tmp_path / "other.pth", tiny.plans(), "3d_fullres"))
    arms, plan = {"scratch": small.SCRATCH, "other": other}, Plan.of(tiny.plans())
    study, _ = small.begin(tmp_path, arms)
    with pytest.raises(MFMError, match=r"(?s)E_MODEL_MISMATCH  arm other: .*other\.pth.* -p"):
        run.check_arms(study, arms, plan, 1)
    run.check_arms(study, {"scratch": small.SCRATCH}, plan, 1)


def test_a_licence_is_accepted_for_all_cells_before_any(tmp_path: Path) -> None:
    """Else each cell of the arm would be refused."""
    small.write_raw(tmp_path)
    torch.save({"some.weight": torch.zeros(2, 2)}, tmp_path / "weights.pth")
    encoder = tiny.configuration(natural((32, 32), "convnextv2_atto.fcmae"), (32, 32))
    plan = Plan.of(tiny.plans("mfmNatural", **{"3d_fullres": encoder}))
    arms = {"scratch": small.SCRATCH, "fcmae": pretrained(tmp_path / "weights.pth")}
    study, cells = small.begin(tmp_path, arms)
    with pytest.raises(MFMError, match=r"arm fcmae.*--accept-licence cc-by-nc-4.0") as refused:
        run.check_arms(study, arms, plan, 1)
    assert refused.value.code == "E_CONFIG"
    with pytest.raises(MFMError) as refused:
        run.check_arms(study, arms, plan, 1, "cc-by-nc-4.0")
    assert refused.value.code == "E_MODEL_MISMATCH", "the licence is accepted, and the tensors are none of its"
    given = {cell.arm: "--accept-licence" in all_steps(study, cell, "cpu", "cc-by-nc-4.0")[0].words for cell in cells}
    assert given == {"scratch": False, "fcmae": True}


@pytest.mark.parametrize(
    ("arm", "settings"),
    [
        ("scratch", ["finetune.train=decoder"]),
        ("mae", ["finetune.train=lora"]),
        ("mae", ["finetune.layer_decay=0.75"]),
        ("mae", ["finetune.train=head", "finetune.parts=encoder"]),
    ],
)
def test_settings_that_an_arm_cannot_train_with(tmp_path: Path, arm: str, settings: list[str]) -> None:
    """Each of its cells would be refused, after hours."""
    small.write_raw(tmp_path)
    mae, plan = pretrained(pretrained_file(tmp_path)), Plan.of({**tiny.plans(), "mfm": {}})
    arms = {"scratch": small.SCRATCH, "mae": mae}
    study, _ = small.begin(tmp_path, arms)
    run.check_arms(study, arms, plan, 1)
    run.check_arms(study, {**arms, "mae": dataclasses.replace(mae, settings=("finetune.train=decoder",))}, plan, 1)
    refused, _ = small.begin(tmp_path, arms, settings=settings)
    with pytest.raises(MFMError) as error:
        run.check_arms(refused, {arm: arms[arm]}, plan, 1)
    assert error.value.code == "E_CONFIG"
    assert error.value.message.startswith(f"arm {arm}: {settings[0]}")


def test_names_of_the_plan(tmp_path: Path) -> None:
    small.write_raw(tmp_path)
    assert run.name_own_plan("3d_fullres", {"scratch": small.SCRATCH}) == "own"
    file = pretrained_checkpoint(tmp_path / "a.pth", tiny.plans(), "3d_fullres")
    arms = {"scratch": small.SCRATCH, "a": pretrained(file)}
    assert run.name_own_plan("3d_fullres", arms) == "like hash"
    names = {plans: small.begin(tmp_path, plans=plans)[0].plans_name for plans in ("own", "like hash", "mfmA hash")}
    assert names == {"own": "mfmStudyPlans", "like hash": "mfmStudyPlans", "mfmA hash": "mfmA"}
    tiny.make(tmp_path / "tiny")
    with workspace.use(tmp_path / "tiny") as here:
        assert run.read_given_plan(here, tiny.NAME, "mfmPlans", "3d_fullres").name == "mfmPlans"
        with pytest.raises(MFMError, match=r"E_CONFIG.*Did you mean '3d_fullres'\?"):
            run.read_given_plan(here, tiny.NAME, "mfmPlans", "3d_fulres")


Planned = Callable[[Study, dict[str, Any]], "Path | None"]


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planned:
    """Plan a study whose plan will be what is given; return the checkpoint that it was asked to be like."""
    small.write_raw(tmp_path)
    asked: list[Path | None] = []
    monkeypatch.setattr(run, "preprocess_plan", lambda *arguments: None)

    def plan_study(study: Study, plans: dict[str, Any]) -> Path | None:
        def make(datasets: list[str], *, like: Path | None, plans_name: str, **others: Any) -> None:
            asked.append(like)
            write_json(own.preprocessed / datasets[0] / f"{plans_name}.json", plans)

        monkeypatch.setattr(run.mfm_nnunet, "plan_and_preprocess", make)
        with workspace.use_only(study.workspace) as own:
            plan = run.prepare_data(own, study, None)
        dataclasses.replace(study, plan_sha256=digest_of(plan.content)).write()
        return asked[-1]

    return plan_study


def test_a_plan_that_is_made_again_must_be_the_same(tmp_path: Path, planned: Planned) -> None:
    file = tmp_path / "study" / "workspace" / "nnUNet_preprocessed" / small.NAME / "mfmStudyPlans.json"
    first, other = tiny.plans(), {**tiny.plans(), "mfm": {"seed": 7}}
    planned(small.begin(tmp_path)[0], other)
    file.unlink()
    study, _ = small.begin(tmp_path)  # nothing was trained: another plan does no harm
    planned(study, first)
    study.cell_folder(study.asked[0]).mkdir(parents=True)
    planned(small.begin(tmp_path)[0], first)
    file.unlink()
    with pytest.raises(MFMError, match=r"E_CONFIG.*mfmStudyPlans\.json"):
        planned(small.begin(tmp_path)[0], other)
    assert not file.exists(), "it is made again where the study was begun"
    planned(small.begin(tmp_path)[0], first)
    file.write_text(json.dumps(other))
    with pytest.raises(MFMError, match="E_CONFIG"):
        planned(small.begin(tmp_path)[0], first)


def test_a_plan_is_made_again_like_the_checkpoint_of_the_first_call(tmp_path: Path, planned: Planned) -> None:
    mae, vf = (Arm(small.arm(tmp_path, name).file, sha256(tmp_path / f"{name}.pth")) for name in ("mae", "vf"))
    like = f"like {mae.sha256}"
    study, _ = small.begin(tmp_path, {"scratch": small.SCRATCH, "mae": mae}, like)
    assert planned(study, tiny.plans()) == tmp_path / "mae.pth"
    study.cell_folder(study.asked[0]).mkdir(parents=True)
    file = study.workspace / "nnUNet_preprocessed" / small.NAME / "mfmStudyPlans.json"
    file.unlink()
    assert planned(small.begin(tmp_path, {"vf": vf}, like)[0], tiny.plans()) == tmp_path / "mae.pth"
    file.unlink()
    (tmp_path / "mae.pth").unlink()
    with pytest.raises(MFMError, match=r"E_NOT_FOUND.*mae\.pth\. Put it back"):
        planned(small.begin(tmp_path, {"vf": vf}, like)[0], tiny.plans())


def test_gpus_that_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert run.list_gpus("cpu") == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert run.list_gpus("cuda") == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-a")
    assert run.list_gpus("auto") == ["3", "GPU-a"]


def test_a_corpus_is_for_the_arms_that_use_one(tmp_path: Path) -> None:
    raw = small.write_raw(tmp_path)
    semi = Arm(settings=("finetune.epochs=2", "semi.method=consistency"))
    off = dataclasses.replace(semi, settings=(*semi.settings, "semi.method=none"))
    arms, dataset = {"scratch": small.SCRATCH, "off": off, "semi": semi}, read_raw_dataset(raw)
    with workspace.use(tmp_path) as here:

        def add(corpus: str | None, arms: dict[str, Arm], dataset: RawDataset = dataset) -> Any:
            request = StudyRequest(small.NAME, "2d", labels=("1",), arms=(), unlabelled=corpus)
            return run.add_corpus(here, request, dataset, arms)

        found, folder = add("4", arms)
        assert folder == raw
        assert found["semi"].unlabelled == f"{small.NAME} {dataset.digest}"
        assert [found[name].unlabelled for name in ("scratch", "off")] == ["", ""]
        assert add(None, {"off": off}) == ({"off": off}, None)
        for corpus, wrong in ((None, arms), ("4", {"scratch": small.SCRATCH}), ("5", arms)):
            with pytest.raises(MFMError, match=r"E_CONFIG|E_NOT_FOUND"):
                add(corpus, wrong)
        with pytest.raises(MFMError, match=r"E_CONFIG.*masks only"):
            add("4", arms, dataclasses.replace(dataset, table=object()))  # type: ignore[arg-type]


def test_a_study_shows_its_cells_the_corpus_and_the_test_images(tmp_path: Path) -> None:
    small.write_raw(tmp_path)
    other = tmp_path / "elsewhere" / "Dataset700_Corpus"
    other.mkdir(parents=True)
    arm = Arm(settings=("semi.method=consistency",), unlabelled="Dataset700_Corpus hash")
    study, cells = small.begin(tmp_path, {"scratch": small.SCRATCH, "semi": arm})
    link_corpus(study, other)
    link_corpus(study, other)
    raw = study.workspace / "nnUNet_raw"
    assert (raw / other.name).resolve() == other
    assert (raw / small.NAME / "imagesTs").resolve() == study.test_folder.resolve()
    words = {cell.arm: all_steps(study, cell, "cpu")[0].words for cell in cells}
    assert "--unlabelled" not in words["scratch"]
    assert words["semi"][words["semi"].index("--unlabelled") + 1] == other.name
    study.cell_folder(study.asked[0]).mkdir(parents=True)
    with pytest.raises(MFMError, match=r"E_CONFIG.*unlabelled images"):
        small.begin(tmp_path, {"semi": dataclasses.replace(arm, unlabelled="Dataset700_Corpus other")})
