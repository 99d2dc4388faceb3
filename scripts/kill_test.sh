#!/usr/bin/env bash
# Kills one rank of a job at random moments, resumes it each time, and compares the end with an undisturbed job.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/kill_test.sh [CONFIG] [--kills N] [--ranks N] [--ranks-per-node N] [--steps N] [--port PORT]
                                 [--output DIR] [--seed N] [--set KEY=VALUE]...

Trains CONFIG (configs/cpu_cluster.yaml) once without disturbance, then again with kill -9 of a random rank after a random
time, N times, resuming after each. Exit code 0 if every restart resumed and the losses of every step are the same.

  --kills N            kills (20)
  --ranks N            processes (4)
  --ranks-per-node N   processes that count as one node (2)
  --steps N            optimizer steps (200); a checkpoint every 5
  --port PORT          port of msrun's scheduler (8119)
  --output DIR         where the two runs go (runs/kill-test); must not exist
  --seed N             of the random moments (1)
  --set KEY=VALUE      as for scripts/train.sh; repeatable
  --help               this text
TEXT
}

here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/job.sh
config=configs/cpu_cluster.yaml kills=20 ranks=4 per_node=2 steps=200 port=8119 output=runs/kill-test seed=1 rest=()
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --kills | --ranks | --ranks-per-node | --steps | --port | --output | --seed | --set)
            [ $# -ge 2 ] || fail "$1 needs a value"
            case $1 in
                --kills) kills=$2 ;;
                --ranks) ranks=$2 ;;
                --ranks-per-node) per_node=$2 ;;
                --steps) steps=$2 ;;
                --port) port=$2 ;;
                --output) output=$(from_here "$2") ;;
                --seed) seed=$2 ;;
                --set) rest+=(--set "$2") ;;
            esac
            shift
            ;;
        -*) fail "unknown flag $1; --help lists the flags" ;;
        *) config=$(config_from_here "$1") ;;
    esac
    shift
done
for number in "$kills" "$ranks" "$per_node" "$steps" "$port" "$seed"; do
    [[ $number =~ ^[0-9]+$ ]] || fail "$number: must be a number; --help lists the flags"
done
[ ! -e "$output" ] || fail "--output $output: exists already; give another one"
RANDOM=$seed

train() { # train RUN_DIR: the job, from its newest checkpoint
    bash scripts/train_cpu_cluster.sh --ranks "$ranks" --ranks-per-node "$per_node" "$config" --port "$port" --run-dir "$1" \
        --resume auto --no-progress --set "train.steps=$steps" --set checkpoint.every=5 --set sample.tokens=0 "${rest[@]}"
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
python3 - "$output" <<'PY'
import json, sys

def rows(run):
    found = [json.loads(line) for line in open(f"{sys.argv[1]}/{run}/metrics.jsonl", encoding="utf-8")]
    return [{key: value for key, value in row.items() if "second" not in key} for row in found]

whole, killed = rows("whole"), rows("killed")
different = [one["step"] for one, other in zip(whole, killed) if one != other]
if different or len(whole) != len(killed):
    sys.exit(f"kill_test.sh: {len(killed)} rows, not {len(whole)}; steps that differ: {different[:10]}")
print(f"all {len(whole)} rows are those of the undisturbed run")
PY
