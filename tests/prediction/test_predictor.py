"""Loading models, and the sliding window against nnU-Net's own, bit for bit."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mfm_nnunet.errors import MFMError
from mfm_nnunet.prediction.model import Model, load_model
from mfm_nnunet.reports import progress
from tests.builders.tiny_model import REGIONS, dataset_json, save_model, stock_predictor, tiny_plans


@pytest.fixture(scope="module")
def model_3d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "nnUNetTrainer__mfmPlans__3d_fullres"
    return save_model(folder, tiny_plans(), dataset_json(), folds=(0, 1), mirror_axes=(0, 2))


@pytest.mark.parametrize(
    ("shape", "folds", "step_size", "mirroring"),
    [((16, 16, 16), (0, 1), 0.5, True), ((11, 29, 20), (0,), 0.5, True), ((33, 7, 24), (0, 1), 0.7, False)],
)
def test_logits_are_those_of_stock_bit_for_bit(
    model_3d: Path, shape: tuple[int, ...], folds: tuple[int, ...], step_size: float, mirroring: bool
) -> None:
    x_CDHW = torch.randn((1, *shape), generator=torch.Generator().manual_seed(1))
    stock = stock_predictor(model_3d, folds, step_size=step_size, mirroring=mirroring)
    expected = stock.predict_logits_from_preprocessed_data(x_CDHW)
    model = load_model(model_3d, folds, device="cpu")
    for _ in range(2):  # the second call finds the weights of another fold loaded
        logits = model.predict_logits(x_CDHW, step_size=step_size, mirroring=mirroring)
        assert logits.dtype == expected.dtype == torch.half
        assert logits.shape == (3, *shape)
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("channels", [1, 2])
def test_2d_models_go_through_the_slices_as_stock_does(tmp_path: Path, channels: int) -> None:
    dataset = dataset_json(REGIONS, channels=["MR", "CT"][:channels])
    folder = save_model(tmp_path / "m", tiny_plans(2, channels=channels), dataset, mirror_axes=(0, 1))
    x_CDHW = torch.randn((channels, 3, 21, 14))
    expected = stock_predictor(folder).predict_logits_from_preprocessed_data(x_CDHW)
    assert torch.equal(load_model(folder, device="cpu").predict_logits(x_CDHW), expected)


def test_existing_folds_are_found(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", tiny_plans(), dataset_json(), folds=(10, 2, "all"))
    (folder / "fold_3").mkdir()  # still training
    assert load_model(folder, device="cpu").folds == (2, 10)
    assert load_model(folder, ["all"], device="cpu").folds == ("all",)
    assert load_model(folder, ["2"], device="cpu").folds == (2,)
    only_all = save_model(tmp_path / "n", tiny_plans(), dataset_json(), folds=("all",))
    assert load_model(only_all, device="cpu").folds == ("all",)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("auto", torch.float16)])
def test_what_was_trained_in_bf16_is_predicted_in_it(tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    """On CUDA; a model of bf16 may hold values that fp16 cannot."""
    folder = save_model(tmp_path / "m", tiny_plans(), dataset_json())
    assert load_model(folder, device="cpu").autocast_dtype is torch.float16  # stock's
    file = next(folder.glob("fold_*/*.pth"))
    content = torch.load(file, weights_only=True)
    torch.save({**content, "mfm": {"finetune": {"precision": precision}}}, file)
    assert load_model(folder, device="cpu").autocast_dtype is dtype


def test_the_identity_changes_with_weights_plan_and_labels(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", tiny_plans(), dataset_json(), folds=(0, 1))
    first = load_model(folder, (0,), device="cpu").sha256
    assert load_model(folder, (0,), device="cpu").sha256 == first
    assert load_model(folder, (1,), device="cpu").sha256 != first
    (folder / "dataset.json").write_text(json.dumps({**dataset_json(), "numTraining": 6}))
    assert load_model(folder, (0,), device="cpu").sha256 != first


def _refused(folder: Path, *folds: int | str, checkpoint_name: str = "checkpoint_final.pth") -> MFMError:
    with pytest.raises(MFMError) as caught:
        load_model(folder, folds or None, checkpoint_name, "cpu")
    return caught.value


def test_a_model_of_an_unknown_trainer_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", tiny_plans(), dataset_json(), trainer="nnUNetTrainer_5epochs")
    file = folder / "fold_0" / "checkpoint_final.pth"
    torch.save({**torch.load(file, weights_only=True), "trainer_name": "nnUNetTrainerOfSomebody"}, file)
    error = _refused(folder)
    assert error.code == "E_MODEL_MISMATCH"
    assert "nnUNetTrainerOfSomebody" in error.message


Edit = Callable[[dict[str, Any]], object]


def _edit_plan(**changes: Any) -> Edit:
    return lambda plans: plans["configurations"]["3d_fullres"].update(changes)


def _edit_axes(order: list[int]) -> Edit:
    return lambda plans: plans.update(transpose_forward=order, transpose_backward=[order.index(k) for k in range(3)])


@pytest.mark.parametrize(
    ("name", "edit", "says"),
    [
        ("plans.json", _edit_plan(spacing=[1.0, 1.0, 1.2]), "spacing"),
        ("plans.json", _edit_plan(patch_size=[16, 16, 32]), "patch_size"),
        ("plans.json", _edit_plan(normalization_schemes=["NoNormalization"]), "normalization_schemes"),
        ("plans.json", _edit_plan(use_mask_for_norm=[True]), "use_mask_for_norm"),
        ("plans.json", _edit_plan(resampling_fn_data_kwargs={"order": 1}), "resampling_fn_data_kwargs"),
        ("plans.json", _edit_axes([1, 0, 2]), "transpose_forward"),
        ("dataset.json", lambda content: content.update(labels={"background": 0, "b": 1, "a": 2}), "labels"),
        ("dataset.json", lambda content: content.update(channel_names={"0": "CT"}), "channel_names"),
    ],
)
def test_description_of_another_model(tmp_path: Path, name: str, edit: Edit, says: str) -> None:
    """The weights fit, so only what the checkpoints hold tells that the masks would be wrong."""
    folder = save_model(tmp_path / "m", tiny_plans(), dataset_json(), folds=(0, 1))
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))
    error = _refused(folder)
    assert error.code == "E_MODEL_MISMATCH"
    assert f"json say: {says}." in error.message
    assert "fold_0" in error.message


def test_a_foreign_preprocessor_is_refused(tmp_path: Path) -> None:
    plans = tiny_plans()
    _edit_plan(preprocessor_name="PreprocessorOfSomebody")(plans)
    error = _refused(save_model(tmp_path / "m", plans, dataset_json()))
    assert error.code == "E_MODEL_MISMATCH"
    assert "PreprocessorOfSomebody" in error.message
    del plans["configurations"]["3d_fullres"]["preprocessor_name"]  # as older plans are
    assert load_model(save_model(tmp_path / "n", plans, dataset_json()), device="cpu").folds == (0,)


def test_descriptions_that_decide_the_same(tmp_path: Path) -> None:
    """Batch sizes, statistics that no normalisation uses, a plan that inherits, tuples, numbers as keys, no plan."""
    plans = tiny_plans()
    folder = save_model(tmp_path / "m", plans, dataset_json(REGIONS), folds=(0, 1, 2))
    whole = plans["configurations"]["3d_fullres"]
    plans["configurations"] = {"base": whole, "3d_fullres": {"inherits_from": "base", "batch_size": 9}}
    plans["foreground_intensity_properties_per_channel"]["0"]["mean"] = 77.0
    (folder / "plans.json").write_text(json.dumps(plans))
    for fold, changes in ((0, {"spacing": (1, 1, 1), "patch_size": (16, 16, 16)}), (1, {}), (2, None)):
        file = folder / f"fold_{fold}" / "checkpoint_final.pth"
        content = torch.load(file, weights_only=True)
        if changes is None:
            del content["init_args"]["plans"], content["init_args"]["dataset_json"]
        else:
            _edit_plan(**changes)(content["init_args"]["plans"])
            content["init_args"]["dataset_json"]["channel_names"] = {0: "MR"}
        torch.save(content, file)
    assert load_model(folder, device="cpu").folds == (0, 1, 2)


def test_intensities_that_normalise_and_the_order_of_regions_count(tmp_path: Path) -> None:
    plans = tiny_plans()
    _edit_plan(normalization_schemes=["CTNormalization"])(plans)
    folder = save_model(tmp_path / "m", plans, dataset_json(REGIONS))
    assert load_model(folder, device="cpu").folds == (0,)
    turned = dict(reversed(REGIONS.items()))
    (folder / "dataset.json").write_text(json.dumps({**dataset_json(REGIONS), "labels": turned}))
    assert "say: labels." in _refused(folder).message
    (folder / "dataset.json").write_text(json.dumps(dataset_json(REGIONS)))
    plans["foreground_intensity_properties_per_channel"]["0"]["mean"] = 77.0
    (folder / "plans.json").write_text(json.dumps(plans))
    assert "say: foreground_intensity_properties_per_channel." in _refused(folder).message


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [("trainer_name", "nnUNetTrainer_5epochs", "trainer"), ("inference_allowed_mirroring_axes", (0,), "mirror_axes")],
)
def test_folds_of_two_models(tmp_path: Path, key: str, value: Any, says: str) -> None:
    folder = save_model(tmp_path / "m", tiny_plans(), dataset_json(), folds=(0, 1))
    file = folder / "fold_1" / "checkpoint_final.pth"
    torch.save({**torch.load(file, weights_only=True), key: value}, file)
    error = _refused(folder)
    assert error.code == "E_MODEL_MISMATCH"
    assert "fold_1" in error.message
    assert f"{says} is" in error.message
    assert load_model(folder, (0,), device="cpu").folds == (0,)


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("trainer", ["nnUNetTrainer", "nnUNetTrainer_5epochs"])
def test_no_file_of_a_model_is_executed(tmp_path: Path, trainer: str) -> None:
    plans = tiny_plans()
    folder = save_model(tmp_path / "m", plans, dataset_json(), trainer=trainer)
    plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "os.system"
    (folder / "plans.json").write_text(json.dumps(plans))
    assert _refused(folder).code == "E_MODEL_UNSAFE"
    file = folder / "fold_0" / "checkpoint_final.pth"
    torch.save({**torch.load(file, weights_only=True), "extra": _Payload(tmp_path / "executed")}, file)
    assert _refused(folder).code == "E_MODEL_UNSAFE"
    assert not (tmp_path / "executed").exists()


def test_models_of_other_stock_trainers_load(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", tiny_plans(), dataset_json(), trainer="nnUNetTrainer_5epochs")
    x_CDHW = torch.randn(1, 16, 16, 16)
    expected = stock_predictor(folder).predict_logits_from_preprocessed_data(x_CDHW)
    assert torch.equal(load_model(folder, device="cpu").predict_logits(x_CDHW), expected)


def test_a_long_prediction_says_how_many_tiles_are_done(model_3d: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(progress, "say", said.append)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.01)
    model, mirrored, tiles = load_model(model_3d, (0, 1), device="cpu"), Model._mirrored, []

    def when_said(self: Model, *arguments: Any) -> torch.Tensor:
        until = time.monotonic() + 60
        while not any(f": {len(tiles) % 2} of 2 tiles" in m for m in said) and time.monotonic() < until:
            time.sleep(0.01)
        tiles.append(1)
        return mirrored(self, *arguments)

    monkeypatch.setattr(Model, "_mirrored", when_said)
    model.predict_logits(torch.randn(1, 16, 16, 24), what="case0")
    assert len(tiles) == 4
    assert said[0] == "case0, fold 1 of 2: 0 of 2 tiles"
    assert any(re.fullmatch(r"case0, fold 1 of 2: 1 of 2 tiles, about 0:\d\d:\d\d left", m) for m in said)


@torch.inference_mode()
def test_only_a_real_lack_of_memory_moves_the_logits_to_the_cpu(
    model_3d: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(model_3d, (0,), device="cpu")
    x_CDHW = torch.randn(1, 20, 16, 16)
    expected = model.predict_logits(x_CDHW, mirroring=False)
    accumulate, places = Model._accumulate, []

    def fails_on_the_gpu(self: Model, *arguments: Any) -> torch.Tensor:
        places.append(arguments[-1].type)
        if arguments[-1].type == "cuda":
            raise failure
        self.device = torch.device("cpu")
        return accumulate(self, *arguments)

    monkeypatch.setattr(Model, "_accumulate", fails_on_the_gpu)
    model.device, failure = torch.device("cuda"), torch.OutOfMemoryError("CUDA out of memory")
    assert torch.equal(model._slide(x_CDHW, 0.5, None), expected)
    assert places == ["cuda", "cpu"]
    assert model.oom_steps == ["logits accumulated on the CPU"]
    model.device, failure = torch.device("cuda"), RuntimeError("device-side assert")
    with pytest.raises(RuntimeError, match="assert"):
        model._slide(x_CDHW, 0.5, None)
    assert places == ["cuda", "cpu", "cuda"]


def test_lack_of_memory_on_the_cpu_is_not_retried(model_3d: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Model, *arguments: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Model, "_accumulate", fails)
    with pytest.raises(torch.OutOfMemoryError):
        load_model(model_3d, (0,), device="cpu").predict_logits(torch.randn(1, 16, 16, 16))


@pytest.mark.parametrize("value", [float("nan"), 1e5])
def test_logits_that_are_not_finite_are_refused(model_3d: Path, value: float) -> None:
    model = load_model(model_3d, (0,), device="cpu")
    for name, weights in model.weights[0].items():
        if name.startswith("decoder.seg_layers") and name.endswith("bias"):
            weights.fill_(value)  # 1e5 is finite but beyond half precision
    with pytest.raises(MFMError, match="E_NONFINITE"):
        model.predict_logits(torch.randn(1, 16, 16, 16))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_logits_on_the_gpu_are_those_of_stock(model_3d: Path) -> None:
    x_CDHW = torch.randn(1, 40, 29, 33)
    stock = stock_predictor(model_3d, (0, 1))
    stock.device, stock.perform_everything_on_device = torch.device("cuda"), True
    expected = stock.predict_logits_from_preprocessed_data(x_CDHW)
    logits = load_model(model_3d, (0, 1), device="cuda").predict_logits(x_CDHW)
    assert (logits.argmax(0) != expected.argmax(0)).sum() == 0
    assert torch.allclose(logits, expected, atol=1e-2)
