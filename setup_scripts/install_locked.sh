#!/usr/bin/env bash
# Install the package in the versions of requirements.lock, for the container recipes.
#   bash setup_scripts/install_locked.sh cuda            for NVIDIA GPUs and CPUs; the wheels bring CUDA's libraries
#   bash setup_scripts/install_locked.sh cpu URL         for CPUs alone, a third of the size; URL is PyTorch's index of
#                                                        CPU wheels, as its installation page says
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
device="${1:-cuda}"
index="${2:-}"
lock="$(mktemp)"
trap 'rm -f "$lock"' EXIT

case "$device" in
cuda)
    cp requirements.lock "$lock"
    options=()
    ;;
cpu)
    if [ -z "$index" ]; then
        echo "install_locked.sh cpu needs the address of PyTorch's index of CPU wheels (TORCH_INDEX)" >&2
        exit 2
    fi
    grep -vE '^(nvidia-|cuda-|triton=)' requirements.lock >"$lock"
    options=(--extra-index-url "$index")
    ;;
*)
    echo "install_locked.sh: unknown device '$device'. Known: cuda, cpu" >&2
    exit 2
    ;;
esac

# The lock is complete, so nothing else may come along; "pip check" says if it is not.
python -m pip install --no-cache-dir --no-deps "${options[@]}" --requirement "$lock"
python -m pip install --no-cache-dir --no-deps .
python -m pip check
