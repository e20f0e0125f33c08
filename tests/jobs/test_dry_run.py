"""``--dry-run`` of the four work commands says what would be done, times some of it, and leaves no trace."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.builders.site import (
    CORPUS,
    LABELLED,
    Outcome,
    Site,
    accepted,
    reader,
    unchanged,
    with_small_network,
    write_dataset,
    write_scan,
)


def rehearsed(site: Site, command: Callable[..., Outcome], *words: object) -> str:
    """Return the messages of a dry run that succeeds and changes nothing."""
    with unchanged(site.workspace):
        outcome = accepted(command(*words, "--dry-run"))
    assert outcome.out == ""
    assert "nothing was written" in outcome.err
    return outcome.err


def test_a_dry_run_of_each_command_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = Site(tmp_path, reader(capsys))
    write_dataset(site.raw)
    for number in range(3):
        write_scan(site.scans / f"scan{number}.nii.gz", number)
    write_scan(site.test_images / "test_0000.nii.gz", 9)
    corpus = ("-d", 701, "--images", site.scans, "-np", 1)
    text = rehearsed(site, site.plan, *corpus)
    assert str(site.preprocessed(CORPUS) / "mfmPlans.json") in text
    assert "3 cases for: 3d_fullres" in text
    accepted(site.plan(*corpus))
    with_small_network(site.preprocessed(CORPUS) / "mfmPlans.json")
    timed = r"[13] steps? timed on cpu: \d+\.\d\d s each, so [13] steps in 1 epochs need about \d+\.\d (minutes|hours)"
    assert re.search(timed, rehearsed(site, site.pretrain))
    labelled = ("-d", 5, "-c", "3d_fullres", "-np", 1)
    text = rehearsed(site, site.plan, *labelled)
    assert f"{LABELLED}/mfmPlans.json" in text
    accepted(site.plan(*labelled))
    with_small_network(site.preprocessed(LABELLED) / "mfmPlans.json")
    text = rehearsed(site, site.train, 0)
    assert re.search(timed, text)
    assert re.search(r"then \d cases are predicted", text)
    accepted(site.train(0))
    output = site.workspace / "masks"
    text = rehearsed(site, site.predict, site.test_images, output)
    assert re.search(r"test: \d+ windows of \d+\.\d\d s on cpu", text)
    assert "predict 1 cases with the folds 0" in text
    assert not output.exists()
