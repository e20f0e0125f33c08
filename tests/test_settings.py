"""The settings block: JSON both ways, unknown names, and values typed from the command line."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

import pytest

from mfm_nnunet import settings as mfm_settings
from mfm_nnunet.errors import MFMError
from mfm_nnunet.settings import FinetuneSettings, MFMBlock, PretrainSettings
from mfm_nnunet.values import Range


@dataclass(frozen=True)
class Everything:
    """One field of each kind that a setting may have."""

    number: int = 1
    real: float = 0.5
    text: str = "a"
    flag: bool = True
    choice: Literal["x", "y"] = "x"
    maybe: int | None = None
    pair: tuple[int, int] = (1, 2)
    many: tuple[float, ...] = ()
    anything: dict[str, Any] | None = None


def test_the_block_survives_json() -> None:
    block = MFMBlock(
        pretrain=PretrainSettings(epochs=3, warmup_epochs=1, precision="bf16"),
        finetune=FinetuneSettings(optimizer="adamw", checkpoint={"name": "a.pth", "sha256": "0", "pretext": "mae"}),
        source={"name": "b.pth"},
        seed=7,
        num_workers=0,
        network="primus",
    )
    plain = json.loads(json.dumps(mfm_settings.to_dict(block)))
    assert mfm_settings.from_dict(MFMBlock, plain) == block
    assert mfm_settings.block_of({"mfm": plain}) == block


def test_a_stock_plan_has_the_defaults() -> None:
    assert mfm_settings.block_of({"plans_name": "nnUNetPlans"}) == MFMBlock()


def test_a_block_of_another_format_is_refused() -> None:
    with pytest.raises(MFMError, match=r"format 99.*Plan again") as caught:
        mfm_settings.block_of({"mfm": {"format": 99}})
    assert caught.value.code == "E_CONFIG"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, "unknown setting 'mfm.sed'. Did you mean 'seed'"),
        ({"pretrain": {"epoch": 1}}, "unknown setting 'mfm.pretrain.epoch'. Did you mean 'epochs'"),
        ({"pretrain": {"epochs": "many"}}, "mfm.pretrain.epochs=many: expected int"),
    ],
)
def test_unknown_keys_and_wrong_values_in_a_plan_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(MFMError, match=message) as caught:
        mfm_settings.block_of({"mfm": values})
    assert caught.value.code == "E_CONFIG"


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("number=3", 3),
        ("real=1e-3", 1e-3),
        ("real=2", 2.0),
        ("text=3", "3"),
        ("text=a=b", "a=b"),
        ("flag=false", False),
        ("flag=1", True),
        ("choice=y", "y"),
        ("maybe=none", None),
        ("maybe=4", 4),
        ("pair=3,4", (3, 4)),
        ("pair=[3, 4]", (3, 4)),
        ("many=1", (1.0,)),
        ("many=1 2.5", (1.0, 2.5)),
        (" number = 5 ", 5),
    ],
)
def test_assignments_are_typed_by_the_field(assignment: str, expected: Any) -> None:
    changed = mfm_settings.override(Everything(), [assignment])
    value = getattr(changed, assignment.split("=")[0].strip())
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    "assignment",
    ["number=3.0", "number=3.5", "number=a", "number=", "real=nan", "flag=maybe", "choice=z", "pair=1", "pair=1,2,3"],
)
def test_values_of_the_wrong_type_are_refused(assignment: str) -> None:
    with pytest.raises(MFMError) as caught:
        mfm_settings.override(Everything(), [assignment])
    assert caught.value.code == "E_CONFIG"
    assert assignment.split("=")[0] in caught.value.message


@dataclass(frozen=True)
class AllSettings:
    """Everything that --set reaches but the settings of the pretext tasks."""

    block: MFMBlock = field(default_factory=MFMBlock)
    probe: mfm_settings.ProbeSettings = field(default_factory=mfm_settings.ProbeSettings)


def numbers(settings: Any, prefix: str = "") -> dict[str, Range]:
    """The dotted names of the numbers among the settings, with what is legal."""
    hints = get_type_hints(type(settings))
    found = {}
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        if dataclasses.is_dataclass(value):
            found |= numbers(value, f"{prefix}{item.name}.")
        elif {int, float} & {hints[item.name], *get_args(hints[item.name])}:
            found[prefix + item.name] = item.metadata.get("range")
    return found


NOT_RANGED = {"block.format"}
"""It has one legal value."""


LIST = "block.finetune.mix_labels"
"""It may be empty, or a list."""


def test_every_number_has_a_range_that_holds_its_default() -> None:
    found = numbers(AllSettings())
    assert len(found) > 25
    assert {name for name, legal in found.items() if legal is None} == NOT_RANGED
    mfm_settings.require_in_range(AllSettings())


@pytest.mark.parametrize("name", numbers(AllSettings()))
def test_absurd_numbers_are_refused_with_the_name_and_what_is_legal(name: str) -> None:
    legal = numbers(AllSettings())[name]
    absurd = ["nan", "-inf", "1e400", "1" + "0" * 21, "9" * 5000, "true", "[1]", "{}", "0x10", ""]
    if name == LIST:
        absurd = [value for value in absurd if value not in ("", "[1]")]
    if legal is not None:
        above = legal.high if legal.below else legal.high * 2 + 1
        absurd += [str(above), str(legal.low if legal.above else legal.low - 1)]
    for value in absurd:
        with pytest.raises(MFMError) as caught:
            mfm_settings.override(AllSettings(), [f"{name}={value}"])
        assert caught.value.code == "E_CONFIG"
        assert name in caught.value.message


@pytest.mark.parametrize(
    "block",
    [
        *({"pretrain": 5}, {"pretrain": [1]}, {"pretrain": {"optimizer": ["sgd"]}}, {"finetune": {"checkpoint": [1]}}),
        *({"seed": 10**400}, {"seed": True}, {"seed": [0]}, {"pretrain": {"epochs": float("nan")}}),
        *([], "x", 3),
    ],
)
def test_absurd_blocks_of_plans_are_refused(block: Any) -> None:
    with pytest.raises(MFMError) as caught:
        mfm_settings.block_of({"mfm": block})
    assert caught.value.code == "E_CONFIG"


def test_dotted_names_reach_into_the_block_and_the_last_one_wins() -> None:
    block = mfm_settings.override(MFMBlock(), ["pretrain.epochs=3", "finetune.learning_rate=0.1", "seed=5", "seed=6"])
    assert (block.pretrain.epochs, block.finetune.learning_rate, block.seed) == (3, 0.1, 6)
    assert dataclasses.replace(block, pretrain=PretrainSettings(), finetune=FinetuneSettings(), seed=0) == MFMBlock()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("pretrain.epoch=3", "Did you mean 'pretrain.epochs'"),
        ("epochs=3", r"Did you mean '\w+\.epochs'"),
        ("pretrain=3", "unknown setting 'pretrain'"),
        ("seed.x=3", "unknown setting 'seed.x'"),
        ("seed", "expected name=value"),
    ],
)
def test_unknown_names_get_the_nearest_legal_one(assignment: str, message: str) -> None:
    with pytest.raises(MFMError, match=message) as caught:
        mfm_settings.override(MFMBlock(), [assignment])
    assert caught.value.code == "E_CONFIG"


@pytest.mark.parametrize(("name", "used"), [("anatomy_fraction", 0.3), ("balance_temperature", 2.0)])
def test_removed_settings_of_old_plans_are_ignored_and_refused_by_name(
    name: str, used: float, caplog: pytest.LogCaptureFixture
) -> None:
    neutral = mfm_settings.NEUTRAL[f"pretrain.{name}"]
    assert mfm_settings.block_of({"mfm": {"pretrain": {name: neutral}}}) == MFMBlock()
    assert not caplog.text
    assert mfm_settings.block_of({"mfm": {"pretrain": {name: used}}}) == MFMBlock()
    assert f"pretrain.{name}={used} is ignored" in caplog.text
    with pytest.raises(MFMError, match=f"E_CONFIG .*pretrain.{name}'. It was removed: "):
        mfm_settings.override(MFMBlock(), [f"pretrain.{name}={used}"])
