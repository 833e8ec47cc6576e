#!/usr/bin/env bash
# Train a scaling series: runs of three sizes, to judge a change at all of them.
#
#   bash dev/ladder.sh NAME                 train the series NAME (about 14 minutes on two cores with bfloat16)
#   bash dev/ladder.sh NAME --seed=2 ...    with other settings of base_train
#   python dev/ladder.py NAME OTHER         compare two series
#
# Runs have a FLOP budget instead of a time limit, so a busy machine changes nothing. Data and tokenizer come from
# NANOTRAIN_DIR or from --data-dir and --tokenizer-dir. A stopped series continues where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:?give the series a name: bash dev/ladder.sh NAME}
shift
python=${PYTHON:-.venv/bin/python}
# On Ctrl-C a run saves and exits with 0: without this trap, it would be evaluated and the next run started.
trap 'stopped=yes' INT TERM
stop_if_asked() {
    if [ -n "${stopped:-}" ]; then
        echo "stopped; the same command continues"
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
