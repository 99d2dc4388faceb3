#!/usr/bin/env bash
# Trains one configuration on Ascend servers: this one's part of the job, or with --hostfile all of it over ssh.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/job.sh"

describe <<'TEXT'
Trains CONFIG with one process for each device. Without --nodes: on this server alone. With --nodes: start it on every server with
its own --node-rank. With --hostfile: start it once, it starts the others by ssh. Repository, data and run directory must be at the
same paths on all servers, on a file system they share.

Exit codes: 0 trained; 1 the job failed; 2 something here is wrong with the flags or the configuration; 3 a server is not ready;
129, 130, 143 stopped by a signal (128 + its number), state saved.
Settings already in the environment (HCCL_SOCKET_IFNAME, HCCL_IF_BASE_PORT, ASCEND_RT_VISIBLE_DEVICES, MS_*) are kept.
TEXT
takes CONFIG configs/ascend/small.yaml 'what to train'
flag --ranks-per-node N 8 'devices of each server; Atlas A3 servers have 16' 1 64
flag --nodes N 1 'servers' 1 4096
flag --node-rank N '' 'which of them this one is, from 0 (0)' 0
flag --master-addr ADDRESS '' 'of server 0 (127.0.0.1 for one server)'
flag --master-port PORT 8118 'of the scheduler on server 0' 1024 65535
flag --hostfile FILE '' 'a host name or address on each line, server 0 first; # begins a comment'
switch --dry-run 'print exactly what would run, and run nothing'
switch --no-preflight 'start even if the pre-flight checks fail'
flag --expect HASH '' 'stop unless configuration and code here have this hash (--dry-run prints it)'
flag --disk-gb N 50 'free space the run directory must have' 0 1000000
switch --deterministic 'the same numbers in every run, more slowly'
flag --buffer-mb N '' 'HCCL_BUFFSIZE (from the size of the messages)' 1 100000
flag --connect-timeout N '' 'HCCL_CONNECT_TIMEOUT in seconds, 120 to 7200 (600; over 128 devices 1800)' 120 7200
flag --exec-timeout N 1836 'HCCL_EXEC_TIMEOUT in seconds' 68 17340
flag --hccl-algo TEXT '' "HCCL_ALGO, for example 'level0:NA;level1:pairwise' (HCCL's own choice)"
switch --no-bind 'do not bind processes to CPU cores'
flag --python PROGRAM '' 'Python with MindSpore (.venv/bin/python if there, else python3)'
train_flags runs/CONFIG-N-ranks
parse_flags "$@"

hosts=()
if [ -n "$hostfile" ]; then
    if given --nodes || given --node-rank || given --master-addr; then
        fail "--hostfile says what --nodes, --node-rank and --master-addr would: give it alone"
    fi
    [ -f "$hostfile" ] || fail "--hostfile $hostfile: no such file"
    while read -r host _; do
        case $host in '' | '#'*) ;; *) hosts+=("$host") ;; esac
    done <"$hostfile"
    [ ${#hosts[@]} -gt 0 ] || fail "--hostfile $hostfile: names no host"
    nodes=${#hosts[@]} master_addr=${hosts[0]} node_rank=0
fi
if [ "$nodes" -gt 1 ]; then
    [ -n "$node_rank" ] || fail "--nodes $nodes: say which of them this is with --node-rank"
    [ -n "$master_addr" ] || fail "--nodes $nodes: say where server 0 is with --master-addr"
    case $master_addr in 127.* | localhost) fail "--master-addr $master_addr: the other servers cannot reach it" ;; esac
fi
node_rank=${node_rank:-0} master_addr=${master_addr:-127.0.0.1}
[ "$node_rank" -lt "$nodes" ] || fail "--node-rank must be a whole number from 0 to $((nodes - 1)), not $node_rank"
ranks=$((nodes * ranks_per_node))
[ "$ranks" -gt 128 ] && large=yes || large=''
connect_timeout=${connect_timeout:-${large:+1800}} connect_timeout=${connect_timeout:-600}
[ -f "$config" ] || fail "$config: no such configuration"
if [ -z "$python" ]; then
    python=$PWD/.venv/bin/python
    [ -x "$python" ] || python=$(type -P python3) || fail "no python3 here; say with --python which Python has MindSpore"
fi
run_dir=${run_dir:-runs/$(basename "$config" .yaml)-$ranks-ranks}
given_sets=("${sets[@]}")
sets+=(--set "parallel.nodes=$nodes")
overrides=()
for word in "${sets[@]}"; do
    [ "$word" = --set ] || overrides+=("$word")
done

# Reads the configuration: what is wrong with it is said here, once, and not by every rank.
problem=$(mktemp)
trap 'rm -f "$problem"' EXIT
suggested=$(PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} "$python" -m pangu_locmoe.check "$config" "$ranks" "${overrides[@]}" 2>"$problem") ||
    fail "$(grep -v -e '^\[WARNING\]' -e '^ ' "$problem" | head -n 1)"
buffer_mb=${buffer_mb:-$suggested}
hash=$("$python" scripts/preflight_ascend.py "$config" "${sets[@]}" --fingerprint)

quoted() { printf '%q ' "$@"; }

if [ ${#hosts[@]} -gt 0 ]; then
    pass=(--nodes "$nodes" --master-addr "$master_addr" --master-port "$master_port" --ranks-per-node "$ranks_per_node" --expect "$hash" --disk-gb "$disk_gb"
        --buffer-mb "$buffer_mb" --connect-timeout "$connect_timeout" --exec-timeout "$exec_timeout" --python "$python" --run-dir "$run_dir" --resume "$resume")
    [ -n "$hccl_algo" ] && pass+=(--hccl-algo "$hccl_algo")
    [ -n "$deterministic" ] && pass+=(--deterministic)
    [ -z "$no_bind" ] || pass+=(--no-bind)
    [ -z "$no_preflight" ] || pass+=(--no-preflight)
    started=()
    end_servers() {
        # With -tt the far side's shell gets a hang-up when ssh ends, and ends its ranks.
        for pid in "${started[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
    }
    trap 'end_servers; exit 130' INT
    trap 'end_servers; exit 143' TERM
    trap 'end_servers; exit 129' HUP
    [ -n "$dry_run" ] || mkdir -p "$run_dir/logs"
    for index in "${!hosts[@]}"; do
        remote="cd $(quoted "$PWD")&& exec bash scripts/train_ascend.sh $(quoted "$config" --node-rank "$index" "${pass[@]}" "${given_sets[@]}" "${rest[@]}")"
        remote=${remote% }
        if [ -n "$dry_run" ]; then
            echo "ssh -tt -o BatchMode=yes ${hosts[index]} $(printf '%q' "$remote")"
        elif [ "$index" = 0 ]; then
            ssh -tt -o BatchMode=yes "${hosts[index]}" "$remote" </dev/null 2>&1 | tee "$run_dir/logs/node-$index.log" &
            started+=($!)
        else
            ssh -tt -o BatchMode=yes "${hosts[index]}" "$remote" </dev/null >"$run_dir/logs/node-$index.log" 2>&1 &
            started+=($!)
        fi
    done
    code=0
    for index in "${!started[@]}"; do
        wait "${started[index]}" && done_code=0 || done_code=$?
        if [ "$done_code" -ne 0 ]; then
            echo "$script: ${hosts[index]} ended with exit code $done_code; its log is $run_dir/logs/node-$index.log" >&2
            [ "$code" -ne 0 ] || code=$done_code
            end_servers
        fi
    done
    # ssh says 255 where it could not connect.
    case $code in [0-3] | 129 | 130 | 143) ;; *) code=1 ;; esac
    exit "$code"
fi

logs=$run_dir/logs/node-$node_rank
settings=(
    PANGU_LOCMOE_DEVICE=Ascend
    "PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}"
    "PATH=$(dirname "$python"):\$PATH" # msrun starts the first python of the PATH
    "HCCL_CONNECT_TIMEOUT=$connect_timeout"
    "HCCL_EXEC_TIMEOUT=$exec_timeout"
    "HCCL_BUFFSIZE=$buffer_mb"
)
[ -n "$deterministic" ] && settings+=(HCCL_DETERMINISTIC=true)
[ -n "$hccl_algo" ] && settings+=("HCCL_ALGO=$hccl_algo")
# A scheduler that serves many processes answers late.
[ -n "$large" ] && [ -z "${MS_NODE_TIMEOUT:-}" ] && settings+=(MS_NODE_TIMEOUT=1800)
launcher=$(dirname "$python")/msrun
command=("$launcher" --worker_num "$ranks" --local_worker_num "$ranks_per_node" --master_addr "$master_addr" --master_port "$master_port"
    --node_rank "$node_rank" --join=True --cluster_time_out "$connect_timeout" --log_dir "$logs")
[ -n "$no_bind" ] || command+=(--bind_core=True)
set_training
command+=("${training[@]}")
check=("$python" scripts/preflight_ascend.py "$config" "${sets[@]}" --ranks "$ranks_per_node" --run-dir "$run_dir" --disk-gb "$disk_gb")
[ "$node_rank" = 0 ] && check+=(--master-port "$master_port")
[ -n "$expect" ] && check+=(--expect "$expect")

if [ -n "$dry_run" ]; then
    echo "# server $node_rank of $nodes, $ranks ranks; hash of configuration and code: $hash"
    echo "cd $(printf '%q' "$PWD")"
    [ -n "$no_preflight" ] || { quoted "${check[@]}"; echo "|| exit 3"; }
    for setting in "${settings[@]}"; do
        case $setting in
            PATH=*) echo "export $setting" ;;
            *) echo "export ${setting%%=*}=$(printf '%q' "${setting#*=}")" ;;
        esac
    done
    echo "mkdir -p $(printf '%q' "$logs")"
    echo "$(quoted "${command[@]}")> $(printf '%q' "$logs/msrun.log") 2>&1"
    exit 0
fi

if [ -z "$no_preflight" ]; then
    "${check[@]}" || {
        echo "$script: server $node_rank ($(hostname)) is not ready, see above; --no-preflight starts all the same" >&2
        exit 3
    }
fi
for setting in "${settings[@]}"; do
    case $setting in
        PATH=*) PATH=$(dirname "$python"):$PATH ;;
        *) export "${setting?}" ;;
    esac
done
[ -x "$launcher" ] || fail "--python $python: has no msrun beside it"
mkdir -p "$logs"
set +e
# A session of its own: Ctrl-C would make msrun kill the ranks before they have saved anything.
setsid "${command[@]}" >"$logs/msrun.log" 2>&1 &
job=$!
stop_on_signals
# msrun numbers the logs of a server's ranks from the server's first.
show_job $job "$logs/worker_$((node_rank * ranks_per_node)).log"
wait $job
code=$?
while kill -0 $job 2>/dev/null; do # `wait` returns early when a signal comes
    wait $job
    code=$?
done
sleep 0.2
[ "$stopped" != 0 ] || stopped=$(stopped_code "$logs")
if [ "$stopped" != 0 ]; then
    code=$stopped
elif [ $code -ne 0 ]; then
    grep -hs '^pangu-locmoe: ' "$logs"/worker_*.log | sort -u | head -n 1 >&2
    echo "$script: the job failed on server $node_rank (exit code $code); logs are in $logs" >&2
    [ $code -le 3 ] || code=1
fi
exit "$code"
