"""Convert a foreign checkpoint in memory to our layout.

All later steps (planning like it, transfer, description, export) then handle one layout. Notes list assumptions and
repairs. Tensors that belong to no network of ours are kept separately, under their original names.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import sha256, shown
from mfm_nnunet.interchange import nnssl
from mfm_nnunet.interchange.hub import hub_address
from mfm_nnunet.interchange.parts import Parts, take_apart, unwrap_names
from mfm_nnunet.models.families import family_of_class
from mfm_nnunet.models.layouts import Converted, Stated
from mfm_nnunet.models.networks import check_architecture
from mfm_nnunet.plan import ARCHITECTURE_KEYS, NO_RESAMPLING, Plan, plan_problem
from mfm_nnunet.plan_rules import MAX_ARGUMENT, MAX_EDGE
from mfm_nnunet.settings import FORMAT, MFMBlock, to_dict

logger = logging.getLogger(__name__)

Layout = Literal["mfm_nnunet", "nnssl", "nnU-Net", "weights alone", "timm"]
TokenOrder = Literal["whd", "hwd"]
NORMALIZATIONS = ("ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization")
"""Normalisations that need only the image. CTNormalization needs intensities, which nnssl's files do not have."""
PUBLISHED_SPACING = 1.0
"""Spacing in mm of OpenMind's corpora, for files without a spacing."""
_SPLINES = {"order_z": 0, "force_separate_z": None}


@dataclass(frozen=True)
class Reading:
    """A checkpoint, read once per job: ``content`` is in our layout, ``layout`` is that of the file."""

    content: dict[str, Any]
    layout: Layout
    others: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that no network of ours has: heads, projectors, token decoders."""
    notes: tuple[str, ...] = ()
    """Assumptions and repairs."""
    names_subjects: bool = False
    """True if the file holds an index of its corpus, with subjects and paths. The index is never copied."""

    file: Path = Path()
    """File with the weights."""
    place: Path = Path()
    """File or folder as given."""

    @functools.cached_property
    def origin(self) -> dict[str, Any]:
        """Description of the checkpoint for plans and runs: file name, SHA-256 and pretext task, but no path.

        Includes the hub's address with its commit, and licence and citations, which also bind derived weights, if any.
        """
        address = hub_address(self.place)
        known = {"address": address} if address else {}
        known |= {name: self.mfm[name] for name in ("licence", "citations") if self.mfm.get(name)}
        own = {"name": shown(self.place.name), "sha256": sha256(self.file), "pretext": self.mfm.get("pretext")}
        return own | known

    def release(self) -> None:
        """Free the weights after transfer."""
        self.content["network_weights"].clear()
        self.others.clear()

    @property
    def mfm(self) -> dict[str, Any]:
        """Description of the checkpoint, see ``documentation/reference/checkpoint.md``."""
        return self.content["mfm"]

    @property
    def configuration(self) -> dict[str, Any]:
        """Configuration that was trained, including inherited values; empty if unknown."""
        plans, name = self.mfm.get("plans") or {}, str(self.mfm.get("configuration"))
        return dict(Plan.of(plans).configuration(name).values) if name in plans.get("configurations", {}) else {}


def require_plan(reading: Reading, *keys: str) -> None:
    """Raise MFMError (E_MODEL_MISMATCH) unless the description has the network's plan and all ``keys``.

    Training can start from weights alone; planning, building and describing the network need its plan.
    """
    if reading.layout == "timm":
        raise MFMError(
            "E_MODEL_MISMATCH",
            "it has bare weights, without the plan of a network. If they are of timm, plan with --network timm:NAME "
            "and give them to mfm_train or mfm_pretrain with -pretrained_weights.",
        )
    plans = reading.mfm["plans"] if isinstance(reading.mfm.get("plans"), dict) else {}
    problem = plan_problem(plans)
    if not problem and reading.configuration.get("architecture") is None:
        problem = f"no configuration {reading.mfm.get('configuration')}"
    problem = problem or ", ".join(f"no {key}" for key in keys if key not in reading.mfm)
    if problem:
        raise MFMError(
            "E_MODEL_MISMATCH",
            f"it lacks the plan of its network ({problem}). Pretrain again.",
        )


def ours(content: Mapping[str, Any]) -> Reading:
    """Validate a checkpoint written by this package; notes are those of its import."""
    mfm = content["mfm"]
    if not isinstance(mfm, Mapping):
        raise _no_description("mfm", mfm)
    if isinstance(mfm.get("format"), int) and mfm["format"] > FORMAT:
        raise MFMError(
            "E_MODEL_MISMATCH",
            f"it was written by a newer mfm_nnunet (format {mfm['format']}, this version reads {FORMAT}). Update "
            "mfm_nnunet.",
        )
    for name, kind in _KINDS.items():
        if mfm.get(name) is not None and not isinstance(mfm[name], kind):
            raise _no_description(name, mfm[name])
    for name in ("num_inputs", "num_outputs"):
        if mfm.get(name) is not None and not 0 < mfm[name] <= MAX_ARGUMENT:
            raise _no_description(name, mfm[name])
    if not all(type(size) is int and 0 < size <= MAX_EDGE for size in mfm.get("patch_size") or ()):
        raise _no_description("patch_size", mfm["patch_size"])
    corpus, source = mfm.get("corpus") or {}, mfm.get("source") or {}
    if corpus and not ({"num_cases", "num_subjects", "hash"} <= set(corpus) and isinstance(corpus["hash"], str)):
        raise _no_description("corpus", corpus)
    notes = source.get("notes") or []
    if not isinstance(notes, list):
        raise _no_description("source.notes", notes)
    return Reading(dict(content), "mfm_nnunet", notes=tuple(map(str, notes)))


def _no_description(name: str, value: Any) -> MFMError:
    return MFMError("E_MODEL_CORRUPT", f"its value {name} = {str(value)[:60]!r} is not possible. Copy it again.")


def from_nnssl(raw: Mapping[str, Any], token_order: TokenOrder | None) -> Reading:
    """Convert a file of nnssl or OpenMind, with or without an adaptation plan."""
    said = raw.get(nnssl.KEY)
    init_args = raw.get("init_args")
    trained_with = nnssl.plan_of_training(init_args)
    plan = nnssl.read_plan({} if said is None else said, trained_with)
    trainer = raw.get("trainer_name")
    trainer = trainer if isinstance(trainer, str) else None
    parts = take_apart(raw["network_weights"], plan.key_to_encoder, plan.key_to_stem)
    notes = [] if said is not None else [_note_of_missing_plan(trained_with)]
    stated = Stated(
        plan.class_name,
        plan.arch_kwargs,
        plan.patch_size,
        plan.recommended_patch,
        token_order or nnssl.token_order_of(trainer),
    )
    converted = _convert_parts(parts, stated, token_order)
    notes += converted.notes
    plans = _plans(parts, plan, converted, notes)
    mfm = _description(parts, plans, converted.weights, converted.patch_size, nnssl.task_of(trainer) or trainer)
    mfm["citations"] = _papers(raw.get("citations"), notes)
    layout: Layout = "nnssl" if said is not None or trainer else "weights alone"
    mfm["source"] = {"layout": layout, "trainer": trainer}
    names_subjects = isinstance(init_args, Mapping) and "pretrain_json" in init_args
    content = {"network_weights": converted.weights, "mfm": mfm}
    return Reading(content, layout, converted.others, tuple(notes), names_subjects)


def _note_of_missing_plan(trained_with: Mapping[str, Any]) -> str:
    if not trained_with:
        return "the file has no plan: the network is inferred from the tensors"
    return (
        "the file has no adaptation plan: the network is inferred from the tensors; spacing, normalisation, axes and "
        "patch are taken from the plan of its training, as far as it has them"
    )


def from_nnunet(raw: Mapping[str, Any], token_order: TokenOrder | None) -> Reading:
    """Convert a supervised model of nnU-Net or of our fine-tuning."""
    init_args = raw["init_args"]
    plans, configuration = init_args["plans"], str(init_args.get("configuration"))
    problem = plan_problem(plans) if isinstance(plans, dict) else "it has no plan"
    if problem or configuration not in plans["configurations"]:
        raise MFMError(
            "E_MODEL_MISMATCH",
            f"its plan is incomplete ({problem or 'no configuration ' + configuration}). Use a checkpoint written by "
            "nnU-Net or mfm_nnunet.",
        )
    planned = dict(Plan.of(plans).configuration(configuration).values)
    planned.pop("inherits_from", None)
    parts = _parts_of_nnunet(raw["network_weights"], planned)
    converted = _converted_of_nnunet(parts, planned, token_order)
    notes, architecture = converted.notes, converted.architecture
    check_architecture(*(architecture[key] for key in ARCHITECTURE_KEYS))
    own = {
        **Plan.of(plans).shared(),
        "configurations": {configuration: {**planned, "architecture": architecture}},
        "mfm": to_dict(MFMBlock(network=parts.family.name)) | _of_union(plans),
    }
    mfm = _description(parts, own, converted.weights, converted.patch_size, "supervised", configuration)
    info = plans.get("pretrain_info")  # nnU-Net's development code: the checkpoint the model was fine-tuned from
    mfm["citations"] = _papers(info.get("citations") if isinstance(info, Mapping) else None, notes)
    mfm |= _started_from(raw.get("mfm"))
    mfm["source"] = {"layout": "nnU-Net", "trainer": str(raw.get("trainer_name"))}
    return Reading({"network_weights": converted.weights, "mfm": mfm}, "nnU-Net", converted.others, tuple(notes))


def _of_union(plans: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of our block that a plan like a model of several datasets needs."""
    ours = plans.get("mfm")
    return {name: ours[name] for name in ("modalities", "universal") if isinstance(ours, Mapping) and ours.get(name)}


def report_unused(token_order: TokenOrder | None) -> None:
    """Log that a token order was given for a network without tokens or for one of ours."""
    if token_order is not None:
        logger.info("--token-order %s has no effect: it is only for Primus weights of other programs", token_order)


def _papers(said: Any, notes: list[str]) -> list[Any]:
    """Return the citations of a foreign file as a list; some files have a single string or table."""
    said = nnssl.plain(said)
    if isinstance(said, list):
        return said
    if said is not None and not isinstance(said, (str, dict)):
        notes.append(f"citations: left out, {str(said)[:60]!r} names no papers")
        return []
    return [said] if said else []


def _started_from(ours: Any) -> dict[str, Any]:
    """Return licence and citations of the checkpoint that our fine-tuned model started from."""
    settings = ours.get("finetune") if isinstance(ours, Mapping) else None
    before = settings.get("checkpoint") if isinstance(settings, Mapping) else None
    return {name: before[name] for name in ("licence", "citations") if name in before} if before else {}


def _parts_of_nnunet(state: Mapping[str, Tensor], planned: Mapping[str, Any]) -> Parts:
    """Split the weights, or keep them as they are if no foreign layout of the plan's family has our names."""
    family = family_of_class(str((planned.get("architecture") or {}).get("network_class_name")))
    if family is None or any(layout.keeps_names for layout in family.layouts):
        return take_apart(state)
    return Parts(family, None, unwrap_names(state), {})


def _converted_of_nnunet(parts: Parts, planned: Mapping[str, Any], token_order: TokenOrder | None) -> Converted:
    """Keep weights and plan, or infer the network from the tensors if a trainer overruled the plan (Primus)."""
    architecture = planned.get("architecture") or {}
    class_name, patch = str(architecture.get("network_class_name")), tuple(map(int, planned["patch_size"]))
    if parts.layout is None or not parts.layout.needs_conversion(class_name):
        report_unused(token_order)
        return Converted(parts.weights, architecture, patch, parts.others, [])
    converted = _convert_parts(parts, Stated(class_name, patch_size=patch, token_order=token_order), token_order)
    notes = ["the plan does not name this network: it is inferred from the tensors", *converted.notes]
    return Converted(converted.weights, converted.architecture, patch, converted.others, notes)


def _convert_parts(parts: Parts, stated: Stated, token_order: TokenOrder | None) -> Converted:
    assert parts.layout is not None, "weights under foreign names have a layout"
    if not parts.layout.has_token_order:
        report_unused(token_order)
    return parts.layout.convert(parts.weights, parts.others, stated)


def _plans(parts: Parts, plan: nnssl.AdaptationPlan, converted: Converted, notes: list[str]) -> dict[str, Any]:
    """Build a complete plan around the network, with nnU-Net's defaults for what pretraining leaves open."""
    num_axes, origin = len(converted.patch_size), parts.layout.origin if parts.layout else ""
    patch = list(plan.recommended_patch or converted.patch_size)
    if len(patch) != num_axes:
        raise MFMError("E_MODEL_MISMATCH", f"its network is {num_axes}D, but the patch in its plan is {patch}.")
    normalization = list(plan.normalization) or ["ZScoreNormalization"]
    if unknown := [name for name in normalization if name not in NORMALIZATIONS]:
        raise MFMError("E_MODEL_MISMATCH", f"it was pretrained with {unknown[0]}, which is not supported here.")
    if not plan.normalization:
        notes.append(f"normalisation: z-score, {origin}; the file does not say")
    if plan.spacing is None and plan.is_resampled:
        notes.append(f"spacing: {PUBLISHED_SPACING:g} mm, {origin}; the file does not say")
    if plan.transpose_forward is None:
        notes.append(f"axes: in the order of the files, {origin}; the file does not say")
    resampling = "resample_data_or_seg_to_shape" if plan.is_resampled else NO_RESAMPLING
    forward = list(plan.transpose_forward or range(3))
    configuration = {
        "data_identifier": "foreign",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "batch_dice": False,
        "patch_size": patch,
        "spacing": list(plan.spacing or (PUBLISHED_SPACING,) * num_axes),
        "normalization_schemes": normalization,
        "use_mask_for_norm": list(plan.use_mask_for_norm) or [False] * len(normalization),
        "architecture": parts.family.with_patch(converted.architecture, patch),
    }
    for part, is_labels, order in (("data", False, 3), ("seg", True, 1), ("probabilities", False, 1)):
        kwargs = {"is_seg": is_labels, "order": order, **_SPLINES} if plan.is_resampled else {}
        configuration |= {f"resampling_fn_{part}": resampling, f"resampling_fn_{part}_kwargs": kwargs}
    return {
        "dataset_name": "foreign",
        "plans_name": parts.family.plans_name(parts.family.name),
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": forward,
        "transpose_backward": [forward.index(axis) for axis in range(len(forward))],
        "foreground_intensity_properties_per_channel": {},
        "configurations": {"2d" if num_axes == 2 else "3d_fullres": configuration},
        "mfm": to_dict(MFMBlock(network=parts.family.name)),
    }


def _description(
    parts: Parts, plans: dict[str, Any], weights: Mapping[str, Tensor], seen: Sequence[int], pretext: str | None,
    configuration: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    family, layout = parts.family, parts.layout
    prefix = (layout.stem,) if layout else family.encoder
    stem = next((tensor for name, tensor in weights.items() if name.startswith(prefix) and tensor.ndim > 3), None)
    if stem is None:
        raise MFMError(
            "E_MODEL_MISMATCH", f"the encoder is incomplete: its stem ({prefix[0]}*) is not among the weights."
        )
    head = (layout.head,) if layout else family.head
    biases = [tensor for name, tensor in weights.items() if name.startswith(head) and name.endswith(".bias")]
    is_whole = any(family.part_of(name) == "decoder" for name in weights)
    return {
        "format": FORMAT,
        "kind": "pretrained",
        "pretext": pretext,
        "plans": plans,
        "configuration": configuration or next(iter(plans["configurations"])),
        "patch_size": list(seen),
        "num_inputs": int(stem.shape[1]),
        "num_outputs": int(biases[-1].shape[0]) if biases else 1,
        "trained": "network" if is_whole else "encoder",
        "token_order": "whd",
    }


_KINDS: dict[str, type | tuple[type, ...]] = {
    "format": int, "pretext": str, "plans": dict, "configuration": str, "patch_size": (list, tuple),
    "num_inputs": int, "num_outputs": int, "corpus": dict, "versions": dict, "citations": (list, tuple),
    "trained": str, "source": dict, "licence": str, "epoch": int,
}  # fmt: skip
"""Types of the entries of a description. All are optional."""
DESCRIBED = ("patch_size", "num_inputs", "num_outputs")
"""Entries that, besides the plan, are needed to build the network as it was trained."""
