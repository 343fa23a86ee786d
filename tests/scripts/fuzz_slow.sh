#!/usr/bin/env bash
# A short fuzz run of every reader, from the committed seeds. Skipped (77) without clang 19.
set -euo pipefail
cd "$(dirname "$0")/../.."
command -v clang++-19 >/dev/null || { echo "clang++-19 is not installed"; exit 77; }
RECORD=0 tools/fuzz.sh "${SECONDS_EACH:-8}"
