# Sourced by the other scripts: makes or reuses .venv in the repository root. Sets ROOT and VENV.
# PYTHON=/path/to/python3.12 chooses another interpreter.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        if command -v "$candidate" >/dev/null && is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    echo "Python 3.10 or newer is needed and was not found." >&2
    echo "Install one, or name it: PYTHON=/path/to/python3.12 bash $0" >&2
    return 2
}

make_environment() {
    if [ -x "$VENV/bin/python" ] && is_new_enough "$VENV/bin/python"; then
        echo "Using the virtual environment $VENV"
        return
    fi
    if [ -e "$VENV" ]; then
        echo "$VENV exists but holds no working Python 3.10 or newer. Remove it and run this again." >&2
        return 2
    fi
    local python
    python="$(find_python)"
    echo "Making a virtual environment in $VENV with $("$python" --version)"
    # An environment of our own, so PEP 668 (externally managed system Pythons) does not concern us.
    if ! "$python" -m venv "$VENV"; then
        rm -rf "$VENV"
        echo "python -m venv failed. On Debian and Ubuntu: sudo apt install python3-venv" >&2
        return 2
    fi
}

# install EXTRAS: the package with these extras, editable, so that a later "git pull" needs no new installation. What is
# installed already is left alone (and needs no network) until pyproject.toml changes.
install() {
    local stamp="$VENV/installed_${1//,/_}"
    if [ "$stamp" -nt "$ROOT/pyproject.toml" ]; then
        return
    fi
    echo "Installing mfm_nnunet[$1] and what it needs (torch is large; the first time takes some minutes)"
    "$VENV/bin/python" -m pip install --disable-pip-version-check --quiet --editable "$ROOT[$1]"
    touch "$stamp"
}
