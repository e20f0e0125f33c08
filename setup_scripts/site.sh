#!/usr/bin/env bash
# Build the documentation as a website, with search: open build/site/index.html. A broken link is an error.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

make_environment
install docs
cd "$ROOT"
rm -rf build/pages build/site
mkdir -p build/pages
cp -r documentation/. build/pages
sed 's#](documentation/#](#g' README.md >build/pages/index.md
NO_MKDOCS_2_WARNING=1 "$VENV/bin/mkdocs" build --strict --quiet
echo "$ROOT/build/site/index.html"
