#!/usr/bin/env bash
# Installs the test extra and runs ruff, mypy, shellcheck and pytest: one process for each core, then the tests that start jobs of their own.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

describe <<'TEXT'
Formatting, lint, types and tests.
TEXT
switch --slow 'run the tests marked slow too, which take minutes each'
flag --only PATH '' 'run only the tests in this file or folder'
parse_flags "$@"
marks='not slow'
[ -z "$slow" ] || marks='slow or not slow'
# Relative to the caller, or to the repository.
[ -z "$only" ] || [ ! -e "$here/$only" ] || only=$here/$only

. scripts/venv.sh
use_venv test
ruff format --check .
ruff check .
mypy
shellcheck scripts/*.sh .ci/run

# One thread for each process; a file stays in one process, for its tests share what they have compiled.
export OMP_NUM_THREADS=1
# pytest's exit code 5 is "no tests": --only may name some of one kind alone.
some() {
    pytest "$@" "${only:-tests}" || [ $? = 5 ]
}
some -m "($marks) and not alone" --numprocesses auto --maxprocesses 4 --dist loadfile
some -m "($marks) and alone"
