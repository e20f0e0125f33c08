"""Commands, flags, defaults, settings, codes, recipes and functions are those of ``frozen_interface.json``, or more.

An entry that goes or changes needs a line in CHANGELOG.md that says what to do instead.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.builders.interface import interface

ROOT = Path(__file__).parent.parent
FROZEN = json.loads((ROOT / "tests" / "frozen_interface.json").read_text(encoding="utf-8"))
INSTEAD: dict[str, str] = {
    "settings: pretrain.anatomy_fraction": "* `pretrain.anatomy_fraction` ->",
    "settings: pretrain.balance_temperature": "* `pretrain.balance_temperature` ->",
    "settings: probe.steps": "* `probe.kind=finetune`, `probe.steps`, `probe.learning_rate` ->",
    "settings: probe.learning_rate": "* `probe.kind=finetune`, `probe.steps`, `probe.learning_rate` ->",
    **{
        f"flags: mfm_{name} {flag}": "* The default of `-p` is no longer `mfmPlans` ->"
        for name in ("pretrain", "train", "predict")
        for flag in ("-p", "--plans")
    },
    "flags: mfm_checkpoint CHECKPOINT": "* `CHECKPOINT` of `mfm_checkpoint` may be left out ->",
    "functions: predict(output_folder)": "* `predict(image)` without an output folder ->",
    **{
        f"functions: {name}(plans_name)": "* The default of `-p` is no longer `mfmPlans` ->"
        for name in ("pretrain", "train", "predict")
    },
}
"""What went or changed, as "kind: name", and the words of CHANGELOG.md that say what to do instead."""


@pytest.fixture(scope="module")
def current() -> dict[str, dict[str, object]]:
    return interface()


@pytest.mark.parametrize("kind", FROZEN)
def test_nothing_is_lost(kind: str, current: dict[str, dict[str, object]]) -> None:
    missing = object()
    changed = {
        f"{kind}: {name}": (value, current[kind].get(name, "gone"))
        for name, value in FROZEN[kind].items()
        if current[kind].get(name, missing) != value
    }
    assert not {name: values for name, values in changed.items() if name not in INSTEAD}
    assert not [name for name in INSTEAD if name.startswith(f"{kind}: ") and name not in changed]


def test_the_changelog_points_from_old_to_new() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert not [words for words in INSTEAD.values() if words not in text]
