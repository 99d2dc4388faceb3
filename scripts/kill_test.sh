#!/usr/bin/env bash
# Kills one rank of a job at random moments, resumes it each time, and compares the end with an undisturbed job.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/job.sh"

describe <<'TEXT'
Trains CONFIG once without disturbance, then again with kill -9 of a random rank after a random time, N times, resuming after
each. Exit code 0 if every restart resumed and the losses of every step are the same. Says where the time of both went, and
the training overhead ratio (docs/training.md).
TEXT
takes CONFIG configs/cpu_cluster.yaml 'what to train'
flag --kills N 20 'kills' 0
flag --ranks N 4 'processes'
flag --ranks-per-node N 2 'processes that count as one node'
flag --steps N 200 'optimizer steps; a checkpoint every 5'
flag --port PORT 8119 "port of msrun's scheduler" 1 65535
flag --output DIR runs/kill-test 'where the two runs go; must not exist'
flag --seed N 1 'of the random moments' 0
handed sets --set KEY=VALUE 'as for scripts/train.sh; repeatable'
parse_flags "$@"
[ ! -e "$output" ] || fail "--output $output: exists already; give another one"
RANDOM=$seed

train() { # train RUN_DIR: the job, from its newest checkpoint
    bash scripts/train_cpu_cluster.sh --ranks "$ranks" --ranks-per-node "$ranks_per_node" "$config" --port "$port" --run-dir "$1" \
        --resume auto --no-progress --set "train.steps=$steps" --set checkpoint.every=5 --set sample.tokens=0 "${sets[@]}"
}
last_step() {
    local found
    found=$(grep -o '"step": [0-9]*' "$output/killed/metrics.jsonl" 2>/dev/null | tail -n 1 | grep -o '[0-9]*$') || true
    echo "${found:-0}"
}

mkdir -p "$output"
echo "undisturbed run"
started=$SECONDS
train "$output/whole" >"$output/whole.log" 2>&1 || { tail -n 5 "$output/whole.log" >&2; exit 1; }
whole=$((SECONDS - started))
for ((number = 1; number <= kills; number++)); do
    before=$(last_step)
    train "$output/killed" >"$output/killed-$number.log" 2>&1 &
    job=$!
    # Joining takes about 12 seconds. Beyond it a life gets about its share of the run: most kills come before the run's end.
    moment=$((8 + RANDOM % (2 * whole / kills + 8)))
    for ((waited = 0; waited < moment; waited++)); do
        kill -0 $job 2>/dev/null || break
        sleep 1
    done
    victim=$((RANDOM % ranks))
    process=$(grep -oE 'is process [0-9]+$' "$output/killed/logs/worker_$victim.log" 2>/dev/null | grep -oE '[0-9]+' || true)
    while [ -z "$process" ] && kill -0 $job 2>/dev/null; do
        sleep 0.2
        process=$(grep -oE 'is process [0-9]+$' "$output/killed/logs/worker_$victim.log" 2>/dev/null | grep -oE '[0-9]+' || true)
    done
    kill -KILL "$process" 2>/dev/null || true
    killed=$SECONDS code=0
    wait $job || code=$?
    echo "kill $number: rank $victim after $moment s, job over $((SECONDS - killed)) s later with exit code $code, step $before -> $(last_step)"
    if [ $code != 0 ] && ! grep -qE "rank $victim was ended by SIGKILL" "$output/killed-$number.log"; then
        tail -n 5 "$output/killed-$number.log" >&2
        echo "kill_test.sh: the job failed for another reason than the kill; see $output/killed-$number.log" >&2
        exit 1
    fi
done
train "$output/killed" >"$output/last.log" 2>&1 || { tail -n 5 "$output/last.log" >&2; exit 1; }
python3 scripts/same_rows.py "$output/whole" "$output/killed"
python3 scripts/overhead.py "$output/whole" "$output/killed"
