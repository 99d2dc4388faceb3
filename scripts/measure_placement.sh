#!/usr/bin/env bash
# Measures what moving experts to their tokens brings on an emulated cluster: seconds and bytes before and after.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/measure_placement.sh [--config CONFIG] [--rate RATE] [--seeds N] [--output DIR] [--results DIR] [--set KEY=VALUE]...

Trains CONFIG on 2 nodes with 2 processes each, with its placement policy and with none, seed by seed one after the other.
Prints a table of the steps before and after the first move, of both runs; rows and picture are in DIR. Needs root and iproute2,
takes about 12 minutes, and wants the machine to itself. What is finished in DIR is not run again.

  --config CONFIG    configs/placement.yaml
  --rate RATE        of each node's link (100mbit)
  --seeds N          seeds (2)
  --output DIR       runs and results (runs/placement)
  --results DIR      also copy placement.json and placement.svg there, for example docs/results
  --set KEY=VALUE    change one value of the configuration; repeatable
  --help             this text
TEXT
}

here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/job.sh
config=configs/placement.yaml rate=100mbit seeds=2 output=runs/placement
more=()
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --config | --rate | --seeds | --output | --results | --set)
            [ $# -ge 2 ] && [ -n "$2" ] || fail "$1 needs a value"
            case $1 in
                --config) config=$(config_from_here "$2") ;;
                --rate) rate=$2 ;;
                --seeds) seeds=$2 ;;
                --output) output=$(from_here "$2") ;;
                --results) more+=("$1" "$(from_here "$2")") ;;
                *) more+=("$1" "$2") ;;
            esac
            shift
            ;;
        *) fail "unknown flag $1; --help lists the flags" ;;
    esac
    shift
done
[[ $seeds =~ ^[1-9][0-9]*$ ]] || fail "--seeds must be a whole number of at least 1, not $seeds"
[ -f "$config" ] || fail "$config: no such configuration"
[ "$(id -u)" = 0 ] || fail "only root may make network namespaces"

. scripts/venv.sh
use_venv ""
exec python -m comparison.placement "$config" --rate "$rate" --seeds "$seeds" --output "$output" ${more[@]+"${more[@]}"}
