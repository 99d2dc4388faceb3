#!/usr/bin/env bash
# Trains one configuration on this machine: makes .venv, fetches the example corpus where it is needed, trains, reports.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/train.sh [CONFIG] [--set KEY=VALUE]... [--run-dir DIR] [--resume auto|never]
                             [--init-from CHECKPOINT] [--no-progress]

Trains CONFIG (configs/cpu_smoke.yaml), evaluates it, prints a sample of each domain and writes the report.

  --set KEY=VALUE         change one value, for example moe.router=switch; repeatable
  --run-dir DIR           where the run is kept (runs/CONFIG-ROUTER)
  --resume auto|never     auto: continue from the newest checkpoint if there is one (never)
  --init-from CHECKPOINT  start from these weights
  --no-progress           no progress bar
  --help                  this text
TEXT
}

here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/job.sh
config=configs/cpu_smoke.yaml
while [ $# -gt 0 ]; do
    if [ "$1" = --help ] || [ "$1" = -h ]; then
        usage
        exit 0
    fi
    take_train_flag "$@"
    shift "$taken"
done

prepare_corpus
[ -z "$run_dir" ] || rest+=(--run-dir "$run_dir")
exec python -m pangu_locmoe train "$config" "${sets[@]}" --resume "$resume" "${rest[@]}" "${progress[@]}"
