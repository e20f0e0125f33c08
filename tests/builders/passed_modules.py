"""Notes every module of this package in which a function is entered, one name per line of a file."""

from __future__ import annotations

import sys
import threading
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import FrameType

import mfm_nnunet

PACKAGE = Path(mfm_nnunet.__file__).parent


def note_modules(file: str) -> None:
    """Note the modules that this process and its threads pass from now on."""
    seen: set[str] = set()

    def note(frame: FrameType, event: str, _argument: object) -> None:
        code = frame.f_code
        name, is_function = code.co_filename, code.co_flags & CO_OPTIMIZED and not code.co_name.startswith("<")
        if event != "call" or name in seen or not is_function:  # the bodies of modules and classes run at import
            return
        seen.add(name)
        if Path(name).is_relative_to(PACKAGE):
            with open(file, "a", encoding="utf-8") as lines:
                lines.write(".".join(Path(name).relative_to(PACKAGE).with_suffix("").parts) + "\n")

    threading.setprofile(note)
    sys.setprofile(note)
