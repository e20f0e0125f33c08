"""The jobs as functions: plan and preprocess, pretrain, train, predict, checkpoints, studies. They raise, never exit.

This is where the parts are put together; each part knows only what the architecture test allows it to know.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mfm_nnunet import workspace as places
from mfm_nnunet.errors import CasesFailedError, MFMError, about, nearest
from mfm_nnunet.files import inside
from mfm_nnunet.images import decoder
from mfm_nnunet.jobs import plan as preparation
from mfm_nnunet.plan import read_plans
from mfm_nnunet.workspace import Workspace

if TYPE_CHECKING:
    from mfm_nnunet.jobs.plan import PlanResult
    from mfm_nnunet.jobs.predict import PredictReport

logger = logging.getLogger(__name__)


def plan_and_preprocess(
    datasets: Sequence[str | int],
    *,
    images: str | Path | None = None,
    name: str | None = None,
    configurations: Sequence[str] | None = None,
    network: str = "resenc",
    memory_gb: float | None = None,
    spacing: Literal["median", "onemm", "original"] | tuple[float, float, float] = "median",
    like: str | Path | None = None,
    plans_name: str | None = None,
    num_processes: int | None = None,
    workspace: str | Path | None = None,
    preprocess: bool = True,
) -> list[PlanResult]:
    """Plan and preprocess labelled datasets or unlabelled corpora; finished work is reused.

    ``images`` registers a corpus of scans that stay where they are: a folder tree, BIDS datasets, a CSV, nnssl's
    ``pretrain_data.json`` or an nnU-Net raw folder without labels; ``name`` is its name. ``spacing`` in mm, in
    nnU-Net's axis order (slices first: Z Y X). ``like`` is a pretrained checkpoint that the plan must fit.

    Raises MFMError for bad input (a labelled dataset with any bad case is refused, with the list of all of them), and
    CasesFailedError after finishing when single cases failed and were left out.
    """
    decoder.warm()
    from mfm_nnunet.interchange.read import find_checkpoint
    from mfm_nnunet.jobs.plan import check_request, plan
    from mfm_nnunet.planning.request import PlanRequest
    from mfm_nnunet.planning.table import format_table

    if images is not None and len(datasets) != 1:
        raise MFMError("E_CONFIG", "--images registers one corpus: give exactly one -d ID with it.")
    request = PlanRequest(
        network=network,
        memory_gb=memory_gb,
        spacing=spacing,
        plans_name=plans_name,
        like=find_checkpoint(like) if like else None,
        configurations=tuple(configurations) if configurations else None,
    )
    source = check_request(request)  # before hours of reading
    results, failures, num_cases = [], [], 0
    with places.use(workspace) as here:
        for dataset in datasets:
            dataset_name = preparation.registered(here, dataset, images, name)
            cases, failed = preparation.fingerprinted(here, dataset_name, num_processes)
            num_cases += len(cases) + len(failed)
            result = plan(here, dataset_name, request, source)
            logger.info("%s\n%s", dataset_name, format_table(result.decisions))
            logger.info("plan written to %s", result.file)
            if preprocess:
                failed += preparation.preprocess(
                    here, dataset_name, cases, result, request.configurations, num_processes
                )
            results.append(result)
            failures += failed
    if failures:
        raise CasesFailedError(failures, num_cases)
    return results


def pretrain(
    dataset: str | int,
    configuration: str,
    *,
    plans_name: str = "mfmPlans",
    pretext: str = "mae",
    settings: Sequence[str] = (),
    continue_training: bool = False,
    device: str = "auto",
    num_gpus: int = 1,
    workspace: str | Path | None = None,
    run_name: str | None = None,
    probe: str | int | None = None,
    recipe: str | Path | None = None,
) -> Path:
    """Pretrain the network of a plan without labels; returns the checkpoint ``checkpoint_final.pth`` of the run.

    ``pretext`` is the name of a pretext task or a dotted import path of a private one; ``settings`` are
    ``name=value`` strings such as ``pretrain.epochs=100``. ``run_name`` sets a run apart from others of the same plan
    and task. ``probe`` is a labelled dataset in nnU-Net's raw format: every few epochs its Dice says what the weights
    are worth so far. ``recipe`` is the name or file of a recipe, whose settings win over the plan's and lose against
    ``settings``. With ``num_gpus`` > 1 the run is started again under torchrun, one process per GPU.

    Raises MFMError for bad input, StoppedError after a clean save on a stop signal, FloatingPointError when the
    loss becomes non-finite.
    """
    from mfm_nnunet.jobs.pretrain import launch, pretrain_here

    with places.use(workspace) as here:
        arguments: dict[str, Any] = {
            "dataset_name": here.dataset_name(dataset),
            "configuration": configuration,
            "plans_name": plans_name,
            "pretext": pretext,
            "settings": (*_of_recipe(here, recipe, dataset, plans_name, pretext), *settings),
            "continue_training": continue_training,
            "device": device,
            "run_name": run_name,
            "probe": probe,
        }
        if num_gpus > 1:
            return launch(num_gpus, here, arguments)
        return pretrain_here(here, **arguments)


def train(
    dataset: str | int,
    configuration: str,
    fold: int | str,
    *,
    plans_name: str = "mfmPlans",
    trainer: str = "MFMTrainer",
    pretrained_weights: str | Path | None = None,
    settings: Sequence[str] = (),
    continue_training: bool = False,
    only_validate: bool = False,
    save_probabilities: bool = False,
    device: str = "auto",
    num_gpus: int = 1,
    workspace: str | Path | None = None,
    recipe: str | Path | None = None,
) -> Path:
    """Train a segmentation network, from a pretrained checkpoint or from scratch on the same schedule.

    Returns the fold's folder inside nnU-Net's model folder; ``recipe`` is as in :func:`pretrain`. Raises MFMError for
    bad input (also when less than half of the encoder's parameters match the checkpoint), StoppedError on SIGTERM or
    Ctrl-C, and FloatingPointError when the loss becomes non-finite.
    """
    from mfm_nnunet.interchange.read import find_checkpoint
    from mfm_nnunet.jobs.train import run_training

    with places.use(workspace) as here:
        return run_training(
            here,
            here.dataset_name(dataset),
            configuration,
            fold,
            plans_name=plans_name,
            trainer=trainer,
            pretrained_weights=find_checkpoint(pretrained_weights) if pretrained_weights else None,
            overrides=(*_of_recipe(here, recipe, dataset, plans_name, None), *settings),
            continue_training=continue_training,
            only_validate=only_validate,
            save_probabilities=save_probabilities,
            device=device,
            num_gpus=num_gpus,
        )


def predict(
    input_folder: str | Path,
    output_folder: str | Path,
    *,
    model_folder: str | Path | None = None,
    dataset: str | int | None = None,
    configuration: str | None = None,
    folds: Sequence[int | str] | None = None,
    plans_name: str = "mfmPlans",
    trainer: str = "MFMTrainer",
    checkpoint_name: str = "checkpoint_final.pth",
    step_size: float = 0.5,
    mirroring: bool = True,
    save_probabilities: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    previous_stage: str | Path | None = None,
    num_parts: int = 1,
    part_id: int = 0,
    device: str = "auto",
    workspace: str | Path | None = None,
) -> PredictReport:
    """Segment every case of a folder; masks have the exact geometry of their input.

    The model is a folder, or the dataset, configuration, plan and trainer that it was made with; ``folds`` None means
    all numbered folds that exist, else ``all``. An output folder that is not empty is refused unless ``overwrite`` or
    ``resume`` (which skips what this very model did already, and refuses masks of another). ``previous_stage`` holds
    the masks that a cascade starts from; ``part_id`` of ``num_parts`` shares a folder among processes.

    Raises MFMError for bad input and CasesFailedError after all good cases are done.
    """
    decoder.warm()
    from mfm_nnunet.jobs.predict import PredictOptions, predict_folder

    with places.use(workspace) as here:
        model = Path(model_folder) if model_folder else _model_folder(here, dataset, configuration, plans_name, trainer)
        options = PredictOptions(
            folds=tuple(folds) if folds is not None else None,
            checkpoint_name=checkpoint_name,
            step_size=step_size,
            mirroring=mirroring,
            save_probabilities=save_probabilities,
            overwrite=overwrite,
            resume=resume,
            previous_stage=Path(previous_stage) if previous_stage else None,
            num_parts=num_parts,
            part_id=part_id,
            device=device,
        )
        return predict_folder(model, Path(input_folder), Path(output_folder), options)


def describe_checkpoint(
    address: str | Path, *, verify: bool = False, token_order: Literal["whd", "hwd"] | None = None
) -> str:
    """What a checkpoint is, in lines: task, network, plan, corpus, licence, whom to cite; of any layout that we read.

    With ``verify`` its network is built and every tensor compared with it. ``token_order`` is for a foreign Primus
    whose file does not say it. Raises MFMError for a file that cannot be read, is damaged, or is no whole network.
    """
    from mfm_nnunet.interchange.folder import describe_text
    from mfm_nnunet.interchange.foreign import DESCRIBED, require_plan
    from mfm_nnunet.interchange.read import find_checkpoint, read_checkpoint
    from mfm_nnunet.interchange.verify import require_complete

    place = find_checkpoint(address)
    reading = read_checkpoint(place, token_order)
    with about(place):
        require_plan(reading, *DESCRIBED)
        if verify:
            require_complete(reading.content)
    return describe_text(reading)


def convert_checkpoint(
    address: str | Path,
    output: str | Path,
    *,
    layout: Literal["pth", "folder", "nnssl"] = "folder",
    licence: str | None = None,
    token_order: Literal["whd", "hwd"] | None = None,
) -> Path:
    """Write a checkpoint of any layout that we read in another one; returns ``output``.

    ``pth`` is our own file, ``folder`` safetensors with JSON and a model card, ``nnssl`` a folder that nnU-Net's
    development code reads. Raises MFMError as :func:`describe_checkpoint` does, E_EXISTS for an output that is there,
    E_CONFIG for a network that the layout cannot express.
    """
    from mfm_nnunet.interchange.read import convert, find_checkpoint

    place = find_checkpoint(address)
    with about(place):
        hub_address = str(address) if str(address).startswith("hf://") else None
        convert(place, Path(output), layout, licence, token_order, hub_address)
    return Path(output)


def _of_recipe(
    here: Workspace, name: str | Path | None, dataset: str | int, plans_name: str, pretext: str | None
) -> tuple[str, ...]:
    """The settings of a recipe as ``name=value``, checked; ``pretext`` is None for fine-tuning.

    Raises MFMError (E_CONFIG) that names the recipe's file for one that is made for something else or has a setting
    that does not exist.
    """
    if name is None:
        return ()
    from mfm_nnunet import settings as mfm_settings
    from mfm_nnunet.planning.recipes import read_recipe

    recipe = read_recipe(name)
    plans_file = here.plans_file(here.dataset_name(dataset), plans_name)
    block = mfm_settings.block_of(read_plans(plans_file, f"Plan {dataset} again."))
    command = "mfm_pretrain" if pretext else "mfm_train"
    recipe.require_for(command, pretext=pretext, network=block.network)
    run: Any = block
    if pretext:
        from mfm_nnunet.jobs.pretrain import PretrainRun
        from mfm_nnunet.tasks.base import find_task

        run = PretrainRun(block.pretrain, find_task(pretext).Config(), block.seed, block.num_workers)
    with about(recipe.file):
        mfm_settings.override(run, recipe.assignments)
    logger.info("recipe %s: %s", recipe.file.stem, recipe.about)
    return recipe.assignments


def _model_folder(
    here: Workspace, dataset: str | int | None, configuration: str | None, plans_name: str, trainer: str
) -> Path:
    if dataset is None or configuration is None:
        raise MFMError("E_CONFIG", "name the model: either -m MODEL_FOLDER, or -d DATASET and -c CONFIGURATION.")
    folder = inside(here.results, here.dataset_name(dataset), f"{trainer}__{plans_name}__{configuration}")
    if not folder.is_dir():
        existing = [entry.name for entry in folder.parent.glob("*__*__*")] if folder.parent.is_dir() else []
        advice = nearest(folder.name, existing) if existing else here.where_else("results")
        raise MFMError("E_NOT_FOUND", f"{folder}: no such model. {advice}")
    return folder
