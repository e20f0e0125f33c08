"""Teachers, pseudo labels and a student: the phases before a student trains as any other fold.

The teachers and the students of earlier rounds are ordinary runs, in ``teachers`` and ``rounds`` of the student's
folder. Each phase skips what is finished and resumes what is not.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from mfm_nnunet.checkpoint import load_weights
from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.corpus import load_cases
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import atomic_write, inside, read_json, write_json
from mfm_nnunet.finetune import pseudo_labels
from mfm_nnunet.finetune.pseudo_labels import JOURNAL, RANKING, TABLE, WEAK_DICE, Labelling, Used
from mfm_nnunet.images import decoder
from mfm_nnunet.plan import Plan
from mfm_nnunet.prediction.export import Managers
from mfm_nnunet.prediction.model import Model, load_model
from mfm_nnunet.requests import TrainRequest
from mfm_nnunet.settings import MFMBlock, SemiSettings, from_dict, override, to_dict
from mfm_nnunet.workspace import Workspace, results_in

if TYPE_CHECKING:
    from mfm_nnunet.jobs.train import Inputs, Job

TEACHERS, ROUNDS, LABELS, CORRECTED = "teachers", "rounds", "pseudo_labels", "corrected"
MANY = 8
"""Labelled cases from which on each teacher leaves some out: one in MANY."""
_CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")

Check = Callable[[Workspace, "Inputs"], "Job"]
Run = Callable[[Workspace, "Inputs", Mapping[str, Any]], Path]
"""Train and validate a fold, with some parts of its job changed; returns its folder."""

logger = logging.getLogger(__name__)


def label_only(here: Workspace, inputs: Inputs, check: Check, run: Run) -> Path | None:
    """Only label and rank the unlabelled images, and return the folder; None unless semi.rounds=0 asks for it."""
    semi, request = override(inputs.plan.mfm, inputs.overrides).semi, inputs.request
    if semi.method != "student" or semi.rounds:
        return None
    name = f"{LABELS}__{inputs.plan.name}__{request.configuration}__fold_{request.fold}"
    folder = inside(here.results, inputs.plan.dataset_name, name)
    with results_in(here, folder / "runs") as there:
        job = check(there, replace(inputs, request=replace(request, continue_training=False)))
        teaching = _Teaching(there, inputs, replace(job, folder=folder), run)
        teaching.label(folder, teaching.teachers(), {})
    return folder


def teach(here: Workspace, inputs: Inputs, job: Job, run: Run) -> Job:
    """Return the job of a student with its pseudo labels, after all phases before; other jobs are returned unchanged.

    Raises MFMError: E_CONFIG for settings or pseudo labels that differ from those the student began with, a teacher
    that predicts nothing, and flags of a student in another run; those of corrected masks.
    """
    semi = from_dict(MFMBlock, job.plans["mfm"]).semi
    given = {"--teachers": inputs.request.teachers, "--pseudo-labels": inputs.request.pseudo_labels}
    if semi.method != "student":
        if flags := [flag for flag, value in given.items() if value]:
            raise MFMError(
                "E_CONFIG", f"{flags[0]} belongs to --unlabelled with --set semi.method=student. Leave it out."
            )
        return job
    epochs = from_dict(MFMBlock, job.plans["mfm"]).finetune.epochs
    is_finished = job.start_from is not None and load_weights(job.start_from).get("current_epoch", 0) >= epochs
    if is_finished or inputs.request.only_validate or job.unlabelled is None or not semi.weight:
        return job
    if (file := job.folder / f"{ROUNDS}.json").is_file():  # of a finished student that is to train on
        if (chosen := read_json(file, "Move the folder away and train again.")["result"]) != semi.rounds:
            text = f"{job.folder}: its result is the student of round {chosen}, and only the last round's can train on."
            raise MFMError("E_CONFIG", f"{text} Move the folder away and train a new one.")
        file.unlink()
    used = _Teaching(here, inputs, job, run).work(semi.rounds)
    return replace(job, unlabelled=used.unlabelled)


def keep_better_round(job: Job) -> None:
    """Make the student of the round that validated best the result of its fold, and write ``rounds.json``.

    The last round's student then lies in ``rounds``, as the others do. It stays the result of a tie, and where a round
    was not validated. Interrupted, it is repeated when the finished fold is continued.
    """
    folder, file = job.folder, job.folder / f"{ROUNDS}.json"
    places = {int(fold.parts[-4]): fold for fold in (folder / ROUNDS).glob("*/*/*/fold_*")}
    if not places or file.is_file() or job.request.only_validate:
        return
    last = max(places) + 1
    own = folder / ROUNDS / str(last)
    places[last] = own if (own / _CHECKPOINTS[0]).is_file() else folder
    dice = {number: _validation_dice(place) for number, place in sorted(places.items())}
    best = last if any(map(math.isnan, dice.values())) else max(reversed(dice), key=dice.__getitem__)
    if best != last:
        if places[last] is folder:
            _copy_model(folder, own)
        _copy_model(places[best], folder)
    write_json(file, {"validation_dice": {n: None if math.isnan(d) else d for n, d in dice.items()}, "result": best})
    scores = ", ".join(f"round {number} {_format_dice(value)}" for number, value in dice.items())
    kept = f"round {last} did not raise it, and is kept in {own}" if best != last else "the last round's is kept"
    logger.info("validation Dice of the students: %s. The result is that of round %d: %s", scores, best, kept)


def _copy_model(source: Path, target: Path) -> None:
    """Copy a student with its validation; the checkpoint comes last."""
    if (source / "validation").is_dir():
        shutil.copytree(source / "validation", target / "validation", dirs_exist_ok=True)
    target.mkdir(exist_ok=True)
    with open(source / _CHECKPOINTS[0], "rb") as content, atomic_write(target / _CHECKPOINTS[0]) as handle:
        shutil.copyfileobj(content, handle)


@dataclass
class _Teaching:
    """The phases before a student, in order."""

    here: Workspace
    inputs: Inputs
    job: Job
    run: Run

    def __post_init__(self) -> None:
        decoder.warm()
        self.block = from_dict(MFMBlock, self.job.plans["mfm"])
        self.folder = self.job.folder
        manager = PlansManager(dict(Plan.of(self.job.plans).content))
        configuration = manager.get_configuration(self.inputs.request.configuration)
        self.managers: Managers = manager, configuration, manager.get_label_manager(self.job.dataset_json)
        self.given = Path(self.inputs.request.pseudo_labels) if self.inputs.request.pseudo_labels else None
        self.is_labelled = self.given is not None and (self.given / JOURNAL).is_file()
        lost = self.job.start_from is None and self.inputs.weights is None and self.block.finetune.checkpoint
        if lost and not self.is_labelled:
            raise MFMError(
                "E_CONFIG",
                f"{self.folder}: the teachers and the student start from {lost['name']}. Give it again with "
                "-pretrained_weights.",
            )

    def work(self, rounds: int) -> Used:
        """Label the images, in the second round with the help of a first student; return what the student learns."""
        if rounds > 1 and self.is_labelled and not self.inputs.request.teachers:
            raise MFMError(
                "E_CONFIG",
                f"semi.rounds={rounds}: the second round needs the teachers of {self.given}. Add --teachers with their "
                "model folders, or leave semi.rounds out.",
            )
        self._require_the_same_source()
        teachers = [] if self.is_labelled and rounds == 1 else self.teachers()
        corrections: dict[str, Path] = {}
        for number in range(1, rounds + 1):
            own = self.folder / LABELS / f"round_{number}"
            used = self.label(
                self.given if self.given and self.is_labelled and number == 1 else own, teachers, corrections
            )
            if number < rounds:
                with results_in(self.here, self.folder / ROUNDS / str(number)) as there:
                    folder = self._train(there, self.block, {"unlabelled": used.unlabelled})
                logger.info(
                    "the student of round %d: validation Dice %s", number, _format_dice(_validation_dice(folder))
                )
                teachers = [*teachers, *load_teachers([folder.parent], self.job.device)]
        self._require_the_same(used)
        return used

    def teachers(self) -> list[Model]:
        """Return the teachers: the folds of the given models, or models trained here."""
        if self.inputs.request.teachers:
            folders = [Path(folder) for folder in self.inputs.request.teachers]
            found = load_teachers(folders, self.job.device)
            self._require_fitting(found, folders)
        else:
            folders = [self._teacher(number) for number in range(self.block.semi.teachers)]
            found = load_teachers(folders, self.job.device)
        if len(found) < 2:
            raise MFMError(
                "E_CONFIG",
                f"--teachers {folders[0]}: one model alone cannot disagree. Give at least two folds or model folders.",
            )
        for fold in sorted({fold for folder in folders for fold in folder.glob("fold_*")}):
            _warn_of_weakness(fold, _validation_dice(fold))
        return found

    def _teacher(self, number: int) -> Path:
        """Train a teacher, or resume it, and return its model folder."""
        share, finetune = self.block.semi.teacher_share, self.block.finetune
        epochs = max(1, round(finetune.epochs * share))
        scaled: dict[str, Any] = {"epochs": epochs, "mix_start": math.floor(finetune.mix_start * share)}
        scaled["warmup_epochs"] = None if finetune.warmup_epochs is None else round(finetune.warmup_epochs * share)
        if finetune.decoder_epochs is not None:
            scaled["decoder_epochs"] = max(2, round(finetune.decoder_epochs * share))
        seed = (1000 * (self.block.seed + 1) + number) % 2**32
        block = replace(self.block, finetune=replace(finetune, **scaled), semi=SemiSettings(), seed=seed)
        names = sorted(self.job.split["train"])
        if len(names) >= MANY:
            names = [name for place, name in enumerate(names) if place % MANY != number % MANY]
        logger.info("teacher %d of %d: %d epochs", number + 1, self.block.semi.teachers, epochs)
        with results_in(self.here, self.folder / TEACHERS / str(number + 1)) as there:
            return self._train(there, block, {"split": {**self.job.split, "train": names}}).parent

    def _train(self, there: Workspace, block: MFMBlock, changes: Mapping[str, Any]) -> Path:
        """Train a fold with resolved settings in the results ``there``, unless that is finished."""
        request, plan = self.inputs.request, self.inputs.plan
        model = f"MFMTrainer__{plan.name}__{request.configuration}"
        folder = inside(there.results, plan.dataset_name, model, f"fold_{request.fold}")
        if (folder / _CHECKPOINTS[0]).is_file() and (folder / "validation" / "summary.json").is_file():
            return folder
        begun = any((folder / name).is_file() for name in _CHECKPOINTS)
        corpus = request.unlabelled if block.semi.method else None
        own: TrainRequest = replace(
            request, settings=(), recipe=None, unlabelled=corpus, teachers=None, pseudo_labels=None,
            continue_training=begun, save_probabilities=False,
        )  # fmt: skip
        resolved = Plan.of({**plan.content, "mfm": to_dict(block)})
        return self.run(there, replace(self.inputs, request=own, plan=resolved, overrides=()), changes)

    def label(self, folder: Path, teachers: Sequence[Model], corrections: dict[str, Path]) -> Used:
        """Label the images into ``folder``, unless they are labelled; read corrected masks, and write the tables.

        ``corrections`` of earlier rounds are kept, and new ones are added to them.
        """
        images, sources = self.job.unlabelled, self._find_sources()
        assert images is not None, "the job has unlabelled images"
        is_given = self.is_labelled and folder == self.given
        if not is_given:
            data = inside(self.here.preprocessed, self.inputs.plan.dataset_name, self.managers[1].data_identifier)
            labelled = {name: data / f"{name}.b2nd" for name in self.job.split["train"]}
            known = {name: file for name, file in labelled.items() if file.is_file()}
            Labelling(teachers, images, sources, folder, known).run()
        entries, ending = pseudo_labels.read_entries(folder), self.job.dataset_json["file_ending"]
        extra = [self.given] if self.given is not None and not is_given else []
        corrections |= pseudo_labels.find_corrections([folder, *extra], ending, entries)
        hard = self.folder / CORRECTED
        if corrections:
            logger.info("true labels from corrected masks: %d, %s", len(corrections), ", ".join(sorted(corrections)))
            dataset_json = DatasetJson.of(self.job.dataset_json).content
            pseudo_labels.harden_corrections(corrections, hard, images, sources, self.managers, dict(dataset_json))
        used = pseudo_labels.choose(folder, images, self.block.semi.drop, corrections, hard)
        logger.info(
            "%s: %d of %d images are used (%s); which scans to label next: %s",
            folder, len(used.unlabelled.cases), len(images.cases), TABLE, RANKING,
        )  # fmt: skip
        return used

    def _find_sources(self) -> dict[str, Case]:
        assert self.job.unlabelled is not None
        raw = inside(self.here.raw, self.job.unlabelled.name)
        return {case.name: case for case in load_cases(raw)} if (raw / "dataset.json").is_file() else {}

    def _require_fitting(self, teachers: Sequence[Model], folders: Sequence[Path]) -> None:
        """Refuse teachers of another plan or of other labels: they would misread the preprocessed images."""
        configuration, dataset = self.inputs.request.configuration, self.inputs.dataset
        wanted = self.inputs.plan.preprocessing_digest(configuration, dataset)
        for teacher in teachers:
            own, labels = Plan.of(teacher.plans_manager.plans), DatasetJson.of(teacher.dataset_json)
            has_it = configuration in own.configuration_names
            if not has_it or own.preprocessing_digest(configuration, labels) != wanted:
                raise MFMError(
                    "E_MODEL_MISMATCH",
                    f"--teachers {', '.join(map(str, folders))}: a model was trained with another plan or other labels "
                    f"than {self.inputs.plan.name} {configuration} has. Give models of this plan.",
                )

    # The same pseudo labels throughout a student

    def _require_the_same_source(self) -> None:
        file = self.folder / f"{LABELS}.json"
        if self.job.start_from is None or not file.is_file() or self.is_labelled:
            return
        if read_json(file, "Move the folder away and train again.").get("given"):
            raise MFMError(
                "E_CONFIG", f"{self.folder}: this student learns given labels. Add --pseudo-labels DIR again."
            )

    def _require_the_same(self, used: Used) -> None:
        file = self.folder / f"{LABELS}.json"
        if self.job.start_from is not None and file.is_file():
            before = read_json(file, "Move the folder away and train again.").get("digest")
            if before != used.digest:
                raise MFMError(
                    "E_CONFIG",
                    f"--c continues the same run, but the pseudo labels of {self.folder} are not those it began with "
                    "(another folder, or a mask was corrected meanwhile). Put them back, or move the folder away and "
                    "train a new student with --pseudo-labels.",
                )
            return
        write_json(file, {"digest": used.digest, "given": self.is_labelled, "cases": list(used.unlabelled.cases)})


def load_teachers(folders: Sequence[Path], device: str) -> list[Model]:
    """Load each fold of each model by itself."""
    found = []
    for folder in folders:
        folds = load_model(folder, device=device).folds
        found += [load_model(folder, [fold], device=device) for fold in folds]
    return found


def _validation_dice(fold: Path) -> float:
    """Return the validation Dice of a fold; NaN if it was not validated."""
    file = fold / "validation" / "summary.json"
    value = read_json(file, "Validate the fold again: mfm_train --val.") if file.is_file() else {}
    return float(value.get("foreground_mean", {}).get("Dice", math.nan))


def _format_dice(dice: float) -> str:
    return "unknown" if math.isnan(dice) else f"{dice:.3f}"


def _warn_of_weakness(fold: Path, dice: float) -> None:
    logger.info("teacher %s: validation Dice %s", fold, _format_dice(dice))
    if math.isnan(dice):
        logger.warning("%s: this teacher was never validated, so nobody knows what its labels are worth", fold)
    elif dice < WEAK_DICE:
        logger.warning(
            "%s: this teacher reaches a validation Dice of %.2f. Below %.1f pseudo labels teach its mistakes: look at "
            "the masks before you trust the student, and compare with the same training without --unlabelled.",
            fold, dice, WEAK_DICE,
        )  # fmt: skip
