#!/usr/bin/env bash
# The test suite, on a fresh machine: makes the environment, checks the style, runs pytest. Arguments go to pytest:
# `-m slow` runs the slow part, which is left out by default.
set -euo pipefail
cd "$(dirname "$0")/.."
. dev/environment.sh
make_environment dev export
"$PYTHON" -m ruff check --quiet .
"$PYTHON" -m ruff format --check --quiet .
# The tests of a file share runs, so one process does them all; more threads in each would wait for one another.
export OMP_NUM_THREADS=1
"$PYTHON" -m pytest -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder "$@"
