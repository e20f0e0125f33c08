"""Tests, and the packages of ``tests/packages`` as if they were installed: one with a network of its own."""

import os
import sys
from pathlib import Path

PACKAGES = Path(__file__).parent / "packages"
sys.path += [str(PACKAGES)] * (str(PACKAGES) not in sys.path)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(PACKAGES)]))
