#!/usr/bin/env bash
# What to run in the first minutes on a GPU, with the python3 on PATH: bash dev/gpu_check.sh --help
set -euo pipefail
exec python3 "$(dirname "$0")/gpu_check.py" "$@"
