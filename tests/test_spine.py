"""The spine on the page "All of mfm_nnunet" is what one volume passes with MAE, from scan to mask: traced."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

import mfm_nnunet as mfm
from mfm_nnunet.images import decoder
from setup_scripts.figures import spine_modules
from tests.builders.passed_modules import note_modules
from tests.builders.site import (
    CORPUS,
    FINETUNE,
    LABELLED,
    PRETRAIN,
    Site,
    with_small_network,
    write_dataset,
    write_scan,
)

BESIDE = {
    *("__init__", "device", "errors", "fields", "files", "processes", "requests", "signals", "workspace"),
    *("terminal", "modalities", "metrics", "planning.mixed", "data.slices", "jobs.report"),
    *("engine.probe", "prediction.classification", "tasks.registry"),
    *("models.pctnet_family", "models.primus_family", "models.swin_family"),
    *("finetune.semi", "finetune.student", "finetune.watch", "jobs.student", "jobs.unlabelled", "interchange.natural"),
    *("data.class_table", "finetune.universal", "jobs.universal", "prediction.selection"),
    *("interchange.folder", "interchange.foreign", "interchange.hub", "interchange.published", "interchange.read"),
}
"""The utilities at the root, and rooms that are asked and answer no. Reports are beside the spine too."""


@pytest.mark.long
def test_one_volume_passes_the_spine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, notes = Site(tmp_path, lambda: ("", "")), tmp_path / "modules.txt"
    for kind in ("raw", "preprocessed", "results"):
        (site.workspace / f"nnUNet_{kind}").mkdir(parents=True)
        monkeypatch.setenv(f"nnUNet_{kind}", str(site.workspace / f"nnUNet_{kind}"))
    write_dataset(site.raw)
    for number in range(3):
        write_scan(site.scans / f"scan{number}.nii.gz", number)
    write_scan(site.test_images / "test_0000.nii.gz", 9)
    here = Path(__file__).parents[1]
    child = f"sys.path.append({str(here)!r}); from tests.builders.passed_modules import note_modules as n"
    start = decoder._START.replace("serve(", f"{child}; n({str(notes)!r}); serve(")
    decoder.end_all()
    monkeypatch.setattr(decoder, "_START", start)
    note_modules(str(notes))
    try:
        _walk(site)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        decoder.end_all()
    passed = set(notes.read_text(encoding="utf-8").split())
    assert set(spine_modules()) - passed == set()
    others = {name for name in passed - set(spine_modules()) - BESIDE if not name.startswith("reports.")}
    assert not others, ", ".join(sorted(others))


def _walk(site: Site) -> None:
    options = {"plans_name": "mfmLikePlans", "device": "cpu"}
    mfm.plan_and_preprocess([701], images=site.scans, name="Corpus", num_processes=1)
    with_small_network(site.preprocessed(CORPUS) / "mfmPlans.json")
    checkpoint = mfm.pretrain(701, "3d_fullres", settings=PRETRAIN, device="cpu")
    mfm.plan_and_preprocess([5], configurations=["3d_fullres"], like=checkpoint, num_processes=1)
    mfm.train(5, "3d_fullres", 0, pretrained_weights=checkpoint, settings=FINETUNE, **options)
    masks = site.folder / "masks"
    mfm.predict(site.test_images, masks, dataset=5, configuration="3d_fullres", folds=[0], **options)
    assert (masks / "test.nii.gz").is_file(), LABELLED
