#!/usr/bin/env bash
# From a fresh clone to masks: a virtual environment, the package, and the demo on real images.
#   bash setup_scripts/quickstart.sh                      a brain template: pretrain, fine-tune, predict, in minutes
#   bash setup_scripts/quickstart.sh --data DATASET       the same on a labelled dataset in nnU-Net's raw format
#   bash setup_scripts/quickstart.sh --overwrite          again, replacing the earlier demo
# All arguments go to mfm_demo (see mfm_demo --help). Results are in ./mfm_demo.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

make_environment
install demo
"$VENV/bin/mfm_demo" "$@"

echo
echo "The commands are in $VENV/bin; to have them at hand: source $VENV/bin/activate"
