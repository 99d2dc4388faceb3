#!/usr/bin/env bash
# Trains one configuration on a cluster that this machine plays: a network namespace for each node, slow links between them.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/emulate_cluster.sh [CONFIG] [--nodes N] [--ranks-per-node N] [--rate RATE] [--port PORT]
                                       [--set KEY=VALUE]... [--run-dir DIR] [--resume auto|never]
                                       [--init-from CHECKPOINT] [--no-progress]

Trains CONFIG (configs/cpu_cluster.yaml) with one process for each rank of each node. Every node is a network namespace with an address of its
own; a bridge joins them, and both ends of every node's link are limited to RATE. Ranks of one node talk over that node's
loopback. Needs root and iproute2. Whatever was made is removed at the end, also after Ctrl-C. The exit code is the job's;
the logs of all ranks are in DIR/logs, what went over the links is in DIR/links.json.

  --nodes N            nodes (parallel.nodes)
  --ranks-per-node N   processes in each (so many that there are 4 in all, or 1)
  --rate RATE          of a link in each direction, as tc writes it: 50mbit, 1gbit; or unlimited (50mbit)
  --port PORT          port of msrun's scheduler (8118); namespaces have ports of their own, so that jobs do not collide
  --help               this text
  the rest             as for scripts/train.sh
TEXT
}

here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/job.sh
shape=() rate=50mbit port=8118
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --nodes | --ranks-per-node | --rate | --port)
            [ $# -ge 2 ] || fail "$1 needs a value"
            [ "$1" = --rate ] || [[ $2 =~ ^[1-9][0-9]{0,4}$ ]] || fail "$1 must be a whole number of at least 1, not $2"
            case $1 in
                --rate) rate=$2 ;;
                --port) port=$2 ;;
                *) shape+=("$1" "$2") ;;
            esac
            shift 2
            ;;
        *)
            take_train_flag "$@"
            shift $taken
            ;;
    esac
done
[[ $rate =~ ^([0-9]+(\.[0-9]+)?[kmg]?bit|unlimited)$ ]] || fail "--rate must be a rate such as 50mbit or 1gbit, or unlimited, not $rate"
[ "$(id -u)" = 0 ] || fail "only root may make network namespaces; scripts/train_cpu_cluster.sh needs no rights, but has no slow links"
for tool in ip tc; do
    command -v $tool >/dev/null || fail "needs $tool of iproute2: apt-get install iproute2"
done

owner_of() { # the process that made a namespace or a link of ours: moe1234n0 -> 1234
    grep -oE '^moe[0-9]+' <<<"$1" | tr -d moe
}

remove_cluster() { # remove_cluster PID: everything that process made, running ranks included
    local name
    for name in $(ip netns list | grep -oE "^moe$1n[0-9]+"); do
        ip netns pids "$name" | xargs -r kill -KILL 2>/dev/null || true
        ip netns del "$name" || true
    done
    # A namespace and its end of a link live until the last process in it is gone; the other end goes at once.
    for name in $(ip -o link show type veth | grep -oE "moe$1v[0-9]+"); do
        ip link del "$name" 2>/dev/null || true
    done
    ip link del "moe$1b" 2>/dev/null || true
}

for name in $(ip netns list | grep -oE '^moe[0-9]+n[0-9]+'; ip -o link | grep -oE 'moe[0-9]+[bv]'); do
    owner=$(owner_of "$name")
    grep -qs emulate_cluster "/proc/$owner/cmdline" || remove_cluster "$owner"
done

plan_job "${shape[@]}"
[ "$nodes" -le 99 ] || fail "parallel.nodes = $nodes: one machine plays at most 99"
[ "$nodes" -gt 1 ] || echo "emulate_cluster.sh: parallel.nodes = 1: nothing goes over a link; --nodes 2 makes more" >&2
prepare_job "$nodes-nodes"

stopped=0 watcher='' jobs=()
clean() {
    trap '' INT TERM HUP
    [ -z "$watcher" ] || kill "$watcher" 2>/dev/null || true
    remove_cluster $$
    wait
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

ip link add "moe$$b" type bridge 2>/dev/null || fail "may not make network interfaces here, which needs the right CAP_NET_ADMIN"
ip link set "moe$$b" up
slow_down() { # slow_down INTERFACE [COMMAND...]: COMMAND runs tc where the interface is
    [ "$rate" = unlimited ] || "${@:2}" tc qdisc add dev "$1" root tbf rate "$rate" burst 32kb latency 200ms
}
for ((node = 0; node < nodes; node++)); do
    space=moe$$n$node host=moe$$v$node
    inside=(ip netns exec "$space")
    ip netns add "$space"
    ip link add "$host" type veth peer name eth0 netns "$space"
    ip link set "$host" master "moe$$b" up
    "${inside[@]}" ip link set lo up
    "${inside[@]}" ip address add "10.77.0.$((node + 1))/24" dev eth0
    "${inside[@]}" ip link set eth0 up
    slow_down "$host"
    slow_down eth0 "${inside[@]}"
done

python -m comparison.links "$run_dir" --owner $$ --nodes "$nodes" --ranks-per-node "$per_node" --rate "$rate" &
watcher=$!
for ((node = 0; node < nodes; node++)); do
    ip netns exec "moe$$n$node" env "MS_WORKER_IP=10.77.0.$((node + 1))" \
        setsid msrun --worker_num $ranks --local_worker_num "$per_node" --node_rank $node \
        --master_addr 10.77.0.1 --master_port "$port" --join=True --log_dir "$run_dir/logs" "$launch" \
        train "$config" "${sets[@]}" \
        --run-dir "$run_dir" --resume "$resume" "${rest[@]}" "${progress[@]}" >"$run_dir/logs/msrun-$node.log" 2>&1 &
    jobs+=($!)
done

# On a signal the ranks save their state and end by themselves; the next signal ends everything at once.
stop() { # stop SIGNAL CODE
    stopped=$2
    trap "exit $2" INT TERM HUP
    for ((node = 0; node < nodes; node++)); do
        for process in $(ip netns pids "moe$$n$node"); do
            ! grep -qsz '^MS_ROLE=MS_WORKER$' "/proc/$process/environ" || kill "-$1" "$process" 2>/dev/null || true
        done
    done
    echo "emulate_cluster.sh: stopping after this step" >&2 || true # the terminal may be gone
}
trap 'stop INT 130' INT
trap 'stop TERM 143' TERM
trap 'stop HUP 129' HUP
show_job "${jobs[0]}"

code=0
for job in "${jobs[@]}"; do
    while kill -0 "$job" 2>/dev/null; do # `wait` returns early when a signal comes
        wait "$job" || true
    done
    wait "$job" || code=$?
done
[ $stopped != 0 ] || stopped=$(stopped_code)
[ $stopped = 0 ] || code=$stopped
kill "$watcher" 2>/dev/null && wait "$watcher" || true
watcher=''
sleep 0.2
[ $stopped != 0 ] || explain_job $code
exit $code
