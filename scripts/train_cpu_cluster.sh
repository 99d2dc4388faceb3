#!/usr/bin/env bash
# Trains one configuration in several processes on this machine's CPUs, over MindSpore's own collectives.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/train_cpu_cluster.sh --ranks N [CONFIG] [--ranks-per-node N] [--port PORT] [--set KEY=VALUE]...
                                         [--run-dir DIR] [--resume auto|never] [--init-from CHECKPOINT] [--no-progress]

Trains CONFIG (configs/cpu_cluster.yaml) with N processes that share the experts of each layer. The exit code is the
job's; the logs of all ranks are in DIR/logs.

  --ranks N            processes
  --ranks-per-node N   processes that count as one node (all)
  --port PORT          port of msrun's scheduler (8118)
  --help               this text
  the rest             as for scripts/train.sh
TEXT
}

fail() {
    echo "train_cpu_cluster.sh: $1" >&2
    exit 2
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
config=configs/cpu_cluster.yaml ranks='' per_node='' port=8118 run_dir='' resume=never
rest=() progress=()
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --no-progress) progress=(--no-progress) ;;
        --ranks | --ranks-per-node | --port | --run-dir | --resume | --set | --init-from)
            [ $# -ge 2 ] || fail "$1 needs a value"
            case $1 in
                --ranks) ranks=$2 ;;
                --ranks-per-node) per_node=$2 ;;
                --port) port=$2 ;;
                --run-dir) run_dir=$2 ;;
                --resume) resume=$2 ;;
                *) rest+=("$1" "$2") ;;
            esac
            shift
            ;;
        -*) fail "unknown flag $1; --help lists the flags" ;;
        *) config=$1 ;;
    esac
    shift
done
[[ $ranks =~ ^[1-9][0-9]*$ ]] || fail "--ranks must be a number of processes, at least 1"
per_node=${per_node:-$ranks}
[[ $per_node =~ ^[1-9][0-9]*$ ]] || fail "--ranks-per-node must be a number, at least 1"
[ -f "$config" ] || fail "$config: no such configuration"

. scripts/venv.sh
use_venv ""
if python - "$port" <<'PY'
import socket, sys
sys.exit(socket.socket().connect_ex(("127.0.0.1", int(sys.argv[1]))))
PY
then
    fail "--port $port: in use; give another one"
fi
if [ ! -e data/corpus ] && grep -q data/corpus "$config" configs/cpu_base.yaml; then
    bash scripts/fetch_corpus.sh --python .venv/bin/python
fi
if [ -z "$run_dir" ]; then
    run_dir=runs/$(basename "$config" .yaml)-$ranks-ranks
    number=2
    while [ "$resume" = never ] && [ -e "$run_dir" ]; do
        run_dir=runs/$(basename "$config" .yaml)-$ranks-ranks-$number
        number=$((number + 1))
    done
fi
mkdir -p "$run_dir/logs"
rm -f "$run_dir"/logs/*.log # what an earlier part of the run printed

threads=$(($(nproc) / ranks))
export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
# Joining takes 10 seconds instead of 30 with short retries. A dead rank ends the job after MS_NODE_TIMEOUT seconds; a late
# one has MS_CPU_COMM_OP_TIMEOUT seconds to arrive.
export MS_RETRY_INTERVAL_LOWER=1 MS_RETRY_INTERVAL_UPPER=1
export MS_NODE_TIMEOUT=${MS_NODE_TIMEOUT:-5} MS_CPU_COMM_OP_TIMEOUT=${MS_CPU_COMM_OP_TIMEOUT:-120}
set +e
msrun --worker_num "$ranks" --local_worker_num "$ranks" --master_addr 127.0.0.1 --master_port "$port" --join=True \
    --cluster_time_out 120 --log_dir "$run_dir/logs" "$(python -c 'import pangu_locmoe.launch as m; print(m.__file__)')" \
    train "$config" --set "parallel.ranks_per_node=$per_node" --set "parallel.expert_parallel=$ranks" \
    --run-dir "$run_dir" --resume "$resume" "${rest[@]}" "${progress[@]}" >"$run_dir/logs/msrun.log" 2>&1 &
job=$!
(   # msrun waits for its scheduler, which takes ten seconds to notice that the ranks are gone.
    while kill -0 $job 2>/dev/null; do
        if grep -qs 'exit with exception' "$run_dir/logs/msrun.log"; then
            for process in $(pgrep -P $job); do
                ! grep -qsz '^MS_ROLE=MS_SCHED$' "/proc/$process/environ" || kill -KILL "$process"
            done
        fi
        sleep 0.5
    done
) &
trap 'kill -TERM $job 2>/dev/null' TERM INT
tail --pid=$job --retry -n +1 -qf "$run_dir/logs/worker_0.log" 2>/dev/null | grep --line-buffered -v -e '^\[WARNING\]' -e '^\[INFO\]' -e '^$' &
wait $job
code=$?
sleep 0.2
if [ $code -ne 0 ]; then
    reason=$(python scripts/explain_job.py "$run_dir/logs")
    [ -z "$reason" ] || grep -qsxF "pangu-locmoe: $reason" "$run_dir/logs/worker_0.log" || echo "train_cpu_cluster.sh: $reason" >&2
    echo "train_cpu_cluster.sh: the job failed (exit code $code); logs are in $run_dir/logs" >&2
fi
exit $code
