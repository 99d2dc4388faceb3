#!/usr/bin/env bash
# Measures the papers' claims and writes the table of them.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

describe <<'TEXT'
Runs what is missing of each experiment and writes docs/results.md, its pictures, and its raw numbers as docs/results/*.json. A
case that is there with the same settings is not measured again, so a call that was stopped goes on where it was. Takes one to two
hours and wants the machine to itself. The numbers of longer scripts (compare_routers.sh, measure_placement.sh), which take
hours more, are used as they are unless --again names them.
TEXT
experiments='compare_routers|routing|experts_per_node|late|training|gates|capacity|states|forecasts|placement'
handed chosen --quick '' 'small settings, under 15 minutes; everything goes to runs/reproduce-quick, and docs/results stays as it is'
handed chosen --only "$experiments" 'run only this experiment; repeatable'
handed chosen --again "$experiments" 'measure all of this experiment anew; repeatable'
handed chosen --table '' 'run nothing, write the page from the numbers there are'
parse_flags "$@"

. scripts/venv.sh
use_venv forecast # ARIMA
given --table || [ -e data/corpus ] || bash scripts/fetch_corpus.sh --python .venv/bin/python
exec python -m study.reproduce "${chosen[@]}"
