"""The public functions: found on the package, whatever was imported before."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mfm_nnunet
from mfm_nnunet.errors import MFMError
from mfm_nnunet.requests import PretrainRequest, TrainRequest
from mfm_nnunet.settings import FinetuneSettings, MFMBlock, PretrainSettings, SemiSettings, SliceSettings, override
from mfm_nnunet.terminal import Rows


def test_no_folder_has_the_name_of_a_public_function() -> None:
    """The import of a subpackage of that name would replace the function."""
    assert not [name for name in mfm_nnunet.__all__ if (Path(mfm_nnunet.__file__).parent / name).exists()]


def test_public_functions_are_functions() -> None:
    others = {name for name in mfm_nnunet.__all__ if inspect.isclass(getattr(mfm_nnunet, name))} | {"__version__"}
    assert others == {"MFMError", "PretrainSettings", "FinetuneSettings", "SemiSettings", "__version__"}
    assert all(inspect.isfunction(getattr(mfm_nnunet, name)) for name in mfm_nnunet.__all__ if name not in others)
    assert dir(mfm_nnunet) == sorted(mfm_nnunet.__all__)


@pytest.mark.parametrize(
    "settings",
    [
        {"pretrain": {"epochs": 3, "balance_by": ["subject", "modality"]}, "num_workers": None},
        {"pretrain.epochs": 3, "pretrain.balance_by": ("subject", "modality"), "num_workers": None},
        ["pretrain.epochs=3", "pretrain.balance_by=subject,modality", "num_workers=none"],
        PretrainSettings(epochs=3, balance_by=("subject", "modality")),
        MFMBlock(pretrain=PretrainSettings(epochs=3, balance_by=("subject", "modality"))),
    ],
)
def test_settings_are_words_or_tables(settings: Any) -> None:
    block = override(MFMBlock(), PretrainRequest(701, "2d", settings=settings).settings)
    assert (block.pretrain.epochs, block.pretrain.balance_by, block.num_workers) == (3, ("subject", "modality"), None)


def test_a_dataclass_changes_what_it_has_otherwise_than_the_defaults() -> None:
    """So the plan's own values stay where the dataclass says nothing."""
    given = TrainRequest(4, "2d", 0, settings=FinetuneSettings(epochs=7, ema_decay=0.99)).settings
    assert set(given) == {"finetune.epochs=7", "finetune.ema_decay=0.99"}
    assert TrainRequest(4, "2d", 0, settings=SemiSettings()).settings == ()
    with pytest.raises(MFMError, match=r"PretrainSettings, FinetuneSettings, SemiSettings, MFMBlock") as caught:
        TrainRequest(4, "2d", 0, settings=SliceSettings())
    assert caught.value.code == "E_CONFIG"


def test_lists_of_results_are_tables_in_notebooks() -> None:
    for rows in (mfm_nnunet.info("networks"), mfm_nnunet.doctor(), Rows([Rows([{"a": "<b>"}])])):
        assert isinstance(rows, list)
        assert rows._repr_html_().startswith("<table><tr><th>")
    assert Rows([{"a": "<b>"}])._repr_html_() == "<table><tr><th>a</th></tr><tr><td>&lt;b&gt;</td></tr></table>"
    assert Rows()._repr_html_() == "<table><tr><th>nothing</th></tr></table>"


def test_figures_of_a_notebook_keep_their_backend() -> None:
    """A notebook names its backend in the environment; nnU-Net replaces it when it is imported."""
    code = (
        "import matplotlib, mfm_nnunet as m; [getattr(m, name) for name in dir(m)]; "
        "import sys; assert 'nnunetv2.training.logging.nnunet_logger' in sys.modules; print(matplotlib.get_backend())"
    )
    environment = {**os.environ, "MPLBACKEND": "svg"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["svg"]
