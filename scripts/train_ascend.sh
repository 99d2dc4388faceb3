#!/usr/bin/env bash
# Trains one configuration on Ascend servers: this one's part of the job, or with --hostfile all of it over ssh.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/train_ascend.sh [CONFIG] [--ranks-per-node N] [--nodes N --node-rank K --master-addr ADDRESS]
                                    [--hostfile FILE] [--dry-run] [flags below] [flags of scripts/train.sh]

Trains CONFIG (configs/ascend/small.yaml) with one process for each device. Without --nodes: on this server alone. With
--nodes: start it on every server with its own --node-rank. With --hostfile: start it once, it starts the others by ssh.
Repository, data and run directory must be at the same paths on all servers, on a file system they share.

  --ranks-per-node N     devices of each server (8; Atlas A3 servers have 16)
  --nodes N              servers (1)
  --node-rank K          which of them this one is, from 0 (0)
  --master-addr ADDRESS  of server 0 (127.0.0.1 for one server)
  --master-port PORT     of the scheduler on server 0 (8118)
  --hostfile FILE        a host name or address on each line, server 0 first; # begins a comment
  --dry-run              print exactly what would run, and run nothing
  --no-preflight         start even if the pre-flight checks fail
  --expect HASH          stop unless configuration and code here have this hash (--dry-run prints it)
  --disk-gb N            free space the run directory must have (50)
  --deterministic        the same numbers in every run, more slowly
  --buffer-mb N          HCCL_BUFFSIZE (from the size of the messages)
  --connect-timeout S    HCCL_CONNECT_TIMEOUT, 120 to 7200 (600; over 128 devices 1800)
  --exec-timeout S       HCCL_EXEC_TIMEOUT (1836)
  --hccl-algo TEXT       HCCL_ALGO, for example 'level0:NA;level1:pairwise' (HCCL's own choice)
  --no-bind              do not bind processes to CPU cores
  --python PROGRAM       Python with MindSpore (.venv/bin/python if there, else python3)
  --set KEY=VALUE        as for scripts/train.sh
  --run-dir DIR          as for scripts/train.sh (runs/CONFIG-N-ranks)
  --resume auto|never    as for scripts/train.sh
  --init-from CHECKPOINT as for scripts/train.sh
  --no-progress          as for scripts/train.sh
  --help                 this text

Exit codes: 0 trained; 1 the job failed; 2 something here is wrong with the flags or the configuration; 3 a server is not ready;
129, 130, 143 stopped by a signal (128 + its number), state saved.
Settings already in the environment (HCCL_SOCKET_IFNAME, HCCL_IF_BASE_PORT, ASCEND_RT_VISIBLE_DEVICES, MS_*) are kept.
TEXT
}

number() { # FLAG VALUE LEAST MOST
    [[ $2 =~ ^[0-9]{1,9}$ ]] && [ "$2" -ge "$3" ] && [ "$2" -le "$4" ] || fail "$1 $2: must be a number from $3 to $4"
}

here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/job.sh
config=configs/ascend/small.yaml per_node=8 nodes=1 node_rank='' master='' port=8118 hostfile='' dry_run='' preflight=yes
expect='' disk_gb=50 deterministic='' buffer='' connect='' execute=1836 algo='' bind=True python='' run_dir='' resume=never
sets=() rest=()
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --dry-run) dry_run=yes ;;
        --no-preflight) preflight='' ;;
        --deterministic) deterministic=yes ;;
        --no-bind) bind='' ;;
        --no-progress) rest+=(--no-progress) ;;
        --ranks-per-node | --nodes | --node-rank | --master-addr | --master-port | --hostfile | --expect | --disk-gb | --buffer-mb | \
            --connect-timeout | --exec-timeout | --hccl-algo | --python | --set | --run-dir | --resume | --init-from)
            [ $# -ge 2 ] && [ -n "$2" ] || fail "$1 needs a value"
            case $1 in
                --ranks-per-node) per_node=$2 ;;
                --nodes) nodes=$2 ;;
                --node-rank) node_rank=$2 ;;
                --master-addr) master=$2 ;;
                --master-port) port=$2 ;;
                --hostfile) hostfile=$2 ;;
                --expect) expect=$2 ;;
                --disk-gb) disk_gb=$2 ;;
                --buffer-mb) buffer=$2 ;;
                --connect-timeout) connect=$2 ;;
                --exec-timeout) execute=$2 ;;
                --hccl-algo) algo=$2 ;;
                --python) python=$2 ;;
                --set) sets+=("$2") ;;
                --run-dir) run_dir=$(from_here "$2") ;;
                --resume) resume=$2 ;;
                --init-from) rest+=("$1" "$(from_here "$2")") ;;
                *) rest+=("$1" "$2") ;;
            esac
            shift
            ;;
        -*) fail "unknown flag $1; --help lists the flags" ;;
        *) config=$(config_from_here "$1") ;;
    esac
    shift
done

hosts=()
if [ -n "$hostfile" ]; then
    [ -z "$node_rank$master" ] && [ "$nodes" = 1 ] || fail "--hostfile says what --nodes, --node-rank and --master-addr would: give it alone"
    case $hostfile in /*) ;; *) hostfile=$here/$hostfile ;; esac
    [ -f "$hostfile" ] || fail "--hostfile $hostfile: no such file"
    while read -r host _; do
        case $host in '' | '#'*) ;; *) hosts+=("$host") ;; esac
    done <"$hostfile"
    [ ${#hosts[@]} -gt 0 ] || fail "--hostfile $hostfile: names no host"
    nodes=${#hosts[@]} master=${hosts[0]} node_rank=0
fi
number --nodes "$nodes" 1 4096
number --ranks-per-node "$per_node" 1 64
number --master-port "$port" 1024 65535
if [ "$nodes" -gt 1 ]; then
    [ -n "$node_rank" ] || fail "--nodes $nodes: say which of them this is with --node-rank"
    [ -n "$master" ] || fail "--nodes $nodes: say where server 0 is with --master-addr"
    case $master in 127.* | localhost) fail "--master-addr $master: the other servers cannot reach it" ;; esac
fi
node_rank=${node_rank:-0} master=${master:-127.0.0.1}
number --node-rank "$node_rank" 0 $((nodes - 1))
ranks=$((nodes * per_node))
[ "$ranks" -gt 128 ] && large=yes || large=''
connect=${connect:-${large:+1800}} connect=${connect:-600}
number --connect-timeout "$connect" 120 7200
number --exec-timeout "$execute" 68 17340
number --disk-gb "$disk_gb" 0 1000000
case $resume in auto | never) ;; *) fail "--resume $resume: must be auto or never" ;; esac
[ -f "$config" ] || fail "$config: no such configuration"
if [ -z "$python" ]; then
    python=python3
    [ -x .venv/bin/python ] && python=.venv/bin/python
fi
command -v "$python" >/dev/null || fail "--python $python: is not a program"
python=$(command -v "$python")
case $python in /*) ;; *) python=$PWD/$python ;; esac
run_dir=${run_dir:-runs/$(basename "$config" .yaml)-$ranks-ranks}
overrides=("${sets[@]}" "parallel.nodes=$nodes")
flags=()
for value in "${overrides[@]}"; do flags+=(--set "$value"); done

# Reads the configuration: what is wrong with it is said here, once, and not by every rank.
problem=$(mktemp)
trap 'rm -f "$problem"' EXIT
suggested=$(PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} "$python" -m pangu_locmoe.check "$config" "$ranks" "${overrides[@]}" 2>"$problem") ||
    fail "$(grep -v -e '^\[WARNING\]' -e '^ ' "$problem" | head -n 1)"
buffer=${buffer:-$suggested}
number --buffer-mb "$buffer" 1 100000
hash=$("$python" scripts/preflight_ascend.py "$config" "${flags[@]}" --fingerprint)

quoted() { printf '%q ' "$@"; }

if [ ${#hosts[@]} -gt 0 ]; then
    pass=(--nodes "$nodes" --master-addr "$master" --master-port "$port" --ranks-per-node "$per_node" --expect "$hash" --disk-gb "$disk_gb"
        --buffer-mb "$buffer" --connect-timeout "$connect" --exec-timeout "$execute" --python "$python" --run-dir "$run_dir" --resume "$resume")
    [ -n "$algo" ] && pass+=(--hccl-algo "$algo")
    [ -n "$deterministic" ] && pass+=(--deterministic)
    [ -n "$bind" ] || pass+=(--no-bind)
    [ -n "$preflight" ] || pass+=(--no-preflight)
    for value in "${sets[@]}"; do pass+=(--set "$value"); done
    started=()
    stop() {
        # With -tt the far side's shell gets a hang-up when ssh ends, and ends its ranks.
        for pid in "${started[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
    }
    trap 'stop; exit 130' INT
    trap 'stop; exit 143' TERM
    trap 'stop; exit 129' HUP
    [ -n "$dry_run" ] || mkdir -p "$run_dir/logs"
    for index in "${!hosts[@]}"; do
        remote="cd $(quoted "$PWD")&& exec bash scripts/train_ascend.sh $(quoted "$config" --node-rank "$index" "${pass[@]}" "${rest[@]}")"
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
        if [ $done_code -ne 0 ]; then
            echo "train_ascend.sh: ${hosts[index]} ended with exit code $done_code; its log is $run_dir/logs/node-$index.log" >&2
            [ $code -ne 0 ] || code=$done_code
            stop
        fi
    done
    # ssh says 255 where it could not connect.
    case $code in [0-3] | 129 | 130 | 143) ;; *) code=1 ;; esac
    exit $code
fi

logs=$run_dir/logs/node-$node_rank
settings=(
    PANGU_LOCMOE_DEVICE=Ascend
    "PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}"
    "PATH=$(dirname "$python"):\$PATH" # msrun starts the first python of the PATH
    "HCCL_CONNECT_TIMEOUT=$connect"
    "HCCL_EXEC_TIMEOUT=$execute"
    "HCCL_BUFFSIZE=$buffer"
)
[ -n "$deterministic" ] && settings+=(HCCL_DETERMINISTIC=true)
[ -n "$algo" ] && settings+=("HCCL_ALGO=$algo")
# A scheduler that serves many processes answers late.
[ -n "$large" ] && [ -z "${MS_NODE_TIMEOUT:-}" ] && settings+=(MS_NODE_TIMEOUT=1800)
launcher=$(dirname "$python")/msrun
command=("$launcher" --worker_num "$ranks" --local_worker_num "$per_node" --master_addr "$master" --master_port "$port"
    --node_rank "$node_rank" --join=True --cluster_time_out "$connect" --log_dir "$logs")
[ -n "$bind" ] && command+=(--bind_core=True)
command+=("$PWD/pangu_locmoe/cli/launch.py" train "$config" "${flags[@]}" --run-dir "$run_dir" --resume "$resume" "${rest[@]}")
check=("$python" scripts/preflight_ascend.py "$config" "${flags[@]}" --ranks "$per_node" --run-dir "$run_dir" --disk-gb "$disk_gb")
[ "$node_rank" = 0 ] && check+=(--master-port "$port")
[ -n "$expect" ] && check+=(--expect "$expect")

if [ -n "$dry_run" ]; then
    echo "# server $node_rank of $nodes, $ranks ranks; hash of configuration and code: $hash"
    echo "cd $(printf '%q' "$PWD")"
    [ -n "$preflight" ] && { quoted "${check[@]}"; echo "|| exit 3"; }
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

if [ -n "$preflight" ]; then
    "${check[@]}" || {
        echo "train_ascend.sh: server $node_rank ($(hostname)) is not ready, see above; --no-preflight starts all the same" >&2
        exit 3
    }
fi
for setting in "${settings[@]}"; do
    case $setting in
        PATH=*) export PATH="$(dirname "$python"):$PATH" ;;
        *) export "${setting?}" ;;
    esac
done
[ -x "$launcher" ] || fail "--python $python: has no msrun beside it"
mkdir -p "$logs"
set +e
# A session of its own: Ctrl-C would make msrun kill the ranks before they have saved anything.
setsid "${command[@]}" >"$logs/msrun.log" 2>&1 &
job=$!
# On a signal the ranks save their state and end by themselves; the next signal ends everything at once.
stopped=0
stop() { # stop SIGNAL CODE
    stopped=$2
    trap "signal_role KILL MS_WORKER; signal_role KILL MS_SCHED; exit $2" INT TERM HUP
    signal_role "$1" MS_WORKER
}
trap 'stop INT 130' INT
trap 'stop TERM 143' TERM
trap 'stop HUP 129' HUP
# msrun numbers the logs of a server's ranks from the server's first.
tail --pid=$job --retry -n +1 -qf "$logs/worker_$((node_rank * per_node)).log" 2>/dev/null |
    grep --line-buffered -v -e '^\[WARNING\]' -e '^\[INFO\]' -e '^$' &
wait $job
code=$?
while kill -0 $job 2>/dev/null; do # `wait` returns early when a signal comes
    wait $job
    code=$?
done
sleep 0.2
[ $stopped != 0 ] || stopped=$(stopped_code "$logs")
if [ $stopped != 0 ]; then
    code=$stopped
elif [ $code -ne 0 ]; then
    grep -hs '^pangu-locmoe: ' "$logs"/worker_*.log | sort -u | head -n 1 >&2
    echo "train_ascend.sh: the job failed on server $node_rank (exit code $code); logs are in $logs" >&2
    [ $code -le 3 ] || code=1
fi
exit $code
