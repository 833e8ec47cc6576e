#!/usr/bin/env bash
# A series of runs of growing size, so that a change can be judged at three sizes at once.
#
#   bash dev/ladder.sh NAME                 train the series NAME (about 14 minutes on two cores with bfloat16)
#   bash dev/ladder.sh NAME --seed=2 ...    with other settings of base_train
#   python dev/ladder.py NAME OTHER         a table of both, and what the one gains over the other
#
# Each run gets a number of operations and not a time, so that a busy machine changes nothing. Data and tokenizer are
# those in NANOTRAIN_DIR, or given by --data-dir and --tokenizer-dir. A series that was stopped goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:?give the series a name: bash dev/ladder.sh NAME}
shift
python=${PYTHON:-.venv/bin/python}
# On Ctrl-C a run saves and ends well: without this, it would be evaluated half-trained and the next one begun.
trap 'stopped=yes' INT TERM
stop_if_asked() {
    if [ -n "${stopped:-}" ]; then
        echo "stopped; the same command goes on"
        exit 0
    fi
}
for flops in 2e13 8e13 3.2e14; do
    "$python" -m scripts.base_train "--run-name=ladder-$name-$flops" "--target-flops=$flops" --resume --eval-every=0 "$@"
    stop_if_asked
    "$python" -m scripts.base_eval "--run-name=ladder-$name-$flops" --eval-tokens=262144 --core=false
    stop_if_asked
done
"$python" dev/ladder.py "$name"
