#!/usr/bin/env bash
# Trains one configuration in several processes on this machine's CPUs, over MindSpore's own collectives.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/train_cpu_cluster.sh [CONFIG] [--ranks N] [--nodes N] [--ranks-per-node N] [--port PORT] [--set KEY=VALUE]...
                                         [--run-dir DIR] [--resume auto|never] [--init-from CHECKPOINT] [--no-progress]

Trains CONFIG (configs/cpu_cluster.yaml) with several processes, all of which share the experts of each layer unless the
configuration says how many do (parallel.expert_parallel). The exit code is the job's; 2: it was refused before it began.
The logs of all ranks are in DIR/logs.

  --ranks N            processes (4, or as many as --nodes and --ranks-per-node make)
  --nodes N            nodes that they count as (parallel.nodes)
  --ranks-per-node N   processes that count as one node, instead of --nodes or --ranks
  --port PORT          port of msrun's scheduler (8118)
  --help               this text
  the rest             as for scripts/train.sh
TEXT
}

here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/job.sh
shape=() port=8118
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --ranks | --nodes | --ranks-per-node | --port)
            [ $# -ge 2 ] || fail "$1 needs a value"
            [[ $2 =~ ^[1-9][0-9]{0,4}$ ]] || fail "$1 must be a whole number of at least 1, not $2"
            case $1 in
                --port) port=$2 ;;
                *) shape+=("$1" "$2") ;;
            esac
            shift 2
            ;;
        *)
            take_train_flag "$@"
            shift "$taken"
            ;;
    esac
done
plan_job "${shape[@]}"
! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || fail "--port $port: in use; give another one"

# A dead rank is noticed here, by msrun; one that is only late, or stopped for a while, is waited for.
export MS_NODE_TIMEOUT=${MS_NODE_TIMEOUT:-60}
prepare_job "$ranks-ranks"
# A session of its own: Ctrl-C would make msrun kill the ranks before they have saved anything.
setsid msrun --worker_num "$ranks" --local_worker_num "$ranks" --master_addr 127.0.0.1 --master_port "$port" --join=True \
    --cluster_time_out 120 --log_dir "$run_dir/logs" "$launch" \
    train "$config" "${sets[@]}" \
    --run-dir "$run_dir" --resume "$resume" "${rest[@]}" "${progress[@]}" >"$run_dir/logs/msrun.log" 2>&1 &
job=$!

# On a signal the ranks save their state and end by themselves; the next signal ends everything at once.
stopped=0
stop() { # stop SIGNAL CODE
    stopped=$2
    trap "signal_role KILL MS_WORKER; signal_role KILL MS_SCHED; exit $2" INT TERM HUP
    signal_role "$1" MS_WORKER
    echo "train_cpu_cluster.sh: stopping after this step" >&2 || true # the terminal may be gone
}
trap 'stop INT 130' INT
trap 'stop TERM 143' TERM
trap 'stop HUP 129' HUP
show_job $job

# msrun waits for its scheduler, which takes ten seconds to notice that the ranks are gone.
while kill -0 $job 2>/dev/null; do
    ! grep -qs 'exit with exception' "$run_dir/logs/msrun.log" || signal_role KILL MS_SCHED
    sleep 0.5 || true
done
code=0
wait $job || code=$?
[ $stopped != 0 ] || stopped=$(stopped_code)
[ $stopped = 0 ] || code=$stopped
sleep 0.2
[ $stopped != 0 ] || explain_job $code
exit $code
