"""Write ``requirements.lock``: the package's dependencies in the versions of the environment that ran the tests.

    .venv/bin/python setup_scripts/write_lock.py

It follows the requirements of the package and the extras below through what is installed, for the running Python and
platform. Renew it after the tests passed in an environment with newer versions. The container recipes install it.
"""

from __future__ import annotations

import platform
import sys
from importlib.metadata import distribution
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements.lock"
EXTRAS = ("demo", "dicom", "study")
HEADER = """\
# The versions that the tests ran with: Python {python} on {system} {machine}, with the extras {extras}.
# Written by setup_scripts/write_lock.py. Install with: pip install -r requirements.lock
"""


def required() -> list[Requirement]:
    """Return the requirements in pyproject.toml, those of the locked extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = [*project["dependencies"], *(text for extra in EXTRAS for text in project["optional-dependencies"][extra])]
    return [item for item in map(Requirement, texts) if item.marker is None or item.marker.evaluate()]


def closure(first: list[Requirement]) -> dict[str, str]:
    """Return the installed version of each required distribution, and of all that they require.

    Raises PackageNotFoundError for what is missing, and SystemExit for a version that does not fit.
    """
    versions: dict[str, str] = {}
    done: set[tuple[str, str]] = set()
    queue = [(requirement, extra) for requirement in first for extra in ("", *requirement.extras)]
    while queue:
        requirement, extra = queue.pop()
        name = canonicalize_name(requirement.name)
        found = distribution(name)
        if not requirement.specifier.contains(found.version, prereleases=True):
            raise SystemExit(f"{name} {found.version} is installed, {requirement} is required")
        versions[name] = found.version
        if (name, extra) in done:
            continue
        done.add((name, extra))
        for item in map(Requirement, found.requires or ()):
            if item.marker is None or item.marker.evaluate({"extra": extra}):
                queue += [(item, other) for other in ("", *item.extras)]
    return dict(sorted(versions.items()))


def lock_text() -> str:
    """Return the content of the lock for the running environment."""
    header = HEADER.format(
        python=".".join(map(str, sys.version_info[:2])),
        system=platform.system(),
        machine=platform.machine(),
        extras=", ".join(EXTRAS),
    )
    return header + "".join(f"{name}=={version}\n" for name, version in closure(required()).items())


if __name__ == "__main__":
    LOCK.write_text(lock_text(), encoding="utf-8")
    print(f"wrote {LOCK.name}")
