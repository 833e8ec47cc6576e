#!/usr/bin/env bash
# The whole pipeline: environment, data, tokenizer, training, evaluation with samples, summary.
set -euo pipefail
{ # so that bash reads all of it before it begins, and a `git pull` during a run changes nothing
for descriptor in 0 1 2; do # one that is closed, whose number the next file would get
    if [ ! -e "/dev/fd/$descriptor" ]; then eval "exec $descriptor<> /dev/null"; fi
done
trap '' PIPE # a reader that goes away ends nothing
say() { printf "$@" 2> /dev/null || true; } # nor does a full disk
fail() { # fail EXIT_CODE MESSAGE
    say 'error: %s\n' "$2" >&2
    exit "$1"
}
for name in DATA_DIR NANOTRAIN_DIR; do # a relative path means the folder this was called from
    if [ -n "${!name:-}" ] && [[ ${!name} != /* ]]; then export "$name=$PWD/${!name}"; fi
done
cd "$(dirname "$0")"

usage() {
    cat << 'HELP'
bash speedrun.sh        from nothing to an evaluated model

With a CUDA device it trains depth 20 on FineWeb-Edu, on all visible GPUs.
Without one it trains a small model on the embedded corpus (the sources of your
Python's standard library) in a few minutes. Run again after a stop, it goes on
where it was.

Choices, as environment variables (MINUTES=3 bash speedrun.sh):

  DATASET        stdlib (embedded, no network), fineweb-edu or climbmix
  DATA_DIR       a folder of your own parquet shards instead of DATASET
  TRAIN_SHARDS   shards of a hosted data set to download (as DEPTH needs:
                 84 of about 100 MB at depth 20)
  MINUTES        all-in after data are there: tokenizer, compilation, training,
                 and evaluation (3; below 2 these read less text; with CUDA the
                 model's size decides, and the evaluation comes on top)
  DEPTH          layers (20 with CUDA; else as suit MINUTES on this machine)
  VOCAB_SIZE     tokens of the vocabulary (as suit the depth: 4096 to 32768)
  SEED           of the first weights and the order of the data (1337)
  RUN_NAME       folder of the run (<data set>-<minutes>min, then other choices)
  NPROC          processes on this machine (all GPUs, or 1)
  WANDB          off, offline or online (off)
  NANOTRAIN_DIR  where data, tokenizer and runs go (~/.cache/nanotrain)
HELP
}

case "${1:-}" in
    "") ;;
    -h | --help) usage; exit 0 ;;
    *) fail 2 "$1: choices are environment variables, see bash speedrun.sh --help" ;;
esac

stopped=""
child=""
download="" # the process that fetches shards while the tokenizer trains on the first ones
names=()
seconds=()

# A stage runs in the background, so that Ctrl-C, SIGTERM and SIGHUP reach this script at once; it passes them on.
on_signal() {
    stopped=yes
    if [ -n "${child:-${pip:-}}" ]; then kill -TERM "${child:-$pip}" 2> /dev/null || true; fi
}
trap on_signal INT TERM HUP # HUP: unless it was ignored from the start (nohup)
trap 'if [ -n "$download" ]; then kill -TERM "$download" 2> /dev/null || true; fi' EXIT # also where a stage fails

say_how_to_go_on() {
    say '\nstopped. To go on, run the same command again:\n\n    %sbash %q\n' "$chosen" "$PWD/speedrun.sh"
    exit 0
}

rule=$(printf '=%.0s' {1..80})
heading() { # heading NAME: a line of 78 columns that ends with the minutes and seconds since the start
    local clock
    printf -v clock '%d:%02d' $((SECONDS / 60)) $((SECONDS % 60))
    say '\n== %s %s %s\n' "$1" "${rule:0:$((73 - ${#1} - ${#clock}))}" "$clock"
}

finished() { # finished NAME BEGIN: keep and say the seconds of a stage
    names+=("$1")
    seconds+=($((SECONDS - $2)))
    say -- '-- %s took %d s\n' "$1" $((SECONDS - $2))
}

stage() { # stage NAME COMMAND...
    local name=$1 begin=$SECONDS status=0
    shift
    if [ -n "$stopped" ]; then say_how_to_go_on; fi
    heading "$name"
    "$@" &
    child=$!
    wait "$child" || status=$?
    while [ -n "$stopped" ] && kill -0 "$child" 2> /dev/null; do # the first wait ends with the signal
        status=0
        wait "$child" || status=$?
    done
    child=""
    # 3: what was trained could not be saved (torchrun ends with 1 whatever its ranks ended with)
    if [ -n "$stopped" ] && [ "$status" -ne 3 ]; then say_how_to_go_on; fi
    if [ "$status" -ne 0 ]; then
        fail "$status" "stage \"$name\" failed with exit code $status"
    fi
    finished "$name" "$begin"
}

chosen="" others="" # the choices, to say how to go on; those that a longer run would have too
for name in DATASET DATA_DIR TRAIN_SHARDS MINUTES DEPTH VOCAB_SIZE SEED RUN_NAME NPROC WANDB NANOTRAIN_DIR; do
    if [ -z "${!name:-}" ]; then continue; fi
    chosen+=$(printf '%s=%q ' "$name" "${!name}")
    if ! [[ $name =~ ^(MINUTES|DEPTH|RUN_NAME)$ ]]; then others+=$(printf '%s=%q ' "$name" "${!name}"); fi
done
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then chosen+=$(printf 'CUDA_VISIBLE_DEVICES=%q ' "$CUDA_VISIBLE_DEVICES"); fi # may be empty
for name in TRAIN_SHARDS DEPTH VOCAB_SIZE NPROC; do
    if [ -n "${!name:-}" ] && ! [[ ${!name} =~ ^[1-9][0-9]{0,8}$ ]]; then
        fail 2 "$name=${!name}: must be a whole number above 0"
    fi
done
if [ -n "${SEED:-}" ] && ! [[ $SEED =~ ^[0-9]{1,9}$ ]]; then
    fail 2 "SEED=$SEED: must be a whole number"
fi
if [ -n "${MINUTES:-}" ] && ! [[ $MINUTES =~ ^[0-9]*\.?[0-9]+$ && $MINUTES =~ [1-9] ]]; then
    fail 2 "MINUTES=$MINUTES: must be a number above 0, as in MINUTES=2.5"
fi
if [ -n "${RUN_NAME:-}" ] && ! [[ $RUN_NAME =~ ^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$ ]]; then
    fail 2 "RUN_NAME=$RUN_NAME: use 1 to 100 letters, digits, dots, dashes and underscores"
fi

export NANOTRAIN_DIR=${NANOTRAIN_DIR:-~/.cache/nanotrain}
if ! mkdir -p "$NANOTRAIN_DIR" || ! probe=$(mktemp -d "$NANOTRAIN_DIR/.probe-XXXXXX") || ! rmdir "$probe"; then
    fail 2 "$NANOTRAIN_DIR cannot be written: set NANOTRAIN_DIR to a folder that can"
fi

. dev/environment.sh
heading environment
make_environment || [ -n "$stopped" ] || exit 1
if [ -n "$stopped" ]; then say_how_to_go_on; fi
before=$SECONDS
machine=$("$PYTHON" -m nanotrain.hardware)
start=$((SECONDS - before)) # seconds: about what starting Python with torch takes here
say '%s\n' "$machine"
gpus=$(sed -n 's/^GPUs *//p' <<< "$machine")
gflops=$(sed -n 's/^training *\([0-9.]*\).*/\1/p' <<< "$machine")
finished environment 0

nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
dataset=${DATASET:-$([ "$gpus" -gt 0 ] && echo fineweb-edu || echo stdlib)}
data_dir=${DATA_DIR:-$NANOTRAIN_DIR/data/$dataset}
if [ -d "$data_dir" ]; then data_dir=$(cd "$data_dir" > /dev/null && pwd); fi # which has a name, as `.` has not
minutes=${MINUTES:-$([ "$gpus" -gt 0 ] || echo 3)}
whole=${minutes%%.*}
whole=$((10#${whole:-0}))
if [ "$gpus" -gt 0 ]; then
    depth=${DEPTH:-20}
    tokenizer_preset=("--depth=$depth")
    preset=(--eval-tokens=10485760 --core-metric-every=2000)
    evaluation=(--eval-tokens=10485760 --core-max-per-task=0)
else
    # Threads that wait for others sleep soon. Steps take 2 % longer, but beside another busy program half of the time.
    export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-2000}
    depth=${DEPTH:-0}
    if [ "$whole" -ge 2 ]; then
        max_chars=20000000 eval_tokens=32768 evaluations=7 # more text makes the tokenizer no better
    else
        max_chars=5000000 eval_tokens=16384 evaluations=10 # these would take most of the time
    fi
    tokenizer_preset=("--max-chars=$max_chars" "--target-minutes=$minutes" "--depth=$depth" "--training-gflops=${gflops:-0}")
    preset=("--eval-tokens=$eval_tokens" "--evaluations-after=$evaluations") # for what base_eval does
    evaluation=("--eval-tokens=$eval_tokens" --eval-document-bytes=250000 --core-bundle=own --core-max-per-task=40
        --sample-tokens=48)
fi
data_name=$(basename "$data_dir" | tr -c 'A-Za-z0-9._\n-' -)
data_name=${data_name#"${data_name%%[A-Za-z0-9]*}"} # of a folder of any name
data_name=${data_name:0:60}
data_name=${data_name:-data}
run_name=${RUN_NAME:-$data_name${minutes:+-${minutes}min}${DEPTH:+-d$DEPTH}${VOCAB_SIZE:+-v$VOCAB_SIZE}${SEED:+-s$SEED}}
run_dir=$NANOTRAIN_DIR/runs/$run_name

if [ -z "${DATA_DIR:-}" ]; then
    if [ "$dataset" = stdlib ]; then
        stage data "$PYTHON" -m nanotrain.dataset --dataset=stdlib
    else
        if [ -n "${TRAIN_SHARDS:-}" ]; then
            shards=(-n "$TRAIN_SHARDS")
        elif [ "$depth" -gt 0 ]; then
            shards=("--for-depth=$depth")
        else
            shards=(-n 2)
        fi
        stage data "$PYTHON" -m nanotrain.dataset "--dataset=$dataset" -n 1 # enough for the tokenizer
    fi
fi

clock=$SECONDS
if ! (cd "$run_dir/checkpoints" 2> /dev/null && compgen -G "step_*" > /dev/null); then # not a run that goes on
    if [ -n "${shards:-}" ]; then # more of them come meanwhile
        "$PYTHON" -m nanotrain.dataset "--dataset=$dataset" "${shards[@]}" > /dev/null 2>&1 &
        download=$!
    fi
    stage tokenizer "$PYTHON" -m scripts.tok_train "--data-dir=$data_dir" "--tokenizer-dir=$run_dir" \
        "--vocab-size=${VOCAB_SIZE:-0}" "${tokenizer_preset[@]}"
fi
if [ -n "${shards:-}" ]; then
    if [ -n "$download" ]; then
        kill -TERM "$download" 2> /dev/null || true
        wait "$download" || true
        download=""
    fi
    stage download "$PYTHON" -m nanotrain.dataset "--dataset=$dataset" "${shards[@]}"
    clock=$((clock + ${seconds[${#seconds[@]} - 1]}))
fi

horizon=()
if [ -n "$minutes" ]; then
    # What is left of MINUTES after the tokenizer and before the evaluation; a run that goes on keeps the time it was given.
    after=0 # seconds of base_eval besides its evaluations: to start and to draw take about twice what starting takes
    if [ "$gpus" -eq 0 ]; then after=$((2 * start + 1)); fi
    left=$("$PYTHON" - "$run_dir/config.json" "$minutes" $((SECONDS - clock + after)) << 'LEFT'
import json, pathlib, sys

config, minutes, taken = pathlib.Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
if config.exists():
    print(json.loads(config.read_text())["settings"]["TARGET_MINUTES"])
else:
    print(max(minutes - taken / 60, 0.3 * minutes))
LEFT
    )
    horizon=("--target-minutes=$left")
fi
launch=("$PYTHON")
if [ "$nproc" -gt 1 ]; then
    launch=("$PYTHON" -m torch.distributed.run --standalone --local-addr=127.0.0.1 --shutdown-timeout=300 "--nproc_per_node=$nproc")
    if [[ $(trap -p HUP) == *"''"* ]]; then launch+=(--signals-to-handle=SIGTERM,SIGINT,SIGQUIT); fi # else nohup is in vain
fi
stage training "${launch[@]}" -m scripts.base_train --resume "--run-name=$run_name" "--data-dir=$data_dir" \
    "--tokenizer-dir=$run_dir" "--depth=$depth" \
    "--wandb=${WANDB:-off}" "--seed=${SEED:-1337}" --report=false "${preset[@]}" "${horizon[@]}"
stage evaluation "${launch[@]}" -m scripts.base_eval "--run-name=$run_name" "${evaluation[@]}"

heading summary
"$PYTHON" - "$run_dir/evaluation.json" << 'SUMMARY'
import json, sys

from nanotrain import errors


def summarize():
    result = json.load(open(sys.argv[1]))
    print(f"bits per byte   {result['doc_bpb']:.4f}  this model on whole validation documents")
    for name, bpb in result["compared_bpb"].items():
        print(f"                {bpb:.4f}  {name} on the same text")
    print(f"                {result['val_bpb']:.4f}  this model on packed validation sequences")
    print(f"                {result['train_bpb']:.4f}  this model on packed training sequences")
    if core := result.get("core"):
        name = "CORE" if core["is_core"] else "tasks"
        print(f"{name:<15} {core['core_metric']:.4f} +- {core['standard_error']:.4f} (guessing 0),", end=" ")
        print(f"accuracy {core['accuracy']:.3f} (guessing {core['baseline']:.3f})")
    print(f"trained on      {result['tokens']:,} tokens in {result['step']:,} steps")


errors.run(summarize)
SUMMARY
taken=""
for i in "${!names[@]}"; do taken+="${names[$i]} ${seconds[$i]} s, "; done
taken=${taken%, }
say 'time            %d s: %s\n' "$SECONDS" "${taken/, training/,$'\n'                training}"
say 'files           %s\nreport          %s/report/report.html\n' "$run_dir" "$run_dir"
longer=DEPTH=$((depth + 4)) run=$run_dir
if [ -n "$minutes" ]; then longer=MINUTES=$((whole < 10 ? 10 : 3 * whole)); fi
if [ "$NANOTRAIN_DIR" = ~/.cache/nanotrain ]; then run=$run_name; fi
say '\nTo write with the model, train for longer, or prepare your own text:\n\n    cd %s\n' "$PWD"
say '    %s\n' ".venv/bin/python -m scripts.generate --run-name=$run" "$others$longer bash speedrun.sh" \
    ".venv/bin/python -m nanotrain.dataset --from=FOLDER --name=mine"
exit
}
