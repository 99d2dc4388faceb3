#!/usr/bin/env bash
# Measures the papers' claims and writes the table of them.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/reproduce.sh [--quick] [--only NAME]... [--again NAME]... [--table]

Runs what is missing of each experiment and writes docs/results.md, its pictures, and its raw numbers as docs/results/*.json. A
case that is there with the same settings is not measured again, so a call that was stopped goes on where it was. Takes one to two
hours and wants the machine to itself. The numbers of longer scripts (compare_routers.sh, measure_placement.sh), which take
hours more, are used as they are unless --again names them.

  --quick        small settings, under 15 minutes; everything goes to runs/reproduce-quick, and docs/results stays as it is
  --only NAME    run only this experiment; repeatable
  --again NAME   measure all of this experiment anew; repeatable
  --table        run nothing, write the page from the numbers there are
  --help         this text

Names: compare_routers, training, gates, capacity, states, forecasts, placement.
TEXT
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
flags=() run=1
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --quick) flags+=("$1") ;;
        --table) flags+=("$1") run=0 ;;
        --only | --again)
            [ $# -ge 2 ] || { echo "reproduce.sh: $1 needs a name" >&2; exit 2; }
            [[ $2 =~ ^(compare_routers|training|gates|capacity|states|forecasts|placement)$ ]] || { echo "reproduce.sh: $1 $2: no such experiment; --help lists them" >&2; exit 2; }
            flags+=("$1" "$2")
            shift
            ;;
        *)
            echo "reproduce.sh: unknown flag $1; --help lists the flags" >&2
            exit 2
            ;;
    esac
    shift
done

. scripts/venv.sh
use_venv forecast # ARIMA
[ $run = 0 ] || [ -e data/corpus ] || bash scripts/fetch_corpus.sh --python .venv/bin/python
exec python -m study.reproduce ${flags[@]+"${flags[@]}"}
