"""Open a page in headless Chromium, cut off from the network, and tell what it did."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


@dataclass(frozen=True)
class Visit:
    """The picture (H, W, 3) of a page, its console messages, and the number of requests it made."""

    pixels: np.ndarray
    console: list[str]
    num_requests: int


def open_page(file: Path, folder: Path, size: tuple[int, int] = (1000, 1400), is_dark: bool = False) -> Visit:
    """Open ``file``; ``folder`` is for the browser's own files. Skips where no Chromium is installed."""
    from PIL import Image

    browser = next((found for name in NAMES if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    folder.mkdir()
    own = [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={folder / 'net.json'}"]
    own += [f"--screenshot={folder / 'page.png'}", f"--window-size={size[0]},{size[1]}"]
    own += [f"--blink-settings=preferredColorScheme={0 if is_dark else 1}", file.absolute().as_uri()]
    done = subprocess.run([browser, *FLAGS, *own], capture_output=True, text=True, timeout=120, check=False)
    assert (folder / "page.png").is_file(), done.stderr
    # Requests of the browser itself have no origin; those of a page from a file have the origin null.
    requests = re.findall(r'"initiator":"null"', (folder / "net.json").read_text(errors="replace"))
    console = re.findall(r"CONSOLE[^\]]*\] (.*)", done.stderr)
    return Visit(np.asarray(Image.open(folder / "page.png").convert("RGB")), console, len(requests))
