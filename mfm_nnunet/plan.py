"""The plan: nnU-Net's ``plans.json`` with our block, read, resolved and checked once at the start of a job.

Sizes are in voxels and spacings in mm, in the plan's axis order (after ``transpose_forward``).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.errors import MFMError, nearest
from mfm_nnunet.files import digest_of, is_same, read_json
from mfm_nnunet.modalities import has_window, kind_of, rule_for, with_rule
from mfm_nnunet.plan_rules import (
    ARCHITECTURE_KEYS,
    CT,
    INTENSITIES,
    NO_RESAMPLING,
    NORMALISATIONS,
    PLAN_KEYS,
    network_problem,
    plan_problem,
    resolve_inheritance,
)
from mfm_nnunet.settings import MFMBlock, block_of

__all__ = ["ARCHITECTURE_KEYS", "INTENSITIES", "NO_RESAMPLING", "Configuration", "Plan", "plan_problem"]

SHARED_KEYS = (
    *PLAN_KEYS, "original_median_spacing_after_transp", "original_median_shape_after_transp",
    "experiment_planner_used", "label_manager", "mfm",
)  # fmt: skip
"""Keys of a plan that are copied into checkpoints."""
CORPUS_SETTINGS = ("slices", "colour")
"""Settings of a corpus, ``mfm`` in its dataset.json, that determine preprocessed files."""
STORED = (*CORPUS_SETTINGS, "universal")
"""All such entries, with the classes of a union of datasets."""
PREPROCESSOR = "DefaultPreprocessor"
"""nnU-Net's class that our preprocessing replaces; older plans do not name one."""
NORMALISED_BY_CASE = frozenset(NORMALISATIONS) - {CT}
"""Schemes that do not use the fingerprint, so that a new case does not change the others."""

OF_PLAN = ("transpose_forward",)
OF_CONFIGURATION = (
    *("spacing", "normalization_schemes", "use_mask_for_norm", "resampling_fn_data", "resampling_fn_seg"),
    *("resampling_fn_data_kwargs", "resampling_fn_seg_kwargs"),
)
"""Fields that, with the CT intensities, determine the voxels of an image in preprocessing and prediction."""
READER, PREPROCESSOR_NAME = "image_reader_writer", "preprocessor_name"
"""Further fields that determine preprocessed files. Prediction chooses readers by file ending, and is always ours."""
PREDICTION_ONLY = ("patch_size", "previous_stage")
"""Further fields that determine predictions. The resampling of probabilities is not one: users may set a faster
method."""


@dataclass(frozen=True)
class Configuration:
    """One configuration of a plan, with inherited values; do not modify ``values``."""

    name: str
    values: Mapping[str, Any]

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Size of the network's input in voxels."""
        return tuple(self.values["patch_size"])

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """Spacing in mm; None if the plan has none, or none for each axis."""
        spacing = self.values.get("spacing")
        return None if spacing is None or None in spacing else tuple(spacing)

    @property
    def is_resampled(self) -> bool:
        """True if images are resampled to one spacing."""
        return self.values.get("resampling_fn_data") != NO_RESAMPLING and self.spacing is not None

    @property
    def batch_size(self) -> int:
        """Patches per training step."""
        return self.values["batch_size"]

    @property
    def data_identifier(self) -> str:
        """Name of the folder of preprocessed cases."""
        return self.values["data_identifier"]

    @property
    def normalization_schemes(self) -> tuple[str, ...]:
        """Name of nnU-Net's normalisation class for each image channel."""
        return tuple(self.values["normalization_schemes"])

    @property
    def num_channels(self) -> int:
        """Number of image channels; the network of a cascade also gets the labels of the previous stage."""
        return len(self.normalization_schemes)

    @property
    def previous_stage(self) -> str | None:
        """Configuration of a cascade whose predictions this one refines."""
        return self.values.get("previous_stage")

    @property
    def next_stages(self) -> tuple[str, ...]:
        """Configurations of a cascade that are trained on the predictions of this one."""
        stages = self.values.get("next_stage") or ()
        return (stages,) if isinstance(stages, str) else tuple(stages)

    @property
    def architecture(self) -> Mapping[str, Any]:
        """Class and arguments of the network; empty in the plans of nnU-Net 2.0 and 2.1, which wrote other keys."""
        return self.values.get("architecture") or {}

    @property
    def preprocessor_problem(self) -> str:
        """Reason why our preprocessing differs from the plan's, as a sentence; "" if it does not."""
        named = self.values.get(PREPROCESSOR_NAME, PREPROCESSOR)
        if named == PREPROCESSOR:
            return ""
        return (
            f"configuration '{self.name}' names the preprocessor '{named}', and only {PREPROCESSOR} is available here: "
            "what another one does to the images would be left out."
        )


@dataclass(frozen=True)
class Plan:
    """A plan of ours or of stock nnU-Net. ``content`` is the file's, for nnU-Net's own classes; do not modify it."""

    content: Mapping[str, Any]

    @classmethod
    def read(cls, file: Path, advice: str, code: str = "E_FORMAT") -> Plan:
        """Read a plan and check that it contains everything that training and prediction need.

        Raises MFMError as :func:`mfm_nnunet.files.read_json`, with ``code`` also for missing or illegal values;
        ``advice``, a sentence, ends the message.
        """
        content = read_json(file, advice, code)
        if problem := plan_problem(content) or network_problem(content):
            raise MFMError(code, f"{file}: {problem}. {advice}")
        return cls(content)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Plan:
        """Wrap a plan that was just created or was checked with :func:`mfm_nnunet.plan_rules.plan_problem`."""
        return cls(content)

    @classmethod
    def of_checkpoint(cls, init_args: Mapping[str, Any]) -> Plan | None:
        """Return the plan in a fine-tuned checkpoint; None if it is missing or incomplete."""
        content = init_args.get("plans")
        return cls(content) if isinstance(content, Mapping) and not plan_problem(content) else None

    @property
    def name(self) -> str:
        """Name of the plan, e.g. ``mfmPlans``."""
        return self.content["plans_name"]

    @property
    def dataset_name(self) -> str:
        """Name of the dataset or corpus that was planned."""
        return self.content["dataset_name"]

    @functools.cached_property
    def mfm(self) -> MFMBlock:
        """Our block; the defaults for a stock plan. Raises MFMError (E_CONFIG) for unknown settings."""
        return block_of(self.content)

    @property
    def family(self) -> str:
        """Family of the network, as named in :mod:`mfm_nnunet.models.families`."""
        return self.mfm.network

    @property
    def configuration_names(self) -> tuple[str, ...]:
        """Names of the configurations, in the order of the file."""
        return tuple(self.content.get("configurations", {}))

    def configuration(self, name: str) -> Configuration:
        """Return a configuration with inherited values. Raises MFMError (E_CONFIG) for an unknown name."""
        if name not in self.configuration_names:
            raise MFMError(
                "E_CONFIG",
                f"plan {self.content.get('plans_name', 'without a name')} has no configuration '{name}'. "
                f"{nearest(name, self.configuration_names)}",
            )
        values, missing_parent = resolve_inheritance(self.content["configurations"], name)
        if missing_parent is not None:
            raise MFMError("E_CONFIG", f"configuration '{name}' inherits from '{missing_parent}'. Plan again.")
        return Configuration(name, copy.deepcopy(values))

    @property
    def modalities(self) -> Mapping[str, Any]:
        """Normalisation of each kind of image in a corpus of several; empty for other plans."""
        block = self.content.get("mfm")
        return (block.get("modalities") if isinstance(block, Mapping) else None) or {}

    def for_modality(self, modality: str, own_intensities: Mapping[str, Any] | None = None) -> Plan:
        """Return the plan for images of one modality, in the form that stock nnU-Net reads; itself without a table.

        ``own_intensities`` serve for a kind with a window that the corpus did not have. Raises MFMError (E_CONFIG) for
        an unknown modality, and for such a kind without them.
        """
        if not self.modalities:
            return self
        kind = kind_of(modality)
        if not kind or (kind not in self.modalities and has_window(kind) and not own_intensities):
            here = f"'{modality}' is none of these" if kind else "that of these images is not known"
            raise MFMError(
                "E_CONFIG",
                f"plan {self.name} normalises by modality ({', '.join(self.modalities)}), and {here}. Give it with "
                "--modality when you plan, or in the column 'modality' of a CSV.",
            )
        rule = self.modalities.get(kind) or rule_for(kind, own_intensities or {})
        return Plan.of(with_rule(self.content, rule))

    def shared(self) -> dict[str, Any]:
        """Return the part that may leave this computer: other planners add e.g. the path of a checkpoint."""
        return {key: value for key, value in self.content.items() if key in SHARED_KEYS}

    def preprocessing_digest(self, configuration: str, dataset: DatasetJson) -> str:
        """Return the SHA-256 of everything that determines preprocessed files, except the images."""
        return digest_of({"format": 1, **self._preprocessing(configuration, dataset)})

    def make_data_identifier(self, configuration: str, dataset: DatasetJson) -> str:
        """Return ``mfm_<configuration>_<8 hex>``; equal exactly if preprocessing gives the same files."""
        content = self._preprocessing(configuration, dataset)
        content["labels"] = [content["labels"], content.pop("regions_class_order")]
        if content["intensities"] is None:
            del content["intensities"]
        return f"mfm_{configuration}_{digest_of(content)[:8]}"

    def differences(self, other: Plan, configuration: str) -> list[str]:
        """Return the names of the differing fields that affect predictions.

        Many plans fit one network. With another spacing or normalisation, masks look plausible and are wrong.
        """
        own, theirs = self._prediction(configuration), other._prediction(configuration)
        return [name for name, value in own.items() if not is_same(value, theirs[name])]

    def _preprocessing(self, configuration: str, dataset: DatasetJson) -> dict[str, Any]:
        """Collect the values that determine preprocessed files. Folder names contain their digest: never change it."""
        values = self.configuration(configuration).values
        return {
            **{name: self.content.get(name) for name in (*OF_PLAN, READER)},
            **{name: values.get(name) for name in (*OF_CONFIGURATION, PREPROCESSOR_NAME)},
            **{name: dataset.content.get(name) for name in ("labels", "regions_class_order")},
            "intensities": self._intensities(configuration),
            **({"modalities": self.modalities} if self.modalities else {}),
            **{name: value for name, value in dataset.content.get("mfm", {}).items() if name in STORED},
        }

    def _prediction(self, configuration: str) -> dict[str, Any]:
        values = self.configuration(configuration).values
        return {
            **{name: values.get(name) for name in (*OF_CONFIGURATION, *PREDICTION_ONLY)},
            **{name: self.content[name] for name in OF_PLAN},
            INTENSITIES: self._intensities(configuration),
        }

    def _intensities(self, configuration: str) -> Any:
        """Return the dataset's intensities if images are normalised with them, else None."""
        uses_dataset = set(self.configuration(configuration).normalization_schemes) - NORMALISED_BY_CASE
        return self.content[INTENSITIES] if uses_dataset else None
