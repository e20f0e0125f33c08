"""A pretrained checkpoint -> the plan of a labelled data set that it fits (``--like``).

:func:`read_source` reads the checkpoint, the rest are pure functions. ``mfm`` is the checkpoint's key of that name.
Sizes are in voxels and spacings in mm, in the plan's axis order (after ``transpose_forward``) unless a name says
otherwise.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mfm_nnunet.errors import MFMError, about
from mfm_nnunet.files import shown
from mfm_nnunet.interchange.foreign import require_plan
from mfm_nnunet.interchange.read import read_checkpoint, sha256
from mfm_nnunet.models.families import NetworkFamily, families_by_class, family_named
from mfm_nnunet.models.networks import check_architecture
from mfm_nnunet.models.sizing import pad_to_multiple
from mfm_nnunet.plan import ARCHITECTURE_KEYS, is_resampled, resolved
from mfm_nnunet.planning.derive import slices_first, times
from mfm_nnunet.settings import block_of

MAX_GROWTH = 4.0
"""Voxels after resampling for each voxel of a scan, above which a plan like a checkpoint gets a warning."""
MIN_SHARE = 0.1
"""Share of the median scan that the patch should see at least."""


@dataclass(frozen=True)
class Source:
    """A pretrained checkpoint that a plan must fit: its ``mfm`` key and what the plan will say about it."""

    mfm: dict[str, Any]
    entry: dict[str, Any]
    """``MFMBlock.source``: name (of the file only), sha256, pretext, network."""

    @property
    def family(self) -> NetworkFamily:
        """Family of the checkpoint's network."""
        return family_named(self.entry["network"])

    @property
    def variant(self) -> str:
        """The checkpoint's network as ``--network`` names it."""
        return self.family.variant(self._theirs["architecture"])

    @property
    def configuration(self) -> str:
        """The configuration that can be planned like it: ``2d`` or ``3d_fullres``."""
        return "2d" if len(self._theirs["patch_size"]) == 2 else "3d_fullres"

    @property
    def is_original_spacing(self) -> bool:
        """Whether it was pretrained without resampling."""
        return not is_resampled(self._theirs)

    @property
    def _theirs(self) -> dict[str, Any]:
        return resolved(self.mfm["plans"], self.mfm["configuration"])


def read_source(path: Path) -> Source:
    """The checkpoint at ``path``, of any layout that :func:`mfm_nnunet.interchange.read.read_checkpoint` knows.

    Raises MFMError as that does, E_MODEL_MISMATCH when the plan in it is not whole or lacks the intensities that CT is
    normalised with, E_MODEL_UNSAFE when its plan names anything but networks and layers.
    """
    reading = read_checkpoint(path)
    mfm = reading.mfm
    with about(path):
        require_plan(reading)
        check_architecture(*(reading.configuration["architecture"][key] for key in ARCHITECTURE_KEYS))
        if "CTNormalization" in reading.configuration["normalization_schemes"]:
            _require_intensities(mfm["plans"]["foreground_intensity_properties_per_channel"])
        network = block_of(mfm["plans"]).network
    entry = {"name": shown(path.name), "sha256": sha256(path), "pretext": mfm.get("pretext"), "network": network}
    return Source(mfm, entry)


def like_plans_name(checkpoint_plans_name: str) -> str:
    """Name of a plan made like a checkpoint: mfmPlans -> mfmLikePlans, mfmPrimusPlans -> mfmLikePrimusPlans."""
    stem = re.sub(r"[^A-Za-z0-9_-]", "", checkpoint_plans_name).removeprefix("mfm").removeprefix("Like")
    return f"mfmLike{stem.removesuffix('Plans')}Plans"


def like_axes(mfm: Mapping[str, Any], slice_axis: int | None) -> list[int]:
    """Return the checkpoint's ``transpose_forward``; for images of one slice the order in which that axis is first."""
    if slice_axis is not None:
        return slices_first(slice_axis)
    return [int(axis) for axis in mfm["plans"]["transpose_forward"]]


def like_spacing(mfm: Mapping[str, Any], own_spacing: Sequence[float], axes: Sequence[int]) -> list[float]:
    """The checkpoint's spacing for a data set whose own target spacing is ``own_spacing``; both before transposing.

    A checkpoint without resampling keeps the data set's own; a 2D one says nothing about the slice axis, which stays.
    """
    configuration = resolved(mfm["plans"], mfm["configuration"])
    if not is_resampled(configuration):
        return [float(value) for value in own_spacing]
    theirs = configuration["spacing"]
    ordered = [own_spacing[axes[0]], *theirs] if len(theirs) == 2 else list(theirs)
    return [float(ordered[list(axes).index(axis)]) for axis in range(3)]


def plan_like(
    target_plans: Mapping[str, Any], median_shape: Sequence[float], mfm: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """``target_plans`` with the one configuration ``name`` made so that a checkpoint fits.

    ``mfm`` is the checkpoint's key of that name; ``median_shape`` the median image at the checkpoint's spacing. Taken
    over: network, resampling, normalisation (and for CT its intensities), batch size and, where the images are large
    enough, the patch. ``target_plans`` must be planned with :func:`like_axes` and :func:`like_spacing` already.

    Raises MFMError (E_MODEL_MISMATCH) when the checkpoint's channels cannot be matched to the data set's.
    """
    theirs = resolved(mfm["plans"], mfm["configuration"])
    plans = copy.deepcopy(dict(target_plans))
    own = plans["configurations"][name]
    num_channels = len(own["normalization_schemes"])
    for key in ("normalization_schemes", "use_mask_for_norm"):
        own[key] = _per_channel(theirs[key], num_channels, mfm)
    if is_resampled(theirs):  # else the target is planned without, whatever functions a plan without spacing names
        own |= {key: value for key, value in theirs.items() if key.startswith("resampling_fn_")}
    own["batch_size"] = max(2, int(theirs["batch_size"]))
    own["patch_size"] = like_patch(theirs["patch_size"], theirs["architecture"], median_shape)
    family = families_by_class()[theirs["architecture"]["network_class_name"]]
    own["architecture"] = family.with_patch(copy.deepcopy(theirs["architecture"]), own["patch_size"])
    if "CTNormalization" in own["normalization_schemes"]:
        intensities = mfm["plans"]["foreground_intensity_properties_per_channel"]
        first = intensities[min(intensities)]
        channels = plans["foreground_intensity_properties_per_channel"]
        plans["foreground_intensity_properties_per_channel"] = {
            channel: copy.deepcopy(intensities.get(channel, first)) for channel in channels
        }
    plans["configurations"] = {name: own}
    return plans


def like_patch(patch: Sequence[int], architecture: Mapping[str, Any], median_shape: Sequence[float]) -> list[int]:
    """Return the checkpoint's patch where the images are large enough, else per axis the padded size of the images.

    Padded to the multiples that the network needs, of which some axis has at least the family's ``fewest_cells``.
    """
    family = families_by_class()[architecture["network_class_name"]]
    steps = family.steps(architecture["arch_kwargs"], len(patch))
    if steps is None:
        raise MFMError(
            "E_MODEL_MISMATCH",
            "the plan in the checkpoint tells neither strides nor the size of a token of its network, so no patch can "
            "be planned for it. Use a checkpoint whose plan is whole.",
        )
    result = [min(int(p), pad_to_multiple(size, step)) for p, size, step in zip(patch, median_shape, steps)]
    if all(size < family.fewest_cells * step for size, step in zip(result, steps)):
        result = [min(int(p), family.fewest_cells * step) for p, step in zip(patch, steps)]
    return result


def doubts(
    configuration: Mapping[str, Any], spacings: Sequence[Sequence[float]], axes: Sequence[int], checkpoint: str
) -> str:
    """Say why a plan like a checkpoint may be of little use for these images, and the ways out; empty if it fits.

    ``spacings`` are those of the files, before transposing with ``axes``; ``configuration`` is the planned one.
    """
    target = configuration["spacing"]
    scaled = list(zip(axes[-len(target) :], target)) if is_resampled(configuration) else []
    factors = [math.prod(own[axis] / mm for axis, mm in scaled) for own in spacings]
    many = [factor for factor in factors if factor > MAX_GROWTH]
    image = configuration["median_image_size_in_voxels"]
    share = math.prod(min(1.0, edge / size) for edge, size in zip(configuration["patch_size"], image))
    problems = []
    if many:
        problems.append(
            f"resampling to its {times(target)} mm makes up to {max(many):.1f} voxels of one in {len(many)} of "
            f"{len(factors)} scans, so training and prediction take that much longer and see no more"
        )
    if share < MIN_SHARE:
        problems.append(
            f"its patch of {times(configuration['patch_size'])} sees {share:.1%} of the median scan ({times(image)})"
        )
    if not problems:
        return ""
    return (
        f"{checkpoint} fits these scans badly: {', and '.join(problems)}. Two ways out: pretrain on a corpus that is "
        "planned with a coarser --spacing, near that of these scans; or plan without --like and train with "
        "--set finetune.transfer=adapt."
    )


def _require_intensities(intensities: Any) -> None:
    if not intensities or not isinstance(intensities, dict):
        raise MFMError(
            "E_MODEL_MISMATCH",
            "it was trained on images with CTNormalization, and the plan in it has no intensities for that "
            "('foreground_intensity_properties_per_channel' is empty). Use a checkpoint whose plan has them.",
        )


def _per_channel(values: Sequence[Any], num_channels: int, mfm: Mapping[str, Any]) -> list[Any]:
    if len(values) == num_channels:
        return list(values)
    if len({str(value) for value in values}) == 1:
        return [values[0]] * num_channels
    raise MFMError(
        "E_MODEL_MISMATCH",
        f"the checkpoint was pretrained on {len(values)} channels with different normalisations "
        f"({', '.join(map(str, values))}), the data set has {num_channels}: which is which is unknown. "
        f"Use a checkpoint of one channel or of {num_channels}.",
    )
