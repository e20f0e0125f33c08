"""Plan a labelled dataset so that a pretrained checkpoint fits (``--like``).

Sizes are in voxels and spacings in mm, in the plan's axis order (after ``transpose_forward``) unless a name says
otherwise.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mfm_nnunet.data.slices import is_picture
from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.families import NetworkFamily, family_named, family_of_architecture, family_of_class
from mfm_nnunet.models.sizing import pad_to_multiple
from mfm_nnunet.plan import INTENSITIES, Configuration, Plan
from mfm_nnunet.planning.derive import slices_first, times

MAX_GROWTH = 4.0
"""Growth in voxels through resampling above which a warning is given."""
MIN_SHARE = 0.1
"""Smallest share of the median scan that the patch should cover."""


@dataclass(frozen=True)
class Template:
    """A pretrained checkpoint that a plan must fit."""

    plan: Plan
    trained: Configuration
    """The configuration that was pretrained."""
    entry: dict[str, Any]
    """``MFMBlock.source``: name (of the file only), sha256, pretext, network."""

    @property
    def family(self) -> NetworkFamily:
        """Family of the checkpoint's network."""
        return family_named(self.entry["network"])

    @property
    def variant(self) -> str:
        """``--network`` name of the checkpoint's network."""
        return self.family.variant(self.trained.architecture)

    @property
    def configuration(self) -> str:
        """Configuration to plan: ``2d`` or ``3d_fullres``."""
        return "2d" if len(self.trained.patch_size) == 2 else "3d_fullres"

    @property
    def plans_name(self) -> str:
        """Name of the new plan: mfmPlans -> mfmLikePlans, mfmPrimusPlans -> mfmLikePrimusPlans."""
        stem = re.sub(r"[^A-Za-z0-9_-]", "", self.plan.name).removeprefix("mfm").removeprefix("Like")
        return f"mfmLike{stem.removesuffix('Plans')}Plans"

    @property
    def axes(self) -> list[int]:
        """Axis order (``transpose_forward``)."""
        return [int(axis) for axis in self.plan.content["transpose_forward"]]

    def spacing(self, own_spacing: Sequence[float], slice_axis: int | None) -> list[float]:
        """Return the target spacing for a dataset; ``own_spacing`` is its own. Both are before transposing.

        A checkpoint without resampling keeps the dataset's spacing; a 2D checkpoint keeps that of the slice axis. A
        checkpoint of slices and pictures keeps the size of pictures, as in its corpus.
        """
        theirs = self.trained.spacing
        if "slices" in (self.plan.mfm.corpus or {}) and is_picture(own_spacing):
            return [float(value) for value in own_spacing]
        if not self.trained.is_resampled or theirs is None:
            return [float(value) for value in own_spacing]
        axes = self.axes if slice_axis is None else slices_first(slice_axis)
        ordered = [own_spacing[axes[0]], *theirs] if len(theirs) == 2 else list(theirs)
        return [float(ordered[axes.index(axis)]) for axis in range(3)]


def plan_like(target_plans: Mapping[str, Any], source: Template) -> dict[str, Any]:
    """Return ``target_plans`` with a single configuration that the checkpoint fits.

    Network, resampling, normalisation (for CT with its intensities), batch size and, if the images are large enough,
    the patch are copied from the checkpoint. ``target_plans`` must already use the checkpoint's axes and spacing.
    """
    theirs, name = source.plan.configuration(source.trained.name).values, source.configuration
    plans = copy.deepcopy(dict(target_plans))
    own = plans["configurations"][name]
    num_channels = len(own["normalization_schemes"])
    for key in ("normalization_schemes", "use_mask_for_norm"):
        own[key] = _per_channel(theirs[key], num_channels, source)
    if source.trained.is_resampled:  # else the target is planned without resampling
        own |= {key: value for key, value in theirs.items() if key.startswith("resampling_fn_")}
    own["batch_size"] = max(2, int(theirs["batch_size"]))
    own["patch_size"] = like_patch(theirs["patch_size"], theirs["architecture"], own["median_image_size_in_voxels"])
    family = family_of_architecture(theirs["architecture"])
    own["architecture"] = family.with_patch(copy.deepcopy(theirs["architecture"]), own["patch_size"])
    if "CTNormalization" in own["normalization_schemes"]:
        intensities = source.plan.content[INTENSITIES]
        first = intensities[min(intensities)]
        plans[INTENSITIES] = {channel: copy.deepcopy(intensities.get(channel, first)) for channel in plans[INTENSITIES]}
    plans["configurations"] = {name: own}
    return plans


def like_patch(patch: Sequence[int], architecture: Mapping[str, Any], median_shape: Sequence[float]) -> list[int]:
    """Return the checkpoint's patch, cut along each axis to the size of the images.

    Sizes are padded to the multiples that the network needs. At least one axis has the family's ``fewest_cells``.
    """
    family = family_of_architecture(architecture)
    steps = family.steps(architecture["arch_kwargs"], len(patch))
    if steps is None:
        raise MFMError(
            "E_MODEL_MISMATCH",
            "the checkpoint's plan has neither the strides nor the token size of its network, so no patch can be "
            "planned. Use a checkpoint with a complete plan.",
        )
    result = [min(int(p), pad_to_multiple(size, step)) for p, size, step in zip(patch, median_shape, steps)]
    if all(size < family.fewest_cells * step for size, step in zip(result, steps)):
        result = [min(int(p), family.fewest_cells * step) for p, step in zip(patch, steps)]
    return family.legal_patch(architecture["arch_kwargs"], result)


def find_doubts(own: Configuration, spacings: Sequence[Sequence[float]], axes: Sequence[int], checkpoint: str) -> str:
    """Explain why the checkpoint may not suit these images, and what to do; empty if it suits them.

    ``spacings`` are those of the files, before transposing with ``axes``. ``own`` is the planned configuration.
    """
    target = own.values["spacing"]
    scaled = list(zip(axes[-len(target) :], target)) if own.is_resampled else []
    factors = [math.prod(spacing[axis] / mm for axis, mm in scaled) for spacing in spacings]
    many = [factor for factor in factors if factor > MAX_GROWTH]
    image = own.values["median_image_size_in_voxels"]
    share = math.prod(min(1.0, edge / size) for edge, size in zip(own.patch_size, image))
    problems = []
    if many:
        problems.append(
            f"resampling to its {times(target)} mm makes up to {max(many):.1f} voxels of one in {len(many)} of "
            f"{len(factors)} scans, so training and prediction take that much longer and see no more"
        )
    if share < MIN_SHARE:
        problems.append(f"its patch of {times(own.patch_size)} sees {share:.1%} of the median scan ({times(image)})")
    if not problems:
        return ""
    return (
        f"{checkpoint} fits these scans badly: {', and '.join(problems)}. Two ways out: pretrain on a corpus that is "
        "planned with a coarser --spacing, near that of these scans; or plan without --like and train with "
        "--set finetune.transfer=adapt."
    )


def _per_channel(values: Sequence[Any], num_channels: int, source: Template) -> list[Any]:
    if len(values) == num_channels:
        return list(values)
    if len({str(value) for value in values}) == 1:
        return [values[0]] * num_channels
    raise MFMError(
        "E_MODEL_MISMATCH",
        f"{source.entry['name']} was pretrained on {len(values)} channels with different normalisations "
        f"({', '.join(map(str, values))}), the dataset has {num_channels}, so they cannot be matched. "
        f"Use a checkpoint with one channel or {num_channels}.",
    )


def networks_of(plans: Mapping[str, Any]) -> set[str]:
    """Return the ``--network`` names of a plan's configurations."""
    configurations = [value for value in plans["configurations"].values() if isinstance(value, dict)]
    architectures = [value.get("architecture") for value in configurations]
    names = [(architecture or {}).get("network_class_name") for architecture in architectures]
    families = [family_of_class(str(name)) for name in names]
    return {family.variant(a) if family else str(n) for n, a, family in zip(names, architectures, families) if a}
