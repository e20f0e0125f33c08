"""What a study refuses before it trains, and what it runs on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mfm_nnunet import workspace
from mfm_nnunet.errors import MFMError
from mfm_nnunet.study import plan, run
from mfm_nnunet.study.arms import Arm
from tests.finetune import tiny
from tests.plans.tiny_data import pretrained_checkpoint
from tests.study import small
from tests.study.test_cells import design_in


def test_an_arm_that_does_not_fit_the_plan(tmp_path: Path) -> None:
    small.write_raw(tmp_path)
    other = pretrained_checkpoint(tmp_path / "other.pth", tiny.plans(), "3d_fullres")
    design = design_in(tmp_path, arms=(Arm("scratch"), Arm("other", other)))
    with pytest.raises(MFMError, match=r"(?s)E_MODEL_MISMATCH  arm other, .*other\.pth.* -p"):
        run.check_checkpoints(design, tiny.plans())
    run.check_checkpoints(design_in(tmp_path, arms=(Arm("scratch"),)), tiny.plans())


def test_test_cases_that_cannot_be_read_are_all_listed(tmp_path: Path) -> None:
    small.write_raw(tmp_path)
    design = design_in(tmp_path, arms=(Arm("scratch"),))
    with pytest.raises(MFMError, match="4 of 4 labelled cases cannot be used; nothing was trained") as refused:
        run.check_test_cases(design, "SimpleITKIO")
    assert refused.value.code == "E_EMPTY"
    assert all(f"{name}: E_EMPTY" in refused.value.message for name in design.question.test)


def test_names_of_the_plan(tmp_path: Path) -> None:
    own = plan.own_plan("3d_fullres", [Arm("scratch")])
    assert (own, plan.plans_name_of(own)) == ("own", "mfmStudyPlans")
    file = pretrained_checkpoint(tmp_path / "a.pth", tiny.plans(), "3d_fullres")
    like = plan.own_plan("3d_fullres", [Arm("scratch"), Arm("a", file)])
    assert like.startswith("like ")
    assert plan.plans_name_of(like) == "mfmStudyPlans"
    tiny.make(tmp_path)
    with workspace.use(tmp_path) as here:
        given = plan.given_plan(here, tiny.NAME, "3d_fullres", "mfmPlans")
        assert given is not None
        assert plan.plans_name_of(given[1]) == given[0]["plans_name"] == "mfmPlans"
        with pytest.raises(MFMError, match=r"E_CONFIG.*Did you mean '3d_fullres'\?"):
            plan.given_plan(here, tiny.NAME, "3d_fulres", "mfmPlans")


def test_the_workspace_of_a_study_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_raw", "/somebody's")
    with workspace.use_only(tmp_path) as here:
        assert here.raw == tmp_path / "nnUNet_raw"
        assert os.environ["nnUNet_raw"] == str(here.raw)
    assert os.environ["nnUNet_raw"] == "/somebody's"
    assert "nnUNet_results" not in os.environ


def test_gpus_that_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert run.visible_gpus("cpu") == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert run.visible_gpus("cuda") == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-a")
    assert run.visible_gpus("auto") == ["3", "GPU-a"]
