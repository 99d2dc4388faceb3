#!/usr/bin/env bash
# Trains one configuration in several processes on this machine's CPUs, over MindSpore's own collectives.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/job.sh"

describe <<'TEXT'
Trains CONFIG with several processes, all of which share the experts of each layer unless the configuration says how many do
(parallel.expert_parallel). The exit code is the job's; 2: it was refused before it began. The logs of all ranks are in DIR/logs.
TEXT
takes CONFIG configs/cpu_cluster.yaml 'what to train'
handed shape --ranks N 'processes (4, or as many as --nodes and --ranks-per-node make)'
handed shape --nodes N 'nodes that they count as (parallel.nodes)'
handed shape --ranks-per-node N 'processes that count as one node, instead of --nodes or --ranks'
flag --port PORT 8118 "port of msrun's scheduler" 1 65535
train_flags runs/CONFIG-N-ranks
parse_flags "$@"
plan_job "${shape[@]}"
! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || fail "--port $port: in use; give another one"

# A dead rank is noticed here, by msrun; one that is only late, or stopped for a while, is waited for.
export MS_NODE_TIMEOUT=${MS_NODE_TIMEOUT:-60}
prepare_job "$ranks-ranks"
setsid msrun "${msrun[@]}" --local_worker_num "$ranks" --master_addr 127.0.0.1 --cluster_time_out 120 \
    "${training[@]}" >"$run_dir/logs/msrun.log" 2>&1 &
job=$!
stop_on_signals
show_job $job "$run_dir/logs/worker_0.log"

# msrun waits for its scheduler, which takes ten seconds to notice that the ranks are gone.
while kill -0 $job 2>/dev/null; do
    ! grep -qs 'exit with exception' "$run_dir/logs/msrun.log" || signal_role KILL MS_SCHED
    sleep 0.5 || true
done
code=0
wait $job || code=$?
end_job $code
