#!/usr/bin/env bash
#SBATCH --job-name=pangu-locmoe
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --output=slurm-%j.log
# An example for Slurm: one task on each server, which starts train_ascend.sh there. How a cluster hands out its devices
# (--gres, a partition) differs; add that above. Never run on a cluster.
set -euo pipefail

repository=${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..} # sbatch runs a copy of this file
[ -f "$repository/scripts/train_ascend.sh" ] || {
    echo "slurm_ascend.sh: submit it from the repository, not from $repository" >&2
    exit 2
}
# shellcheck source=scripts/flags.sh
. "$repository/scripts/flags.sh"
script=slurm_ascend.sh # the copy has another name

describe <<'TEXT'
Inside a Slurm job: starts this job's servers, with --nodes, --node-rank and --master-addr from Slurm. Submit it from the
repository: sbatch --nodes 8 scripts/slurm_ascend.sh --ranks-per-node 8 CONFIG
TEXT
hands_on others CONFIG 'what to train, and the flags of scripts/train_ascend.sh'
switch --dry-run 'print the srun command, and run nothing'
parse_flags "$@"
known=$(bash scripts/train_ascend.sh --help)
for argument in "${others[@]}"; do
    [[ $argument == --* ]] || continue
    [[ " --nodes --node-rank --master-addr --hostfile " != *" $argument "* ]] || fail "$argument comes from Slurm: leave it out"
    [[ $known == *"  $argument "* ]] || fail "unknown flag $argument; --help lists the flags"
done
[ -n "${SLURM_JOB_NUM_NODES:-}" ] || fail "not inside a Slurm job: submit it with sbatch"
master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# shellcheck disable=SC2016 # each server's own shell knows which it is
part='exec bash scripts/train_ascend.sh --nodes "$SLURM_JOB_NUM_NODES" --node-rank "$SLURM_NODEID" "$@"'
command=(srun --kill-on-bad-exit=1 --label bash -c "$part" train --master-addr "$master" "${others[@]}")
if [ -n "$dry_run" ]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
exec "${command[@]}"
