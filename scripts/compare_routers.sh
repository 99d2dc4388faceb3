#!/usr/bin/env bash
# Compares hash, switch and locmoe on an emulated cluster: seconds, bytes between nodes, balance, loss.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/job.sh"

describe <<'TEXT'
Trains every router on the same text, seeds and steps, finds the link rates at which the exchange takes 18% and 29% of
hash's step, and times the last steps of every run on 2 nodes with 2 processes each. Prints a table; rows, table and picture
are in DIR. Needs root and iproute2, takes hours, and wants the machine to itself. What is finished in DIR is not run again.
TEXT
switch --quick '1 seed, 40 steps, one share, four variants: under 15 minutes on 2 idle cores'
flag --output DIR runs/compare 'runs and results; with --quick runs/compare-quick'
flag --seeds N 3 'seeds of the four main variants'
flag --more-seeds N '' 'seeds of the others (as many)'
flag --steps N 120 'training steps'
flag --timing-steps N 16 'the last steps, which are made again on the cluster'
flag --shares A,B 18,29 "percent of hash's step that the exchange takes"
flag --rates A,B '' 'link rates such as 90mbit,200mbit, instead of shares'
handed more --core '' 'only the four main variants: hash, switch and locmoe with one level, hash with two; domain sharding'
handed more --only NAME 'only this variant: router-levels-sharding, such as locmoe-2-domain, or with -bound; repeatable'
handed more --results DIR 'add rows, table and picture to what is there, for example docs/results'
flag --config CONFIG configs/compare.yaml 'model and training'
handed sets --set KEY=VALUE 'change one value of it; repeatable'
parse_flags "$@"
if [ -n "$quick" ]; then
    unless_given --output runs/compare-quick
    unless_given --seeds 1
    unless_given --steps 40
    unless_given --timing-steps 12
    unless_given --shares 18
    more+=(--core --set train.warmup_steps=10)
fi
[[ $shares =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "--shares must be percentages such as 18,29, not $shares"
[[ $rates =~ ^([0-9]+mbit(,[0-9]+mbit)*)?$ ]] || fail "--rates must be rates such as 90mbit,200mbit, not $rates"
[ "$timing_steps" -ge 6 ] || fail "--timing-steps must be at least 6: the first 4 only warm up"
[ "$steps" -ge $((2 * timing_steps)) ] || fail "--steps must be at least twice --timing-steps"
needs_namespaces

prepare_corpus
python -m pangu_locmoe prepare "$config" "${sets[@]}" >/dev/null
exec python -m comparison.routers "$config" --output "$output" --seeds "$seeds" --more-seeds "${more_seeds:-$seeds}" \
    --steps "$steps" --timing-steps "$timing_steps" --shares "$shares" --rates "$rates" "${more[@]}" "${sets[@]}"
