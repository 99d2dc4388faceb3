# shellcheck shell=bash
# shellcheck disable=SC2034 # what is set here is used by the scripts
# Sourced by the scripts that train: the flags that go through to `train`, and how a job is planned, prepared, watched and ended.
. "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

config=configs/cpu_cluster.yaml run_dir='' resume=never
sets=() rest=()

# train_flags DEFAULT: sets run_dir, resume, sets (pairs of --set and KEY=VALUE) and rest; DEFAULT says which run directory it is.
train_flags() {
    handed sets --set KEY=VALUE 'change one value, for example moe.router=switch; repeatable'
    flag --run-dir DIR '' "where the run is kept ($1)"
    flag --resume 'auto|never' never 'auto: continue from the newest checkpoint if there is one'
    handed rest --init-from CHECKPOINT 'start from these weights'
    handed rest --no-progress '' 'no progress bar'
}

check_rate() {
    [[ $rate =~ ^([0-9]+(\.[0-9]+)?[kmg]?bit|unlimited)$ ]] || fail "--rate must be a rate such as 50mbit or 1gbit, or unlimited, not $rate"
}

# needs_namespaces: for a cluster that this machine plays.
needs_namespaces() {
    local tool
    [ "$(id -u)" = 0 ] || fail "only root may make network namespaces; scripts/train_cpu_cluster.sh needs no rights, but has no slow links"
    for tool in ip tc; do
        command -v $tool >/dev/null || fail "needs $tool of iproute2: apt-get install iproute2"
    done
}

# find_python: the configuration's file, and Python to read it.
find_python() {
    [ -f "$config" ] || fail "$config: no such configuration; configs/ has $(cd configs && echo *.yaml)"
    . scripts/venv.sh
    use_venv ""
}

# prepare_corpus: Python, and the example corpus where the configuration wants it.
prepare_corpus() {
    find_python
    if [ ! -e data/corpus ] && uses_corpus; then
        bash scripts/fetch_corpus.sh --python .venv/bin/python
    fi
}

# uses_corpus: whether the configuration reads data/corpus. Not if it cannot be read itself: `train` says why.
uses_corpus() {
    python scripts/uses_corpus.py "$config" "${sets[@]}"
}

# choose_run_dir STEM: a new directory, STEM or STEM-2 and so on, made here, so that no other job takes it; to resume, the newest.
choose_run_dir() {
    local number=2
    run_dir=$1
    mkdir -p "$(dirname "$1")"
    until mkdir "$run_dir" 2>/dev/null; do
        [ -e "$run_dir" ] || fail "$run_dir: cannot be made"
        [ "$resume" = never ] || [ -e "$1-$number" ] || break
        run_dir=$1-$number
        number=$((number + 1))
    done
}

# plan_job [--ranks N] [--nodes N] [--ranks-per-node N]: sets ranks, nodes and per_node as flags and configuration have it, and
# `sets` so that the ranks share the experts. What cannot work is said here, once, and not by every rank.
plan_job() {
    local problem numbers sharing
    find_python
    problem=$(mktemp)
    numbers=$(python -m pangu_locmoe.train.job "$config" "$@" "${sets[@]}" 2>"$problem") || {
        numbers=$(grep -v -e '^\[WARNING\]' -e '^$' "$problem" | head -n 1)
        rm -f "$problem"
        fail "${numbers:-$config: cannot be planned}"
    }
    rm -f "$problem"
    read -r ranks nodes sharing <<<"$numbers"
    per_node=$((ranks / nodes))
    sets+=(--set "parallel.nodes=$nodes" --set "parallel.expert_parallel=$sharing")
}

# hold_run_dir: refuses a directory that holds a run or that one is in, before anything in it is touched, and keeps other jobs out
# for as long as a process of this one lives: they inherit descriptor 9.
hold_run_dir() {
    local lock=$run_dir/logs/job.lock
    [ "$resume" != never ] || [ ! -e "$run_dir/config.yaml" ] ||
        fail "--run-dir $run_dir: holds a run already; give another directory, or --resume auto to continue it"
    [ ! -e "$run_dir/run.lock" ] || flock -n "$run_dir/run.lock" true || in_use "$run_dir/run.lock"
    mkdir -p "$run_dir/logs" || exit 2
    exec 9>>"$lock"
    flock -n 9 || in_use "$lock"
    echo "process $$ on $(hostname)" >"$lock"
}

in_use() { # in_use LOCK
    fail "--run-dir $run_dir: $(cat "$1") is training there; wait for it or stop it, or give another directory"
}

# prepare_job SUFFIX, after plan_job: the text, the run directory (its default name ends in SUFFIX), the environment, and the
# parts of the command: setsid msrun "${msrun[@]}" FLAGS "${training[@]}". A session of its own, because Ctrl-C would make msrun
# kill the ranks before they have saved anything.
prepare_job() {
    prepare_corpus
    # Here and not in the job, whose ranks wait for each other for two minutes and no longer.
    python -m pangu_locmoe prepare "$config" "${sets[@]}" >/dev/null
    [ -n "$run_dir" ] || choose_run_dir "runs/$(basename "$config" .yaml)-$1"
    hold_run_dir
    rm -f "$run_dir"/logs/*.log # what an earlier part of the run printed
    local threads=$(($(nproc) / ranks))
    export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
    # Joining takes 10 seconds instead of 30 with short retries. A dead rank ends the job after MS_NODE_TIMEOUT seconds; a
    # late one has MS_CPU_COMM_OP_TIMEOUT seconds to arrive.
    export MS_RETRY_INTERVAL_LOWER=1 MS_RETRY_INTERVAL_UPPER=1
    export MS_NODE_TIMEOUT=${MS_NODE_TIMEOUT:-5} MS_CPU_COMM_OP_TIMEOUT=${MS_CPU_COMM_OP_TIMEOUT:-120}
    set_training
    msrun=(--worker_num "$ranks" --master_port "$port" --join=True --log_dir "$run_dir/logs")
}

# set_training: what msrun starts in every rank.
set_training() {
    training=("$PWD/pangu_locmoe/cli/launch.py" train "$config" "${sets[@]}" --run-dir "$run_dir" --resume "$resume" "${rest[@]}")
}

# show_job PID LOG: what a rank prints, until PID ends.
show_job() {
    tail --pid="$1" --retry -n +1 -qf "$2" 2>/dev/null |
        grep --line-buffered -v -e '^\[WARNING\]' -e '^\[INFO\]' -e '^$' &
}

# stop_on_signals: the ranks save their state and end by themselves; the next signal ends everything at once.
stop_on_signals() {
    stopped=0
    trap 'stop INT 130' INT
    trap 'stop TERM 143' TERM
    trap 'stop HUP 129' HUP
}

stop() { # stop SIGNAL CODE
    stopped=$2
    trap 'signal_role KILL MS_WORKER; signal_role KILL MS_SCHED; exit $stopped' INT TERM HUP
    signal_role "$1" MS_WORKER
    echo "$script: stopping after this step" >&2 || true # the terminal may be gone
}

signal_role() { # signal_role SIGNAL ROLE: to the job's processes of that role
    local process
    for process in $(job_processes); do
        ! grep -qsz "^MS_ROLE=$2\$" "/proc/$process/environ" || kill "-$1" "$process" 2>/dev/null || true
    done
}

job_processes() { # of msrun; where there are several, the script has its own
    pgrep -P "$job"
}

# stopped_code LOGS: 128 + the signal that a rank got and all stopped after, their state saved; else 0.
stopped_code() {
    local found
    found=$(grep -ohE 'Error code: (129|130|143)\.' "$1"/msrun*.log 2>/dev/null | grep -oE '[0-9]+' | head -n 1) || true
    echo "${found:-0}"
}

# end_job CODE: ends the script as the job did, and says why if it failed.
end_job() {
    local code=$1
    [ "$stopped" != 0 ] || stopped=$(stopped_code "$run_dir/logs")
    [ "$stopped" = 0 ] || code=$stopped
    sleep 0.2
    [ "$stopped" != 0 ] || explain_job "$code"
    exit "$code"
}

# explain_job CODE: why a job has failed: which rank died, or the first error, unless rank 0 had it: that was shown.
explain_job() {
    if [ "$1" -ne 0 ]; then
        local reason
        reason=$(python scripts/explain_job.py "$run_dir/logs")
        [ -z "$reason" ] || grep -qsxF "pangu-locmoe: $reason" "$run_dir/logs/worker_0.log" || echo "$script: $reason" >&2
        echo "$script: the job failed (exit code $1); logs are in $run_dir/logs" >&2
    fi
}
