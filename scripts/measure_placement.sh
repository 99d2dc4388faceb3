#!/usr/bin/env bash
# Measures what moving experts to their tokens brings on an emulated cluster: seconds and bytes before and after.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/job.sh"

describe <<'TEXT'
Trains CONFIG on 2 nodes with 2 processes each, with its placement policy and with none, seed by seed one after the other.
Prints a table of the steps before and after the first move, of both runs; rows and picture are in DIR. Needs root and iproute2,
takes about 12 minutes, and wants the machine to itself. What is finished in DIR is not run again.
TEXT
flag --config CONFIG configs/placement.yaml 'model, training and placement'
flag --rate RATE 100mbit "of each node's link"
flag --seeds N 2 'seeds'
flag --output DIR runs/placement 'runs and results'
handed more --results DIR 'also copy placement.json and placement.svg there, for example docs/results'
handed more --set KEY=VALUE 'change one value of the configuration; repeatable'
parse_flags "$@"
check_rate
needs_namespaces

find_python
exec python -m comparison.placement "$config" --rate "$rate" --seeds "$seeds" --output "$output" "${more[@]}"
