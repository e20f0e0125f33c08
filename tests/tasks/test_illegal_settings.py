"""Settings of pretext tasks that are refused by name; those of masked tasks are in ``test_masked.py``."""

from __future__ import annotations

import pytest

from mfm_nnunet import settings as mfm_settings
from mfm_nnunet.errors import MFMError
from mfm_nnunet.tasks.base import find_task
from tests.builders.tasks import geometry

VIEWS = "crop_size=8,8 crop_size=48 crop_size=0 crop_size=6 crop_size=4 projector_width=0 quarter_turn=1.5"
ILLEGAL = {
    "simclr": f"{VIEWS} region_size=8 region_size=8,16,16 region_size=24,24 num_references=0 max_shift=1.0 "
    "max_shift=-0.1 temperature=0 temperature=-1",
    "voco": f"{VIEWS} quarter_turn=-0.5 grid=0,2,2 grid=1 grid=5 grid=2,2 num_targets=0 prediction_weight=0 "
    "regularizer_weight=-1",
    "models_genesis": "shuffle_probability=-0.1 curve_probability=1.5 paint_probability=2 inpainting_share=1.1 "
    "largest_window=0 largest_window=1.5 window_coverage=0 window_coverage=1e6",
    "swin_unetr": "restoration_weight=-1 contrast_weight=-0.1 rotation_weight=-0.1 cut_out_budget=1.5 mix_budget=-0.1 "
    "mix_probability=1.1 box_range=0.3,0.2 box_range=0,0.2 box_range=0.1,1.2 temperature=0 embedding_width=0 "
    "rotation_plane=0,1 rotation_plane=1,1 rotation_plane=1,3 rotation_plane=1",
    "volume_fusion": "num_classes=0 foreground_fraction=0 foreground_fraction=1.5 cell_range=0,8 cell_range=16,8 "
    "scale_range=0,1 scale_range=1.5,0.7",
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_illegal_settings_are_refused_by_name(name: str) -> None:
    task = find_task(name)
    sizes = geometry((16, 32, 32), 4)
    for assignment in ILLEGAL[name].split():
        field = assignment.partition("=")[0]
        with pytest.raises(MFMError, match=rf"^E_CONFIG.*\b{field}="):
            task.resolve(mfm_settings.override(task.Config(), [assignment]), sizes)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("models_genesis", "shuffle_probability=0 curve_probability=0 paint_probability=0"),
        ("swin_unetr", "restoration_weight=0 contrast_weight=0 rotation_weight=0"),
    ],
)
def test_tasks_without_anything_to_do_are_refused(name: str, settings: str) -> None:
    task = find_task(name)
    with pytest.raises(MFMError, match=r"^E_CONFIG.*pretext\.\w+="):
        task.resolve(mfm_settings.override(task.Config(), settings.split()), geometry((16, 32, 32), 4))
