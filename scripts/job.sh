# Sourced by the scripts that train, in the repository: what they have in common. Sets config, run_dir, resume, sets, rest and
# progress from the flags that go through to `train`. `here` is the folder in which the script was called.

config=configs/cpu_cluster.yaml run_dir='' resume=never
sets=() rest=() progress=()

fail() {
    echo "$(basename "$0"): $1" >&2
    exit 2
}

# from_here PATH: a path relative to where the script was called, as one from the repository.
from_here() {
    case $1 in
        /*) printf '%s\n' "$1" ;;
        *) [ "$here" -ef . ] && printf '%s\n' "$1" || printf '%s\n' "$here/$1" ;;
    esac
}

# config_from_here PATH: the same, but configs/cpu_smoke.yaml is also ours from anywhere.
config_from_here() {
    [ ! -e "$(from_here "$1")" ] && [ -e "$1" ] && printf '%s\n' "$1" || from_here "$1"
}

# Takes one flag of `train` from the front of the arguments; `taken` is how many arguments it and its value are.
take_train_flag() {
    taken=1
    case $1 in
        --no-progress) progress=(--no-progress) ;;
        --run-dir | --resume | --set | --init-from)
            [ $# -ge 2 ] || fail "$1 needs a value"
            taken=2
            case $1 in
                --run-dir) run_dir=$(from_here "$2") ;;
                --resume) resume=$2 ;;
                --set) sets+=("$1" "$2") ;;
                *) rest+=("$1" "$(from_here "$2")") ;;
            esac
            ;;
        -*) fail "unknown flag $1; --help lists the flags" ;;
        *) config=$(config_from_here "$1") ;;
    esac
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
    python - "$config" "${sets[@]}" 2>/dev/null <<'PYTHON'
import sys
from pangu_locmoe.config import load_config

sources = load_config(sys.argv[1], sys.argv[3::2]).data.sources
sys.exit(not any(f"{source.path}/".startswith("data/corpus/") for source in sources))
PYTHON
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

# prepare_job SUFFIX, after plan_job: the text, the run directory (its default name ends in SUFFIX) and the environment.
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
    launch=$(python -c 'import pangu_locmoe.cli.launch as m; print(m.__file__)')
}

# show_job PID: what rank 0 prints, until PID ends.
show_job() {
    tail --pid="$1" --retry -n +1 -qf "$run_dir/logs/worker_0.log" 2>/dev/null | grep --line-buffered -v -e '^\[WARNING\]' -e '^\[INFO\]' -e '^$' &
}

signal_role() { # signal_role SIGNAL ROLE: to msrun's children of that role
    local process
    for process in $(pgrep -P $job); do
        ! grep -qsz "^MS_ROLE=$2\$" "/proc/$process/environ" || kill "-$1" "$process" 2>/dev/null || true
    done
}
# stopped_code [LOGS]: 128 + the signal that a rank got and all stopped after, their state saved; else 0.
stopped_code() {
    local found
    found=$(grep -ohE 'Error code: (129|130|143)\.' "${1:-$run_dir/logs}"/msrun*.log 2>/dev/null | grep -oE '[0-9]+' | head -n 1) || true
    echo "${found:-0}"
}

# explain_job CODE: why a job has failed: which rank died, or the first error, unless rank 0 had it: that was shown.
explain_job() {
    if [ "$1" -ne 0 ]; then
        local reason
        reason=$(python scripts/explain_job.py "$run_dir/logs")
        [ -z "$reason" ] || grep -qsxF "pangu-locmoe: $reason" "$run_dir/logs/worker_0.log" || echo "$(basename "$0"): $reason" >&2
        echo "$(basename "$0"): the job failed (exit code $1); logs are in $run_dir/logs" >&2
    fi
}
