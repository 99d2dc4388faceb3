#!/usr/bin/env bash
# Compares hash, switch and locmoe on an emulated cluster: seconds, bytes between nodes, balance, loss.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/compare_routers.sh [--quick] [--output DIR] [--seeds N] [--more-seeds N] [--steps N] [--timing-steps N] [--shares A,B]
                                       [--rates A,B] [--core] [--only NAME]... [--results DIR] [--config CONFIG] [--set KEY=VALUE]...

Trains every router on the same text, seeds and steps, finds the link rates at which the exchange takes 18% and 29% of
hash's step, and times the last steps of every run on 2 nodes with 2 processes each. Prints a table; rows, table and picture
are in DIR. Needs root and iproute2, takes hours, and wants the machine to itself. What is finished in DIR is not run again.

  --quick            1 seed, 40 steps, one share, four variants: under 15 minutes on 2 idle cores
  --output DIR       runs and results (runs/compare; with --quick runs/compare-quick)
  --seeds N          seeds of the four main variants (3)
  --more-seeds N     seeds of the others (as many)
  --steps N          training steps (120)
  --timing-steps N   the last steps, which are made again on the cluster (16)
  --shares A,B       percent of hash's step that the exchange takes (18,29)
  --rates A,B        link rates such as 90mbit,200mbit, instead of shares
  --core             only the four main variants: hash, switch and locmoe with one level, hash with two; domain sharding
  --only NAME        only this variant: router-levels-sharding, such as locmoe-2-domain, or with -bound; repeatable
  --results DIR      add rows, table and picture to what is there, for example docs/results
  --config CONFIG    model and training (configs/compare.yaml)
  --set KEY=VALUE    change one value of it; repeatable
  --help             this text
TEXT
}

here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/job.sh
config=configs/compare.yaml output='' seeds=3 more_seeds='' steps=120 timing_steps=16 shares=18,29 rates=''
more=()
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --quick)
            seeds=1 steps=40 timing_steps=12 shares=18 output=${output:-runs/compare-quick}
            more+=(--core --set train.warmup_steps=10)
            ;;
        --core) more+=(--core) ;;
        --output | --seeds | --more-seeds | --steps | --timing-steps | --shares | --rates | --only | --results | --config | --set)
            [ $# -ge 2 ] && [ -n "$2" ] || fail "$1 needs a value"
            case $1 in
                --output) output=$(from_here "$2") ;;
                --seeds) seeds=$2 ;;
                --more-seeds) more_seeds=$2 ;;
                --steps) steps=$2 ;;
                --timing-steps) timing_steps=$2 ;;
                --shares) shares=$2 ;;
                --rates) rates=$2 ;;
                --config) config=$(config_from_here "$2") ;;
                --results) more+=("$1" "$(from_here "$2")") ;;
                --set) sets+=("$1" "$2") ;;
                *) more+=("$1" "$2") ;;
            esac
            shift
            ;;
        *) fail "unknown flag $1; --help lists the flags" ;;
    esac
    shift
done
more_seeds=${more_seeds:-$seeds}
for flag in seeds more_seeds steps timing_steps; do
    [[ ${!flag} =~ ^[1-9][0-9]*$ ]] || fail "--${flag//_/-} must be a whole number of at least 1, not ${!flag}"
done
[[ $shares =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "--shares must be percentages such as 18,29, not $shares"
[[ $rates =~ ^([0-9]+mbit(,[0-9]+mbit)*)?$ ]] || fail "--rates must be rates such as 90mbit,200mbit, not $rates"
[ "$timing_steps" -ge 6 ] || fail "--timing-steps must be at least 6: the first 4 only warm up"
[ "$steps" -ge $((2 * timing_steps)) ] || fail "--steps must be at least twice --timing-steps"
[ "$(id -u)" = 0 ] || fail "only root may make network namespaces"
for tool in ip tc; do
    command -v $tool >/dev/null || fail "needs $tool of iproute2: apt-get install iproute2"
done

prepare_corpus
python -m pangu_locmoe prepare "$config" "${sets[@]}" >/dev/null
exec python -m comparison.routers "$config" --output "${output:-runs/compare}" --seeds "$seeds" --more-seeds "$more_seeds" --steps "$steps" \
    --timing-steps "$timing_steps" --shares "$shares" --rates "$rates" "${more[@]}" "${sets[@]}"
