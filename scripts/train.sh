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

for argument in "$@"; do
    if [ "$argument" = --help ] || [ "$argument" = -h ]; then
        usage
        exit 0
    fi
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
config=configs/cpu_smoke.yaml
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    config=$1
    shift
fi
if [ ! -f "$config" ]; then
    echo "train.sh: $config: no such configuration; configs/ has $(cd configs && echo *.yaml)" >&2
    exit 2
fi

. scripts/venv.sh
use_venv ""
if [ ! -e data/corpus ] && grep -q data/corpus "$config" configs/cpu_base.yaml; then
    bash scripts/fetch_corpus.sh --python .venv/bin/python
fi
exec python -m pangu_locmoe train "$config" "$@"
