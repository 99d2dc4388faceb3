#!/usr/bin/env bash
# Trains one configuration on this machine: makes .venv, fetches the example corpus where it is needed, trains, reports.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/job.sh"

describe <<'TEXT'
Trains CONFIG, evaluates it, prints a sample of each domain and writes the report.
TEXT
takes CONFIG configs/cpu_smoke.yaml 'what to train'
train_flags runs/CONFIG-ROUTER
parse_flags "$@"

prepare_corpus
[ -z "$run_dir" ] || rest+=(--run-dir "$run_dir")
exec python -m pangu_locmoe train "$config" "${sets[@]}" --resume "$resume" "${rest[@]}"
