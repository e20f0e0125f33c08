"""Low-rank adapters and averaged weights: what is shipped is plain and is what was validated; resuming is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.logging.nnunet_logger import MetaLogger

from mfm_nnunet import checkpoint
from mfm_nnunet.finetune import groups
from mfm_nnunet.finetune.trainer import MFMTrainer
from mfm_nnunet.models.families import family_of
from mfm_nnunet.prediction.model import load_model
from mfm_nnunet.workspace import Workspace, use
from tests.builders import tiny
from tests.builders.training import (
    Killed,
    first_batches,
    initialised,
    kill_at,
    pretrained_file,
    refused,
    require_equal,
    state_of,
    take_step,
    train,
)
from tests.models.test_transfer import primus

SHORT = (
    *("finetune.epochs=3", "finetune.iterations_per_epoch=2", "finetune.validation_iterations=1", "num_workers=0"),
    *("finetune.optimizer=adamw", "finetune.learning_rate=1e-3"),
)
LORA = ("finetune.train=lora", "finetune.lora_rank=2", "finetune.lora_alpha=4")
EMA = ("finetune.ema_decay=0.5",)


def with_adapters(seed: int = 3) -> torch.nn.Module:
    """A Primus whose adapters are not at their start."""
    network = primus()
    groups.add_adapters(network, 2, 4.0)
    torch.manual_seed(seed)
    parameters = dict(network.named_parameters())
    for name in sorted(groups.adapter_names(network)):
        torch.nn.init.normal_(parameters[name], std=0.2)
    return network.eval()


# Adapters


def test_at_first_the_network_is_the_pretrained_one() -> None:
    x, network = torch.randn(1, 1, 16, 16, 16), primus().eval()
    before = network(x)
    groups.add_adapters(network, 2, 4.0)
    assert torch.equal(network(x), before)


def test_merged_weights_are_the_adapted_network_under_its_own_names() -> None:
    adapted, plain = with_adapters(), primus(seed=9).eval()
    merged = groups.merged_state(adapted)
    assert merged.keys() == plain.state_dict().keys()
    plain.load_state_dict(merged)
    x = torch.randn(1, 1, 16, 16, 16)
    assert torch.allclose(plain(x), adapted(x), atol=1e-6)
    original = primus().state_dict()
    assert not torch.allclose(original["eva.blocks.0.attn.proj.weight"], merged["eva.blocks.0.attn.proj.weight"])
    weight = original["eva.blocks.0.mlp.fc2.weight"]
    adapter = adapted.get_submodule("eva.blocks.0.mlp.fc2.parametrizations.weight.0")
    expected = weight + 4 / 2 * adapter.up @ adapter.down
    assert torch.allclose(merged["eva.blocks.0.mlp.fc2.weight"], expected, atol=1e-6)


def test_mixed_precision_does_not_round_what_is_added() -> None:
    adapted = with_adapters()
    layer = adapted.get_submodule("eva.blocks.0.attn.proj")
    outside = layer.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight, outside)


def test_attention_and_mlp_have_adapters_and_nothing_else() -> None:
    network = with_adapters()
    layers = {name.partition(".parametrizations")[0] for name in groups.adapter_names(network)}
    attention = {f"eva.blocks.0.attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "proj")}
    assert attention < layers
    assert {name.rpartition(".")[2] for name in layers - attention} == {"fc1_g", "fc1_x", "fc2"}
    assert groups.adapter_names(primus()) == set()


def trainer_with(tmp_path: Path, **changes: Any) -> MFMTrainer:
    file = pretrained_file(tmp_path, tiny.drop_path_primus())
    return initialised("primus", file, learning_rate=1e-2, optimizer="adamw", **changes)


def test_only_adapters_and_decoder_learn(here: Workspace, tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path, train="lora", lora_rank=2, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    batch = next(first_batches(trainer))
    for _ in range(2):  # with B at zero, A has no gradient in the first step
        take_step(trainer, batch)
    moved = {name for name, p in trainer.network.named_parameters() if not torch.equal(before[name], p)}
    adapters = groups.adapter_names(trainer.network)
    of_encoder = family_of(trainer.network).encoder_names(trainer.network)
    assert moved & of_encoder <= adapters
    assert moved - of_encoder == before.keys() - of_encoder
    assert len(adapters - moved) <= len(adapters) / 2  # drop path may leave a block out
    encoder = sum(before[name].numel() for name in of_encoder - adapters)
    assert sum(before[name].numel() for name in adapters) < 0.5 * encoder
    shipped = trainer.make_checkpoint()["network_weights"]
    plain = initialised("primus")
    assert shipped.keys() == plain.network.state_dict().keys()


# Runs


def run(here: Workspace, *settings: str, configuration: str = "primus", **options: Any) -> Path:
    return train(here, *settings, configuration=configuration, **options)


@pytest.mark.parametrize(("settings", "configuration"), [(EMA, "3d_fullres"), ((*LORA, *EMA), "primus")])
def test_resuming_is_exact(
    here: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...], configuration: str
) -> None:
    file = pretrained_file(tmp_path, tiny.drop_path_primus() if configuration == "primus" else None)
    folder = run(here, *SHORT, *settings, configuration=configuration, pretrained_weights=file)
    wanted = state_of(folder)
    folder.parent.rename(here.results / "unbroken")
    with monkeypatch.context() as patch:
        kill_at(patch, 4)  # the first step of the third epoch
        with pytest.raises(Killed):
            run(here, *SHORT, *settings, configuration=configuration, pretrained_weights=file)
    run(here, configuration=configuration, continue_training=True)
    require_equal(state_of(folder), wanted)
    model = load_model(folder.parent, device="cpu")  # as prediction reads it: plain names, nothing missing
    model.network.load_state_dict(model.weights[0])
    content = checkpoint.load(folder / "checkpoint_final.pth")
    assert not torch.equal(*(first(content[key]) for key in ("network_weights", "trained_weights")))
    del content["trained_weights"]
    checkpoint.save(content, folder / "checkpoint_final.pth")
    refused(
        "E_MODEL_CORRUPT", "trained_weights", lambda: run(here, configuration=configuration, continue_training=True)
    )


def test_the_stock_predictor_gives_the_masks_that_were_validated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters and average together: merged and averaged weights, without mirroring, loaded by stock nnU-Net."""
    monkeypatch.setattr(MetaLogger, "plot_progress_png", lambda *args: None)
    tiny.make(tmp_path)
    file = pretrained_file(tmp_path, tiny.drop_path_primus())
    with use(tmp_path) as here:
        folder = run(here, *SHORT, *LORA, *EMA, "finetune.mirroring=false", pretrained_weights=file)
        predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(folder.parent), (0,))
        assert predictor.allowed_mirroring_axes is None
        data = nnUNetDatasetBlosc2(str(here.preprocessed / tiny.NAME / "mfm_tiny"))
    masks = sorted((folder / "validation").glob("*.nii.gz"))
    assert len(masks) == 2
    for mask_file in masks:
        image = data.load_case(mask_file.name.removesuffix(".nii.gz"))[0][:]
        predictor.network.load_state_dict(predictor.list_of_parameters[0])
        mask = predictor.predict_sliding_window_return_logits(torch.from_numpy(image)).argmax(0).numpy()
        assert (mask == sitk.GetArrayFromImage(sitk.ReadImage(str(mask_file)))).all()


def first(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """A weight that adapters or the average change."""
    names = ("eva.blocks.0.attn.proj.weight", "eva.blocks.0.attn.proj.parametrizations.weight.original")
    return next(weights[name] for name in (*names, "encoder.stem.convs.0.conv.weight") if name in weights)


def test_the_average_is_validated_and_shipped(here: Workspace, tmp_path: Path) -> None:
    trainer = initialised(ema_decay=0.9)
    weight = next(trainer.network.parameters())
    expected = weight.detach().clone()
    training, engine = first_batches(trainer), trainer.make_engine()
    for step in range(3):
        engine.step(next(training), step)
        expected = expected + (1 - min(0.9, (1 + step) / (10 + step))) * (weight.detach() - expected)
    raw = weight.detach().clone()
    with trainer.optimisation.averaged():
        assert torch.allclose(weight, expected, atol=1e-7)
    seen = []
    trainer.network.register_forward_pre_hook(lambda *_: seen.append(weight.detach().clone()))
    engine._run.training_batches(0)
    engine.validate(0)
    assert torch.allclose(seen[0], expected, atol=1e-7)
    assert torch.equal(weight, raw)
    content = trainer.make_checkpoint()
    name = next(iter(dict(trainer.network.named_parameters())))
    assert torch.allclose(content["network_weights"][name], expected, atol=1e-7)
    assert torch.equal(content["trained_weights"][name], raw)


def test_the_average_keeps_still_what_waits(here: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = pretrained_file(tmp_path)
    name, shipped = "encoder.stem.convs.0.conv.weight", {}
    save = MFMTrainer.save_checkpoint

    def recording(self: MFMTrainer, filename: str) -> None:
        shipped[self.current_epoch] = self.make_checkpoint()["network_weights"][name].clone()
        save(self, filename)

    monkeypatch.setattr(MFMTrainer, "save_checkpoint", recording)
    sawtooth = ("finetune.schedule=sawtooth", "finetune.decoder_epochs=2", "finetune.warmup_epochs=0")
    run(here, *SHORT, *sawtooth, *EMA, configuration="3d_fullres", pretrained_weights=file)
    source = checkpoint.load_weights(file)["network_weights"][name]
    assert [torch.equal(shipped[epoch], source) for epoch in (0, 1, 2)] == [True, True, False]
