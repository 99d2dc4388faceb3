#!/usr/bin/env bash
# Records the load traces that the tests and docs/load.md use: trains one configuration with two routers and several seeds.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/record_traces.sh [--output DIR] [--seeds N] [--runs DIR] [--set KEY=VALUE]...

Trains configs/trace.yaml with the routers locmoe and switch and the seeds 1 to N, two runs at a time with one thread each, and
keeps each run's load trace, with counts as 16-bit numbers, as DIR/ROUTER-SEED.npz. Takes about 20 minutes on two idle cores. What
is finished in the runs' directory is not trained again; a run that was interrupted goes on from its newest checkpoint.

  --output DIR      where the traces go (tests/data/traces)
  --seeds N         seeds of each router (2)
  --runs DIR        where the runs are kept (runs/traces)
  --set KEY=VALUE   change one value of the configuration, for example train.steps=100; repeatable
  --help            this text
TEXT
}

here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/job.sh
config=configs/trace.yaml output=tests/data/traces seeds=2 runs=runs/traces
changes=()
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --output | --seeds | --runs | --set)
            [ $# -ge 2 ] && [ -n "$2" ] || fail "$1 needs a value"
            case $1 in
                --output) output=$(from_here "$2") ;;
                --seeds) seeds=$2 ;;
                --runs) runs=$(from_here "$2") ;;
                --set) changes+=(--set "$2") ;;
            esac
            shift
            ;;
        *) fail "unknown flag $1; --help lists the flags" ;;
    esac
    shift
done
[[ $seeds =~ ^[1-9][0-9]*$ ]] || fail "--seeds must be a whole number of at least 1, not $seeds"

. scripts/venv.sh
use_venv ""
[ -e data/corpus ] || bash scripts/fetch_corpus.sh --python .venv/bin/python
mkdir -p "$output" "$runs"
# Before the runs start: two at once would both make the records.
python -m pangu_locmoe prepare "$config" ${changes[@]+"${changes[@]}"} >/dev/null
export OMP_NUM_THREADS=1 # two runs share the machine, and the sums' order is the same everywhere

# The counts of a step fit into 16 bits, which compress to less than the 32 of a run’s own file.
compact() { # compact RUN FILE
    python - "$1/load.npz" "$2" <<'PYTHON'
import io
import sys
from pathlib import Path

import numpy as np

from pangu_locmoe.files import write_atomic
from pangu_locmoe.expert_load.trace import read_trace

run, output = map(Path, sys.argv[1:])
trace = read_trace(run)
counts = {"load": trace.load_KLE, "source": trace.source_KLNE, "dropped": trace.dropped_KLE}
largest = max(int(array.max()) for array in counts.values())
if largest > np.iinfo(np.uint16).max:
    sys.exit(f"record_traces.sh: {run}: an expert has {largest} tokens in a step: more than 16 bits hold")
buffer = io.BytesIO()
np.savez_compressed(buffer, step=trace.step_K, **{name: array.astype(np.uint16) for name, array in counts.items()})
write_atomic(output, buffer.getvalue())
print(f"{output}: {len(trace.step_K)} rows, {output.stat().st_size / 1e3:.0f} kB")
PYTHON
}

record() { # record ROUTER SEED
    local run=$runs/$1-$2 train
    if [ ! -e "$run/summary.json" ]; then
        echo "training $run" >&2
        mkdir -p "$run"
        python -m pangu_locmoe train "$config" --set "moe.router=$1" --set "train.seed=$2" ${changes[@]+"${changes[@]}"} \
            --run-dir "$run" --resume auto --no-progress >"$run/train.log" 2>&1 &
        train=$!
        trap 'kill $train 2>/dev/null; wait $train; exit 143' TERM
        wait $train || {
            echo "record_traces.sh: $run: $(grep -v '^\[' "$run/train.log" | tail -n 1)" >&2
            return 1
        }
    fi
    compact "$run" "$output/$1-$2.npz"
}

# A signal goes to both runs, which save their state: the next call continues.
trap 'kill $(jobs -p) 2>/dev/null; wait; exit 130' INT
trap 'kill $(jobs -p) 2>/dev/null; wait; exit 143' TERM
trap 'kill $(jobs -p) 2>/dev/null; wait; exit 129' HUP
code=0
for seed in $(seq "$seeds"); do
    running=()
    for router in locmoe switch; do
        record "$router" "$seed" &
        running+=($!)
    done
    for job in "${running[@]}"; do
        wait "$job" || code=1
    done
done
exit $code
