#!/usr/bin/env bash
# Records the load traces that the tests and docs/load.md use: trains one configuration with two routers and several seeds.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/job.sh"

describe <<'TEXT'
Trains configs/trace.yaml with the routers locmoe and switch and the seeds 1 to N, two runs at a time with one thread each, and
keeps each run's load trace, with counts as 16-bit numbers, as DIR/ROUTER-SEED.npz. Takes about 20 minutes on two idle cores. What
is finished in the runs' directory is not trained again; a run that was interrupted goes on from its newest checkpoint.
TEXT
flag --output DIR tests/data/traces 'where the traces go'
flag --seeds N 2 'seeds of each router'
flag --runs DIR runs/traces 'where the runs are kept'
handed sets --set KEY=VALUE 'change one value of the configuration, for example train.steps=100; repeatable'
parse_flags "$@"
config=configs/trace.yaml

prepare_corpus
mkdir -p "$output" "$runs"
# Before the runs start: two at once would both make the records.
python -m pangu_locmoe prepare "$config" "${sets[@]}" >/dev/null
export OMP_NUM_THREADS=1 # two runs share the machine, and the sums' order is the same everywhere

record() { # record ROUTER SEED
    local run=$runs/$1-$2 train
    if [ ! -e "$run/summary.json" ]; then
        echo "training $run" >&2
        mkdir -p "$run"
        python -m pangu_locmoe train "$config" --set "moe.router=$1" --set "train.seed=$2" "${sets[@]}" \
            --run-dir "$run" --resume auto --no-progress >"$run/train.log" 2>&1 &
        train=$!
        trap 'kill $train 2>/dev/null; wait $train; exit 143' TERM
        wait $train || {
            echo "record_traces.sh: $run: $(grep -v '^\[' "$run/train.log" | tail -n 1)" >&2
            return 1
        }
    fi
    python scripts/compact_trace.py "$run/load.npz" "$output/$1-$2.npz"
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
