"""A foreign checkpoint in memory -> the same as :mod:`mfm_nnunet.engine` would have written it.

Everything downstream (planning like it, transfer, description, export) then knows one layout. What had to be assumed or
repaired on the way stands in the notes; tensors that belong to no network of ours are kept apart, by their own names.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from mfm_nnunet.errors import MFMError
from mfm_nnunet.interchange import nnssl
from mfm_nnunet.interchange.architecture import PRIMUS, patch_embedding, primus_architecture, unet_architecture
from mfm_nnunet.interchange.names import Parts, take_apart
from mfm_nnunet.interchange.repairs import with_axis_0_outermost, without_stale_copies
from mfm_nnunet.models.networks import check_architecture
from mfm_nnunet.models.primus import decoder_widths
from mfm_nnunet.plan import ARCHITECTURE_KEYS, NO_RESAMPLING, plan_problem, resolved, shared_plan
from mfm_nnunet.plan_rules import MAX_ARGUMENT, MAX_EDGE
from mfm_nnunet.settings import FORMAT, MFMBlock, to_dict

logger = logging.getLogger(__name__)

Layout = Literal["mfm_nnunet", "nnssl", "nnU-Net", "weights alone"]
TokenOrder = Literal["whd", "hwd"]
NORMALIZATIONS = ("ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization")
"""Those of nnU-Net that need nothing but the image; CT's needs intensities, which nnssl's files do not hold."""
PUBLISHED_SPACING = 1.0
"""Millimetres along each axis of OpenMind's corpora, where a file says nothing."""
PUBLISHED_PATCH = {3: 160, 2: 512}
_SPLINES = {"order_z": 0, "force_separate_z": None}


@dataclass(frozen=True)
class Reading:
    """A checkpoint as read: ``content`` in our layout, whatever ``layout`` the file has."""

    content: dict[str, Any]
    layout: Layout
    others: dict[str, Tensor] = field(default_factory=dict)
    """The file's tensors that no network of ours has: heads, projectors, token decoders."""
    notes: tuple[str, ...] = ()
    """What was assumed or repaired."""
    names_subjects: bool = False
    """Whether the file holds its corpus' index, with subjects and paths; it is never copied."""

    @property
    def mfm(self) -> dict[str, Any]:
        """The description, as ``documentation/reference/checkpoint.md`` has it."""
        return self.content["mfm"]

    @property
    def configuration(self) -> dict[str, Any]:
        """The plan's configuration that was trained, with what it inherits; empty where the description has none."""
        plans, name = self.mfm.get("plans") or {}, str(self.mfm.get("configuration"))
        return resolved(plans, name) if name in plans.get("configurations", {}) else {}


def require_plan(reading: Reading, *keys: str) -> None:
    """Raise MFMError (E_MODEL_MISMATCH) unless the plan that the network was built from, and ``keys``, are there.

    Weights alone can start a training; everything that plans, builds or describes the network needs its plan.
    """
    plans = reading.mfm["plans"] if isinstance(reading.mfm.get("plans"), dict) else {}
    problem = plan_problem(plans)
    if not problem and reading.configuration.get("architecture") is None:
        problem = f"no configuration {reading.mfm.get('configuration')}"
    problem = problem or ", ".join(f"no {key}" for key in keys if key not in reading.mfm)
    if problem:
        raise MFMError(
            "E_MODEL_MISMATCH",
            f"it lacks the plan that its network was built from ({problem}). Pretrain again.",
        )


def ours(content: Mapping[str, Any]) -> Reading:
    """A checkpoint that this package wrote, with what was noted when it was imported.

    Raises MFMError: E_MODEL_MISMATCH for a newer format, E_MODEL_CORRUPT for an entry of another kind than it can be.
    """
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
    return MFMError("E_MODEL_CORRUPT", f"it says {name} = {str(value)[:60]!r}, which cannot be. Copy it again.")


def from_nnssl(raw: Mapping[str, Any], token_order: TokenOrder | None) -> Reading:
    """Convert a file of nnssl or OpenMind, with or without its plan.

    Raises MFMError: E_MODEL_MISMATCH for a network that we do not have and for Primus' weights whose token order
    nobody knows, E_MODEL_CORRUPT for a plan that cannot be.
    """
    said = raw.get(nnssl.KEY)
    init_args = raw.get("init_args")
    trained_with = nnssl.plan_of_training(init_args)
    plan = nnssl.read_plan({} if said is None else said, trained_with)
    trainer = raw.get("trainer_name")
    trainer = trainer if isinstance(trainer, str) else None
    parts = take_apart(raw["network_weights"], plan.key_to_encoder, plan.key_to_stem)
    notes = [] if said is not None else [_without_plan(trained_with)]
    if parts.family == "primus":
        order = token_order or nnssl.token_order_of(trainer)
        converted = _primus(parts, plan, order, notes)
    else:
        tell_unused(token_order)
        converted = _unet(parts, plan, notes)
    weights, architecture, seen, others = converted
    plans = _plans(parts, plan, architecture, seen, notes)
    mfm = _description(parts, plans, weights, seen, nnssl.task_of(trainer) or trainer)
    mfm["citations"] = _papers(raw.get("citations"), notes)
    layout: Layout = "nnssl" if said is not None or trainer else "weights alone"
    mfm["source"] = {"layout": layout, "trainer": trainer}
    names_subjects = isinstance(init_args, Mapping) and "pretrain_json" in init_args
    return Reading({"network_weights": weights, "mfm": mfm}, layout, others, tuple(notes), names_subjects)


def _without_plan(trained_with: Mapping[str, Any]) -> str:
    """The note about a file of a trainer that writes no adaptation plan."""
    if not trained_with:
        return "the file has no plan: the network is read off the tensors"
    return (
        "the file has no adaptation plan: the network is read off the tensors; what is known of spacing, "
        "normalisation, axes and patch is from the plan of its training"
    )


def from_nnunet(raw: Mapping[str, Any], token_order: TokenOrder | None) -> Reading:
    """Convert a model that nnU-Net, or our fine-tuning, trained with labels: supervised pretraining.

    Raises MFMError as :func:`from_nnssl`, and E_MODEL_UNSAFE when its plan names anything but networks and layers.
    """
    init_args = raw["init_args"]
    plans, configuration = init_args["plans"], str(init_args.get("configuration"))
    problem = plan_problem(plans) if isinstance(plans, dict) else "it has no plan"
    if problem or configuration not in plans["configurations"]:
        raise MFMError(
            "E_MODEL_MISMATCH",
            f"the plan in it is not whole ({problem or 'no configuration ' + configuration}). Use a checkpoint that "
            "nnU-Net or mfm_nnunet wrote.",
        )
    parts = take_apart(raw["network_weights"])
    notes: list[str] = []
    planned = resolved(plans, configuration)
    planned.pop("inherits_from", None)
    patch = tuple(int(size) for size in planned["patch_size"])
    weights, architecture, others = _network_of_nnunet(parts, planned, token_order, notes)
    check_architecture(*(architecture[key] for key in ARCHITECTURE_KEYS))
    own = {
        **shared_plan(plans),
        "configurations": {configuration: {**planned, "architecture": architecture}},
        "mfm": to_dict(MFMBlock(network="primus" if parts.family == "primus" else "resenc")),
    }
    mfm = _description(parts, own, weights, patch, "supervised", configuration)
    info = plans.get("pretrain_info")  # of nnU-Net's development code: what the model was fine-tuned from
    mfm["citations"] = _papers(info.get("citations") if isinstance(info, Mapping) else None, notes)
    mfm |= _started_from(raw.get("mfm"))
    mfm["source"] = {"layout": "nnU-Net", "trainer": str(raw.get("trainer_name"))}
    return Reading({"network_weights": weights, "mfm": mfm}, "nnU-Net", others, tuple(notes))


def tell_unused(token_order: TokenOrder | None) -> None:
    """Log that an order was given for what has no tokens, or this package's own."""
    if token_order is not None:
        logger.info("--token-order %s has no effect: it is for the Primus of other programs", token_order)


def _papers(said: Any, notes: list[str]) -> list[Any]:
    """The citations of a foreign file as a list, which ours have: some write one text or one table."""
    said = nnssl.plain(said)
    if isinstance(said, list):
        return said
    if said is not None and not isinstance(said, (str, dict)):
        notes.append(f"citations: left out, {str(said)[:60]!r} names no papers")
        return []
    return [said] if said else []


def _started_from(ours: Any) -> dict[str, Any]:
    """Licence and papers of the checkpoint that a fine-tuned model of ours started from."""
    settings = ours.get("finetune") if isinstance(ours, Mapping) else None
    before = settings.get("checkpoint") if isinstance(settings, Mapping) else None
    return {name: before[name] for name in ("licence", "citations") if name in before} if before else {}


def _network_of_nnunet(
    parts: Parts, planned: Mapping[str, Any], token_order: TokenOrder | None, notes: list[str]
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """Weights, architecture and what is not ours; trainers of stock nnU-Net overrule the plan's network (Primus)."""
    architecture = planned.get("architecture") or {}
    class_name = str(architecture.get("network_class_name"))
    is_primus = parts.family == "primus"
    if is_primus and class_name != PRIMUS:
        plan = nnssl.AdaptationPlan(patch_size=tuple(planned["patch_size"]))
        weights, architecture, _, others = _primus(parts, plan, token_order, notes)
        return weights, architecture, others
    tell_unused(token_order)
    if not is_primus and ("Primus" in class_name or "." not in class_name):  # ResEncL: a name without arguments
        architecture, more = unet_architecture(parts.family, parts.weights, class_name, {})
        notes += ["the plan does not name this network: it is read off the tensors", *more]
    return parts.weights, architecture, parts.others


_Converted = tuple[dict[str, Tensor], dict[str, Any], tuple[int, ...], dict[str, Tensor]]
"""Weights, architecture, the patch that the network saw, and what is not ours."""


def _unet(parts: Parts, plan: nnssl.AdaptationPlan, notes: list[str]) -> _Converted:
    weights, changed = without_stale_copies(parts.weights)
    if changed:
        notes.append(f"{changed} tensors were untrained copies of sparse pretraining and were replaced by the trained")
    architecture, more = unet_architecture(parts.family, weights, plan.class_name, plan.arch_kwargs)
    notes += more
    num_axes = len(architecture["arch_kwargs"]["kernel_sizes"][0])
    seen = plan.patch_size or plan.recommended_patch
    if seen is None:
        seen = (PUBLISHED_PATCH[num_axes],) * num_axes
        notes.append(f"patch: {PUBLISHED_PATCH[num_axes]} voxels along each axis, as published; the file does not say")
    return weights, architecture, seen, parts.others


def _primus(parts: Parts, plan: nnssl.AdaptationPlan, order: str | None, notes: list[str]) -> _Converted:
    weights, others = dict(parts.weights), dict(parts.others)
    if order is None:
        raise MFMError(
            "E_MODEL_MISMATCH",
            "it holds a Primus, and nothing in it says in which order its tokens are flattened; a guess would exchange "
            "two axes in silence. If you know it: mfm_checkpoint import FILE -o NEW.pth --token-order whd, or hwd "
            "(nnssl's SimMIM, and dynamic-network-architectures 0.4.3 and newer, which nnU-Net 2.8.1 needs: whd; "
            "nnssl's other tasks, and that package before 0.4.3: hwd).",
        )
    token = tuple(int(size) for size in patch_embedding(weights).shape[2:])
    grid = _grid(weights, token, plan.patch_size, notes)
    seen = tuple(cells * size for cells, size in zip(grid, token))
    architecture, more = primus_architecture(weights, seen, plan.class_name, plan.arch_kwargs)
    notes += more
    if order == "hwd":
        weights = with_axis_0_outermost(weights, grid, architecture["arch_kwargs"]["eva_numheads"])
        notes.append("token order repaired: axis 1 was outermost")
    if not _decoder_fits(weights, architecture["arch_kwargs"]):
        for name in [name for name in weights if name.startswith("up_projection.")]:
            others[name] = weights.pop(name)
    return weights, architecture, seen, others


def _grid(
    weights: Mapping[str, Tensor], token: Sequence[int], patch: Sequence[int] | None, notes: list[str]
) -> tuple[int, ...]:
    """Tokens per axis: what the plan says if the position table has that many rows, else a cube; the table wins."""
    table = weights.get("eva.pos_embed")
    if table is None:
        raise MFMError("E_MODEL_MISMATCH", "it holds a transformer without 'eva.pos_embed': that is no Primus.")
    rows = table.shape[1]
    planned = tuple(size // step for size, step in zip(patch or (), token))
    if patch is not None and len(patch) == len(token) and math.prod(planned) == rows:
        return planned
    side = round(rows ** (1 / len(token)))
    if side ** len(token) != rows:
        raise MFMError(
            "E_MODEL_MISMATCH",
            f"its position table has {rows} rows, which are neither a cube nor the tokens of the patch "
            f"{'that its plan names' if patch else '(no plan names one)'}: where a token stands is unknown.",
        )
    if patch is not None:
        notes.append(
            f"positions: {rows} rows are a cube of {side} tokens per axis, not the plan's patch of "
            f"{' x '.join(map(str, patch))} voxels; the table is right where crops were pretrained on"
        )
    return (side,) * len(token)


def _decoder_fits(weights: Mapping[str, Tensor], kwargs: Mapping[str, Any]) -> bool:
    """Whether the patch decoder has our widths; DNA's depend on the number of outputs and are ours for five."""
    layers = sorted(name for name in weights if name.startswith("up_projection.decode.") and name.endswith(".0.weight"))
    widths = decoder_widths(kwargs["embed_dim"], int(math.log2(max(kwargs["patch_embed_size"]))))
    return [tuple(weights[name].shape[:2]) for name in layers] == list(itertools.pairwise(widths))


def _plans(
    parts: Parts, plan: nnssl.AdaptationPlan, architecture: dict[str, Any], seen: Sequence[int], notes: list[str]
) -> dict[str, Any]:
    """A whole plan around the network, with nnU-Net's defaults where pretraining decides nothing."""
    num_axes, is_primus = len(seen), parts.family == "primus"
    patch = list(plan.recommended_patch or seen)
    if len(patch) != num_axes:
        raise MFMError("E_MODEL_MISMATCH", f"its network is {num_axes}D and its plan's patch is {patch}.")
    if is_primus:
        architecture = {**architecture, "arch_kwargs": {**architecture["arch_kwargs"], "input_shape": patch}}
    normalization = list(plan.normalization) or ["ZScoreNormalization"]
    if unknown := [name for name in normalization if name not in NORMALIZATIONS]:
        raise MFMError("E_MODEL_MISMATCH", f"it was pretrained with {unknown[0]}, which cannot be repeated here.")
    if not plan.normalization:
        notes.append("normalisation: z-score, as OpenMind's; the file does not say")
    if plan.spacing is None and plan.is_resampled:
        notes.append(f"spacing: {PUBLISHED_SPACING:g} mm, as OpenMind's; the file does not say")
    if plan.transpose_forward is None:
        notes.append("axes: in the order of the files, as OpenMind's; the file does not say")
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
        "architecture": architecture,
    }
    for part, is_labels, order in (("data", False, 3), ("seg", True, 1), ("probabilities", False, 1)):
        kwargs = {"is_seg": is_labels, "order": order, **_SPLINES} if plan.is_resampled else {}
        configuration |= {f"resampling_fn_{part}": resampling, f"resampling_fn_{part}_kwargs": kwargs}
    return {
        "dataset_name": "foreign",
        "plans_name": "mfmPrimusPlans" if is_primus else "mfmPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": forward,
        "transpose_backward": [forward.index(axis) for axis in range(len(forward))],
        "foreground_intensity_properties_per_channel": {},
        "configurations": {"2d" if num_axes == 2 else "3d_fullres": configuration},
        "mfm": to_dict(MFMBlock(network="primus" if is_primus else "resenc")),
    }


def _description(
    parts: Parts, plans: dict[str, Any], weights: Mapping[str, Tensor], seen: Sequence[int], pretext: str | None,
    configuration: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    prefix = _STEMS[parts.family]
    stem = next((tensor for name, tensor in weights.items() if name.startswith(prefix) and tensor.ndim > 3), None)
    if stem is None:
        raise MFMError(
            "E_MODEL_MISMATCH", f"no convolution of its stem ({prefix}*) is among the weights: no whole encoder."
        )
    heads = [tensor for name, tensor in weights.items() if name.startswith("decoder.seg_layers.")]
    heads = heads or [t for name, t in weights.items() if name.startswith("up_projection.") and name.endswith(".bias")]
    is_whole = any(name.startswith(("decoder.", "up_projection.")) for name in weights)
    return {
        "format": FORMAT,
        "kind": "pretrained",
        "pretext": pretext,
        "plans": plans,
        "configuration": configuration or next(iter(plans["configurations"])),
        "patch_size": list(seen),
        "num_inputs": int(stem.shape[1]),
        "num_outputs": int(heads[-1].shape[0]) if heads else 1,
        "trained": "network" if is_whole else "encoder",
        "token_order": "whd",
    }


_KINDS: dict[str, type | tuple[type, ...]] = {
    "format": int, "pretext": str, "plans": dict, "configuration": str, "patch_size": (list, tuple),
    "num_inputs": int, "num_outputs": int, "corpus": dict, "versions": dict, "citations": (list, tuple),
    "trained": str, "source": dict, "licence": str, "epoch": int,
}  # fmt: skip
"""What the entries of a description are, where they are there."""
DESCRIBED = ("patch_size", "num_inputs", "num_outputs")
"""What of a description is needed beside its plan to build the network as it was trained."""
_STEMS = {"primus": "down_projection.", "resenc": "encoder.stem.", "plain": "encoder.stages.0."}
