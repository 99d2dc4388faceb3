#!/usr/bin/env bash
# Simulates the paper's clusters: prints the table of docs/simulate.md, and draws its pictures.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

describe <<'TEXT'
Simulates the step times of the paper's clusters under each assumption that the paper leaves open, and prints them as a table.
TEXT
handed drawn --images DIR 'also draw simulate_sensitivity.svg and simulate_scale.svg there, for example docs/images'
parse_flags "$@"

. scripts/venv.sh
use_venv ""
exec python -m simulation.paper "${drawn[@]}"
