#!/usr/bin/env bash
# Trains one configuration on a cluster that this machine plays: a network namespace for each node, slow links between them.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/job.sh"

describe <<'TEXT'
Trains CONFIG with one process for each rank of each node. Every node is a network namespace with an address of its own; a bridge
joins them, and both ends of every node's link are limited to RATE. Ranks of one node talk over that node's loopback. Needs root
and iproute2. Whatever was made is removed at the end, also after Ctrl-C. The exit code is the job's; the logs of all ranks are in
DIR/logs, what went over the links is in DIR/links.json.
TEXT
takes CONFIG configs/cpu_cluster.yaml 'what to train'
handed shape --nodes N 'nodes (parallel.nodes)'
handed shape --ranks-per-node N 'processes in each (so many that there are 4 in all, or 1)'
flag --rate RATE 50mbit 'of a link in each direction, as tc writes it: 50mbit, 1gbit; or unlimited'
flag --port PORT 8118 "port of msrun's scheduler; namespaces have ports of their own, so that jobs do not collide" 1 65535
train_flags runs/CONFIG-N-nodes
parse_flags "$@"
check_rate
needs_namespaces

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
[ "$nodes" -gt 1 ] || echo "$script: parallel.nodes = 1: nothing goes over a link; --nodes 2 makes more" >&2
prepare_job "$nodes-nodes"

watcher='' jobs=()
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
        setsid msrun "${msrun[@]}" --local_worker_num "$per_node" --node_rank $node --master_addr 10.77.0.1 \
        "${training[@]}" >"$run_dir/logs/msrun-$node.log" 2>&1 &
    jobs+=($!)
done

job_processes() {
    for ((node = 0; node < nodes; node++)); do
        ip netns pids "moe$$n$node"
    done
}
stop_on_signals
show_job "${jobs[0]}" "$run_dir/logs/worker_0.log"

code=0
for job in "${jobs[@]}"; do
    while kill -0 "$job" 2>/dev/null; do # `wait` returns early when a signal comes
        wait "$job" || true
    done
    wait "$job" || code=$?
done
kill "$watcher" 2>/dev/null || true
wait "$watcher" || true
watcher=''
end_job $code
