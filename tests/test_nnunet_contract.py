"""What we rely on in nnunetv2, one fact per test, so that a new release fails precisely.

Facts that another test holds are not repeated here. ``documentation/reference/nnunet_surface.md`` lists the names
that we import. Whole runs in both directions are in ``tests/contract``.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from nnunetv2.experiment_planning.experiment_planners import default_experiment_planner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    ResEncUNetPlanner,
)
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset
from nnunetv2.preprocessing.resampling.utils import recursive_find_resampling_fn_by_name
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from mfm_nnunet import plan_rules
from mfm_nnunet.finetune.trainer import MFMTrainer
from mfm_nnunet.plan import NO_RESAMPLING
from mfm_nnunet.planning.planner import MFMPlanner
from mfm_nnunet.settings import MFMBlock, to_dict
from mfm_nnunet.workspace import Workspace, use
from setup_scripts.figures import Sources
from setup_scripts.write_reference import FAMILY, imports_of_nnunet
from tests.builders import tiny
from tests.builders.tiny_data import HIPPOCAMPUS, workspace_with
from tests.builders.tiny_plans import tiny_network

SOURCES = Sources()
CPU = torch.device("cpu")
NAME = "Dataset004_Planned"


# What we import, and what we pass


def our_calls() -> Iterator[tuple[str, str, int, list[str]]]:
    """Yield each call of an imported name: where, the dotted name, number of positional arguments, keywords."""
    for module, tree in SOURCES.trees.items():
        names = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in FAMILY
            for alias in node.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
                keywords = [keyword.arg for keyword in node.keywords if keyword.arg]
                num_positional = len([a for a in node.args if not isinstance(a, ast.Starred)])
                yield f"{module}:{node.lineno}", names[node.func.id], num_positional, keywords


def at(dotted: str) -> Any:
    """Return the object of that name, in nnunetv2 if no package is given; a method stands behind a colon."""
    path, _, method = dotted.partition(":")
    path = path if path.partition(".")[0] in FAMILY else f"nnunetv2.{path}"
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.import_module(path)
    module, _, attribute = path.rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    return getattr(found, method) if method else found


def test_names_are_still_there_and_take_what_we_pass() -> None:
    assert [name for name in imports_of_nnunet(SOURCES) if at(name) is None] == []
    num_calls = 0
    for where, name, num_positional, keywords in our_calls():
        try:
            inspect.signature(at(name)).bind_partial(*range(num_positional), **dict.fromkeys(keywords))
        except TypeError as error:
            raise AssertionError(f"{where}: {name}: {error}") from error
        num_calls += 1
    assert num_calls > 30


LABELS = "utilities.label_handling.label_handling.LabelManager"
READER = "imageio.base_reader_writer.BaseReaderWriter"
DATASETS = "training.dataloading.nnunet_dataset"
TRAINER = "training.nnUNetTrainer.nnUNetTrainer.nnUNetTrainer"
METHODS = [
    (f"{LABELS}:apply_inference_nonlin", 2, ""),
    (f"{LABELS}:convert_probabilities_to_segmentation", 2, ""),
    (f"{LABELS}:revert_cropping_on_probabilities", 4, ""),
    (f"{READER}:read_images", 2, ""),
    (f"{READER}:read_seg", 2, ""),
    (f"{READER}:write_seg", 4, ""),
    ("preprocessing.preprocessors.default_preprocessor.DefaultPreprocessor:_sample_foreground_locations", 2, ""),
    ("preprocessing.normalization.default_normalization_schemes.ImageNormalization:run", 3, ""),
    (f"{DATASETS}.nnUNetDatasetBlosc2:_select_filter", 5, ""),
    (f"{DATASETS}.nnUNetBaseDataset:load_case", 2, ""),
    (f"{DATASETS}.nnUNetDatasetBlosc2:save_seg", 4, ""),
    (f"{DATASETS}.nnUNetDatasetNumpy:unpack_dataset", 1, "overwrite_existing num_processes verify"),
    (f"{TRAINER}:get_training_transforms", 5, "use_mask_for_norm is_cascaded foreground_labels regions ignore_label"),
    (f"{TRAINER}:get_validation_transforms", 1, "is_cascaded foreground_labels regions ignore_label"),
]
"""Method, number of positional arguments that we give (with the object), and names of the keywords."""


def test_methods_take_what_we_pass() -> None:
    for name, num_positional, keywords in METHODS:
        inspect.signature(at(name)).bind(*range(num_positional), **dict.fromkeys(keywords.split()))


# What we read


def attributes(*names: str, within: str = "", inside: str | None = None) -> set[str]:
    """The attributes that our code takes of variables (or attributes) with one of these names.

    Only modules whose path starts with ``within``, and only in the class ``inside`` if one is given.
    """
    found = set()
    for tree in (tree for module, tree in SOURCES.trees.items() if module.startswith(within)):
        roots: list[ast.AST] = [
            node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == inside
        ]
        for root in roots if inside else [tree]:
            for node in ast.walk(root):
                if isinstance(node, ast.Attribute):
                    owner = getattr(node.value, "id", getattr(node.value, "attr", ""))
                    found |= {node.attr} if owner in names else set()
    return found


@pytest.mark.parametrize(
    ("variable", "stock"),
    [
        ("configuration_manager", lambda: ConfigurationManager(tiny.configuration(tiny.resenc()))),
        ("plans_manager", lambda: PlansManager(tiny.plans())),
        ("label_manager", lambda: LabelManager({"background": 0, "a": 1}, None)),
    ],
)
def test_stocks_views_of_a_plan_have_what_we_read(variable: str, stock: Callable[[], object]) -> None:
    made = stock()
    assert [name for name in attributes(variable) if not hasattr(made, name)] == []


def test_planners_module_has_what_we_replace() -> None:
    names = attributes("stock", within="planning.planner")
    assert [name for name in names if not hasattr(default_experiment_planner, name)] == []


# The trainer


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("contract")
    tiny.make(root)
    return root


def stock_trainer(**changes: Any) -> nnUNetTrainer:
    plans = {**tiny.plans(), "continue_training": False, **changes}
    dataset_json = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}
    with contextlib.redirect_stdout(io.StringIO()):
        return nnUNetTrainer(plans, "3d_fullres", 0, dataset_json, CPU)


@pytest.fixture(scope="module")
def trainer(workspace: Path) -> nnUNetTrainer:
    """Stock's trainer, initialised: attributes are looked up in it, so it must not be ours."""
    with use(workspace):
        made = stock_trainer()
        made.initialize()
    return made


OWN = {
    "autocast_dtype", "block", "make_checkpoint", "make_engine", "new_weights", "optimisation", "prepare",
    "pretrained_checkpoint", "settings", "split", "task", "union", "unlabelled", "watch", "_first_weight", "_start",
    "_transfer",
}  # fmt: skip
"""What MFMTrainer adds. Everything else that it uses, or sets, must be stock's, or setting it would do nothing."""

CALLED_BY_JOBS = {"rehearse"}

OF_TRAINERS = attributes("self", within="finetune.trainer", inside="MFMTrainer") | attributes(
    "trainer", within="finetune."
)


OF_PLANNERS = attributes("self", within="planning.planner", inside="MFMPlanner")
OWN_OF_PLANNER = {
    "budget", "explain", "has_masks", "is_corpus", "is_mixed", "is_original_spacing", "family", "planned", "plans_file",
    "preset",
    "modality", "pet", "settings", "slice_axis", "source", "spacing", "union", "variant", "wanted", "_apply", "_block",
    "_choose_axis_order",
    "_explain_configuration", "_is_sliced", "_like", "_merge", "_require_memory", "_sizing",
}  # fmt: skip


def test_stocks_trainer_has_what_we_use_and_our_names_are_free(trainer: nnUNetTrainer) -> None:
    assert [name for name in sorted(OF_TRAINERS - OWN) if not hasattr(trainer, name)] == []
    assert not [name for name in OWN if hasattr(trainer, name)]
    assert OWN <= OF_TRAINERS, "remove what is not used any more"


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_overrides_are_called_by_stock() -> None:
    """A method that stock renamed or gave other parameters would silently never be called, or fail when it is."""
    for ours, own in ((MFMTrainer, OWN | CALLED_BY_JOBS), (MFMPlanner, OWN_OF_PLANNER)):
        stock = ours.__mro__[1]
        for name in (name for name, value in vars(ours).items() if inspect.isfunction(value) and name not in own):
            assert hasattr(stock, name), name
            assert parameters(getattr(ours, name)) == parameters(getattr(stock, name)), name


def test_trainer_takes_no_further_parameter(workspace: Path) -> None:
    """Why settings come with the plan: the base looks its subclass's parameters up among its own variables."""

    class Sixth(nnUNetTrainer):
        def __init__(
            self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device, mine: int = 1
        ) -> None:
            super().__init__(plans, configuration, fold, dataset_json, device)

    with use(workspace), contextlib.redirect_stdout(io.StringIO()), pytest.raises(KeyError, match="mine"):
        Sixth({**tiny.plans(), "continue_training": False}, "3d_fullres", 0, {"labels": {"background": 0, "a": 1}}, CPU)


def test_network_is_built_from_the_plan_by_a_static_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the form with the plan: the predictor asks for that parameter by name; and ours calls stock's."""
    names = "plans_manager configuration_manager num_input_channels num_output_channels enable_deep_supervision"
    for trainer in (MFMTrainer, nnUNetTrainer):
        assert isinstance(vars(trainer)["build_network_architecture"], staticmethod)
        assert parameters(trainer.build_network_architecture) == names.split()
    network, given = tiny_network("resenc", (16, 16, 16)), []
    monkeypatch.setattr(nnUNetTrainer, "build_network_architecture", lambda *given_: given.append(given_) or network)
    manager = ConfigurationManager(tiny.configuration(tiny.resenc()))
    assert MFMTrainer.build_network_architecture(1, manager, 3, 4, False) is network  # type: ignore[arg-type]
    assert given == [(1, manager, 3, 4, False)]


def test_block_survives_the_views_of_a_plan(workspace: Path) -> None:
    """Checkpoints and model folders are written from them."""
    block = to_dict(MFMBlock())
    with use(workspace):
        assert PlansManager({**tiny.plans(), "mfm": block}).plans["mfm"] == block
        assert stock_trainer(mfm=block).plans_manager.plans["mfm"] == block


def test_deep_supervision_is_a_switch_of_the_decoder(trainer: nnUNetTrainer) -> None:
    trainer.set_deep_supervision_enabled(False)
    assert trainer.network.decoder.deep_supervision is False
    trainer.set_deep_supervision_enabled(True)
    assert trainer.network.decoder.deep_supervision is True


def test_trainers_that_are_none_raise_what_we_catch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is how we tell a name that is not there from our own errors."""
    (tmp_path / "theirs.py").write_text("class NoTrainer:\n    pass\n")
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    with contextlib.redirect_stdout(io.StringIO()):
        with pytest.raises(RuntimeError, match="nnUNetTrainr"):
            recursive_find_trainer_class_by_name("nnUNetTrainr")
        with pytest.raises(AssertionError, match="must inherit"):
            recursive_find_trainer_class_by_name("NoTrainer")


def test_logger_keeps_what_we_report_and_save(trainer: nnUNetTrainer) -> None:
    names = {
        "epoch_start_timestamps", "epoch_end_timestamps", "train_losses", "val_losses", "dice_per_class_or_region",
        "ema_fg_dice",
    }  # fmt: skip
    assert names <= set(trainer.logger.get_checkpoint())
    assert callable(trainer.logger.load_checkpoint)
    assert callable(trainer.logger.plot_progress_png)


# The planner


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Workspace]:
    """A dataset of a fingerprint and empty files, which is all that planning looks at."""
    with workspace_with(tmp_path, NAME, **HIPPOCAMPUS) as workspace:
        yield workspace


def test_planner_lists_files_by_the_name_that_we_replace(here: Workspace) -> None:
    """Stock's own listing starts twelve processes and knows no corpora."""
    name = "get_filenames_of_train_images_and_targets"
    with mock.patch.object(default_experiment_planner, name, return_value={"x": {}}):
        assert ResEncUNetPlanner(NAME).dataset == {"x": {}}


def test_planner_reads_json_by_the_name_that_we_replace(here: Workspace) -> None:
    """Stock reads no byte order mark, and channels in the order of their lines."""
    with mock.patch.object(default_experiment_planner, "load_json", side_effect=KeyError), pytest.raises(KeyError):
        ResEncUNetPlanner(NAME)


SCHEMES = "preprocessing.normalization.default_normalization_schemes"


def test_plans_may_name_what_nnunet_has() -> None:
    """The lists of :mod:`mfm_nnunet.plan_rules` hold the readers, normalisations and resampling of nnU-Net."""
    readers, schemes = at("imageio.base_reader_writer.BaseReaderWriter"), at(f"{SCHEMES}.ImageNormalization")
    for name in ("simpleitk", "nibabel", "tif", "natural_image"):
        importlib.import_module(f"nnunetv2.imageio.{name}_reader_writer")
    assert {cls.__name__ for cls in subclasses(readers)} == set(plan_rules.READERS)
    assert {cls.__name__ for cls in subclasses(schemes)} == set(plan_rules.NNUNETS)
    for function, arguments in plan_rules.RESAMPLING_FUNCTIONS.items():
        found = inspect.signature(recursive_find_resampling_fn_by_name(function)).parameters
        assert list(found)[:4] == ["data", "new_shape", "current_spacing", "new_spacing"]
        assert set(arguments) == set(list(found)[4:])


def subclasses(cls: type) -> set[type]:
    """All classes of nnU-Net below one."""
    found = {child for child in cls.__subclasses__() if child.__module__.startswith("nnunetv2.")}
    return found.union(*(subclasses(child) for child in found))


def test_planner_knows_what_we_set(here: Workspace) -> None:
    stock = ResEncUNetPlanner(NAME)
    assert [name for name in sorted(OF_PLANNERS - OWN_OF_PLANNER) if not hasattr(stock, name)] == []
    assert [name for name in sorted(OWN_OF_PLANNER) if hasattr(stock, name)] == []
    assert OWN_OF_PLANNER - OF_PLANNERS - set(vars(MFMPlanner)) == set(), "remove what is not used any more"


@pytest.mark.parametrize("value", ["1", "2"])
def test_stock_plans_with_our_class_on_one_core(
    here: Workspace, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    """With as many or more augmentation processes than cores; stock sets torch's threads to that number."""
    monkeypatch.setenv("nnUNet_n_proc_DA", value)
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        plans, _ = plan_experiment_dataset(NAME, MFMPlanner)  # type: ignore[arg-type]
    finally:
        os.sched_setaffinity(0, cores)
    assert plans["mfm"]["format"] == 1
    assert torch.get_num_threads() == threads


# Preprocessing and data


def test_no_resampling_returns_what_it_gets() -> None:
    function = recursive_find_resampling_fn_by_name(NO_RESAMPLING)
    x_CDHW = np.random.default_rng(0).normal(size=(1, 3, 4, 5)).astype(np.float32)
    assert function(x_CDHW, (3, 4, 5), (2.0, 1.0, 1.0), (1.0, 1.0, 1.0)) is x_CDHW


def test_our_folder_is_recognised_beside_its_manifest(workspace: Path, tmp_path: Path) -> None:
    """Any other file inside would make stock refuse the folder: that is why the manifest lies outside."""
    data = workspace / "nnUNet_preprocessed" / tiny.NAME / "mfm_tiny"
    assert infer_dataset_class(str(data)) is nnUNetDatasetBlosc2
    (tmp_path / "a.b2nd").touch()
    (tmp_path / "mfm.jsonl").touch()
    with pytest.raises(AssertionError):
        infer_dataset_class(str(tmp_path))


def test_file_without_label_is_a_case_to_stock(tmp_path: Path) -> None:
    """Half-written cases would be trained on: that is why ours appear whole, the image last."""
    (tmp_path / "case.b2nd").touch()
    assert nnUNetDatasetBlosc2.get_identifiers(str(tmp_path)) == ["case"]
    (tmp_path / "other.pkl").touch()
    (tmp_path / "other_seg.b2nd").touch()
    assert nnUNetDatasetBlosc2.get_identifiers(str(tmp_path)) == ["case"]


# What stays light


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys; import mfm_nnunet; mfm_nnunet.__version__; "
        "sys.exit(', '.join({'torch', 'timm', 'numpy', 'nnunetv2'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr


def test_environment_is_read_when_it_is_needed(workspace: Path) -> None:
    """Our context manager sets the folders around a call, after nnunetv2 was imported."""
    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results

    with use(workspace) as here:
        found = [str(folder) for folder in (nnUNet_raw, nnUNet_preprocessed, nnUNet_results)]
    assert found == [str(here.raw), str(here.preprocessed), str(here.results)]
    assert not nnUNet_raw.is_set()
