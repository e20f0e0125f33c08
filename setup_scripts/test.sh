#!/usr/bin/env bash
# Lint, types and tests in the environment of quickstart.sh (made here if it is not there).
#   bash setup_scripts/test.sh                            everything but the long tests
#   bash setup_scripts/test.sh -m long                    arguments go to pytest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

make_environment
install demo,dev
cd "$ROOT"
"$VENV/bin/ruff" check
"$VENV/bin/ruff" format --check
"$VENV/bin/mypy"
if [ "$#" -eq 0 ]; then
    # A file of tests stays in one process: what its tests share is made once.
    "$VENV/bin/pytest" -n auto --maxprocesses 4 --dist loadfile
else
    "$VENV/bin/pytest" "$@"
fi
