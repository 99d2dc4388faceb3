#!/usr/bin/env bash
#SBATCH --job-name=pangu-locmoe
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --output=slurm-%j.log
# An example for Slurm: one task on each server, which starts train_ascend.sh there. How a cluster hands out its devices
# (--gres, a partition) differs; add that above. Never run on a cluster.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/slurm_ascend.sh [--dry-run] [flags of scripts/train_ascend.sh]
       sbatch --nodes 8 scripts/slurm_ascend.sh [flags of scripts/train_ascend.sh]

Inside a Slurm job: starts this job's servers, with --nodes, --node-rank and --master-addr from Slurm. Submit it from the
repository.

  --dry-run  print the srun command, and run nothing
  --help     this text
TEXT
}

fail() {
    echo "slurm_ascend.sh: $1" >&2
    exit 2
}

dry_run='' flags=()
here=${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..} # sbatch runs a copy of this file
[ -f "$here/scripts/train_ascend.sh" ] || fail "submit it from the repository, not from $here"
known=$(bash "$here/scripts/train_ascend.sh" --help)
for argument in "$@"; do
    case $argument in
        --help | -h) usage; exit 0 ;;
        --dry-run) dry_run=yes ;;
        --*)
            [[ " --nodes --node-rank --master-addr --hostfile " != *" $argument "* ]] || fail "$argument comes from Slurm: leave it out"
            [[ $known == *"  $argument "* ]] || fail "unknown flag $argument; --help lists the flags"
            flags+=("$argument")
            ;;
        *) flags+=("$argument") ;;
    esac
done
[ -n "${SLURM_JOB_NUM_NODES:-}" ] || fail "not inside a Slurm job: submit it with sbatch"
cd "$here"
master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
part='exec bash scripts/train_ascend.sh --nodes "$SLURM_JOB_NUM_NODES" --node-rank "$SLURM_NODEID" "$@"'
command=(srun --kill-on-bad-exit=1 --label bash -c "$part" train --master-addr "$master" "${flags[@]}")
if [ -n "$dry_run" ]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
exec "${command[@]}"
