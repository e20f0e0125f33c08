"""What a study refuses before it trains, and what it runs on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile

from mfm_nnunet import api, workspace
from mfm_nnunet.errors import MFMError
from mfm_nnunet.finetune.settings import plan_hash
from mfm_nnunet.images.reading import read_image
from mfm_nnunet.interchange.read import sha256
from mfm_nnunet.study import plan, run
from mfm_nnunet.study.arms import Arm
from mfm_nnunet.study.design import Design
from mfm_nnunet.study.folder import write_design, write_json
from tests.builders import small, tiny
from tests.builders.tiny_data import pretrained_checkpoint
from tests.builders.training import pretrained_file
from tests.study.test_cells import LIBRARY, design_in


def test_an_arm_that_does_not_fit_the_plan(tmp_path: Path) -> None:
    small.write_raw(tmp_path)
    other = pretrained_checkpoint(tmp_path / "other.pth", tiny.plans(), "3d_fullres")
    design = design_in(tmp_path, arms=(Arm("scratch"), Arm("other", other)))
    with pytest.raises(MFMError, match=r"(?s)E_MODEL_MISMATCH  arm other: .*other\.pth.* -p"):
        run.check_checkpoints(design, tiny.plans())
    run.check_checkpoints(design_in(tmp_path, arms=(Arm("scratch"),)), tiny.plans())


@pytest.mark.parametrize(
    ("arms", "settings", "message"),
    [
        (["scratch", "mae"], ["finetune.train=decoder"], "arm scratch: finetune.train=decoder: from scratch the"),
        (["mae"], ["finetune.train=lora"], "arm mae: finetune.train=lora: adapters are for Primus"),
        (["mae"], ["finetune.layer_decay=0.75"], "arm mae: finetune.layer_decay=0.75"),
        (["mae"], ["finetune.train=head", "finetune.parts=encoder"], "arm mae: finetune.train=head: only the encoder"),
    ],
)
def test_settings_that_an_arm_cannot_train_with(
    tmp_path: Path, arms: list[str], settings: list[str], message: str
) -> None:
    """Each of its cells would be refused, after hours."""
    small.write_raw(tmp_path)
    of_name = {"scratch": Arm("scratch"), "mae": Arm("mae", pretrained_file(tmp_path))}
    chosen = tuple(of_name[name] for name in arms)
    plans = {**tiny.plans(), "mfm": {}}
    run.check_checkpoints(design_in(tmp_path, arms=chosen), plans)
    with pytest.raises(MFMError) as refused:
        run.check_checkpoints(design_in(tmp_path, arms=chosen, settings=settings), plans)
    assert refused.value.code == "E_CONFIG"
    assert refused.value.message.startswith(message)
    own = Arm("mae", of_name["mae"].checkpoint, ("finetune.train=decoder",))
    run.check_checkpoints(design_in(tmp_path, arms=(of_name["scratch"], own)), plans)


def test_test_cases_that_cannot_be_read_are_all_listed(tmp_path: Path) -> None:
    small.write_raw(tmp_path)
    design = design_in(tmp_path, arms=(Arm("scratch"),))
    write_design(design, LIBRARY)
    with pytest.raises(MFMError, match="4 of 4 labelled cases cannot be used; nothing was trained") as refused:
        run.check_test_cases(design, "SimpleITKIO")
    assert refused.value.code == "E_EMPTY"
    assert all(f"{name}: E_EMPTY" in refused.value.message for name in design.question.test)


def write_volumes(root: Path, ending: str, write: Callable[[Path, np.ndarray], None]) -> None:
    """The small dataset again, in files that need others beside them."""
    raw = small.write_raw(root)
    content = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps({**content, "file_ending": ending}))
    for file in (*raw.glob("imagesTr/*"), *raw.glob("labelsTr/*")):
        file.unlink()
    for number in range(small.NUM_CASES):
        array = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
        write(raw / "imagesTr" / f"case{number}_0000{ending}", array)
        write(raw / "labelsTr" / f"case{number}{ending}", array % 3)


def write_itk(file: Path, array: np.ndarray) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.5, 0.6, 2.0))
    sitk.WriteImage(image, str(file))


def write_tiff(file: Path, array: np.ndarray) -> None:
    tifffile.imwrite(file, array, photometric="minisblack")
    spacing = file.parent / f"{file.stem.removesuffix('_0000')}.json"
    spacing.write_text(json.dumps({"spacing": [2.0, 0.6, 0.5]}))


@pytest.mark.parametrize(
    ("ending", "reader", "write"),
    [
        (".mhd", "SimpleITKIO", write_itk),
        (".nhdr", "SimpleITKIO", write_itk),
        (".tif", "Tiff3DIO", write_tiff),
    ],
)
def test_test_images_keep_what_lies_beside_them(
    tmp_path: Path, ending: str, reader: str, write: Callable[[Path, np.ndarray], None]
) -> None:
    write_volumes(tmp_path, ending, write)
    design = design_in(tmp_path, arms=(Arm("scratch"),))
    write_design(design, LIBRARY)
    for case in design.test:
        _, properties = read_image(design.test_images(case), reader)
        assert tuple(properties["spacing"]) == (2.0, 0.6, 0.5)


def test_what_prediction_cannot_read_is_found_before_the_training(tmp_path: Path) -> None:
    write_volumes(tmp_path, ".mhd", write_itk)
    design = design_in(tmp_path, arms=(Arm("scratch"),))
    write_design(design, LIBRARY)
    run.check_test_cases(design, "SimpleITKIO")
    design.test_images(design.test[0])[0].with_suffix(".raw").unlink()
    with pytest.raises(MFMError, match="1 of 4 labelled cases cannot be used"):
        run.check_test_cases(design, "SimpleITKIO")


def test_test_images_that_need_other_files_of_one_name(tmp_path: Path) -> None:
    write_volumes(tmp_path, ".mhd", write_itk)
    raw = tmp_path / "nnUNet_raw" / small.NAME
    content = json.loads((raw / "dataset.json").read_text())
    files = {}
    for number in range(small.NUM_CASES):
        folder = raw / f"sub-{number:02d}"
        folder.mkdir()
        write_itk(folder / "scan.mhd", np.zeros((3, 4, 5), np.uint8))
        label = str(raw / "labelsTr" / f"case{number}.mhd")
        files[f"case{number}"] = {"images": [str(folder / "scan.mhd")], "label": label}
    (raw / "dataset.json").write_text(json.dumps({**content, "dataset": files}))
    with pytest.raises(MFMError, match=r"E_CONFIG.*scan\.raw: belongs to test case .* because of its name"):
        write_design(design_in(tmp_path, arms=(Arm("scratch"),)), LIBRARY)


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


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Design, dict[str, Any]], Path | None]:
    """Plan a study whose plan will be what is given; returns the checkpoint that it was asked to be like."""
    small.write_raw(tmp_path)
    for name in ("mae", "vf"):
        (tmp_path / f"{name}.pth").write_bytes(name.encode())
    asked: list[Path | None] = []
    monkeypatch.setattr(api.preparation, "fingerprint", lambda *arguments: ([], []))
    monkeypatch.setattr(api.preparation, "preprocess", lambda *arguments: [])

    def plan_study(design: Design, plans: dict[str, Any]) -> Path | None:
        def make(datasets: list[str], *, like: Path | None, plans_name: str, **others: Any) -> None:
            asked.append(like)
            write_json(own.preprocessed / datasets[0] / f"{plans_name}.json", plans)

        monkeypatch.setattr(api, "plan_and_preprocess", make)
        write_design(design, LIBRARY)
        with workspace.use_only(design.workspace) as own:
            api._plan_study(own, design, None)
        return asked[-1]

    return plan_study


def test_a_plan_that_is_made_again_must_be_the_same(
    tmp_path: Path, planned: Callable[[Design, dict[str, Any]], Path | None]
) -> None:
    file = tmp_path / "study" / "workspace" / "nnUNet_preprocessed" / small.NAME / "mfmStudyPlans.json"
    first, other = tiny.plans(), {**tiny.plans(), "mfm": {"seed": 7}}
    planned(design_in(tmp_path), other)
    file.unlink()
    design = design_in(tmp_path)  # nothing was trained: another plan is no harm
    planned(design, first)
    design.cell_folder(next(design.cells())).mkdir(parents=True)
    planned(design_in(tmp_path), first)
    file.unlink()
    with pytest.raises(MFMError, match=r"E_CONFIG.*mfmStudyPlans\.json: is another plan .* where it was begun"):
        planned(design_in(tmp_path), other)
    assert not file.exists(), "it is made again where the study was begun"
    planned(design_in(tmp_path), first)
    file.write_text(json.dumps(other))
    with pytest.raises(MFMError, match="is another plan"):
        planned(design_in(tmp_path), first)


def test_the_plan_of_a_study_begun_by_an_earlier_version(
    tmp_path: Path, planned: Callable[[Design, dict[str, Any]], Path | None]
) -> None:
    """It tells no digest; its trainings do."""
    design, plans = design_in(tmp_path), tiny.plans()
    planned(design, plans)
    record = json.loads((design.folder / "study.json").read_text())
    del record["plan_sha256"]
    write_json(design.folder / "study.json", record)
    run_folder = design.cell_folder(next(design.cells())) / "results" / small.NAME / "model" / "fold_0"
    write_json(run_folder / "settings.json", {"plan_sha256": plan_hash(plans)})
    planned(design_in(tmp_path), plans)
    write_json(design.folder / "study.json", record)
    write_json(run_folder / "settings.json", {"plan_sha256": "another"})
    with pytest.raises(MFMError, match="is another plan"):
        planned(design_in(tmp_path), plans)


def test_a_plan_is_made_again_like_the_checkpoint_of_the_first_call(
    tmp_path: Path, planned: Callable[[Design, dict[str, Any]], Path | None]
) -> None:
    mae, vf = Arm("mae", tmp_path / "mae.pth"), Arm("vf", tmp_path / "vf.pth")
    like = f"like {sha256(tmp_path / 'mae.pth')}"
    design = design_in(tmp_path, arms=(Arm("scratch"), mae), plans=like)
    assert planned(design, tiny.plans()) == tmp_path / "mae.pth"
    design.cell_folder(next(design.cells())).mkdir(parents=True)
    file = design.workspace / "nnUNet_preprocessed" / small.NAME / "mfmStudyPlans.json"
    file.unlink()
    assert planned(design_in(tmp_path, arms=(vf,), plans=like), tiny.plans()) == tmp_path / "mae.pth"
    file.unlink()
    (tmp_path / "mae.pth").unlink()
    with pytest.raises(MFMError, match=r"E_NOT_FOUND.*no longer at .*mae\.pth\. Put it back"):
        planned(design_in(tmp_path, arms=(vf,), plans=like), tiny.plans())


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
