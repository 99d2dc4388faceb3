#!/usr/bin/env bash
# Installs the test extra and runs ruff, mypy and pytest: one process for each core, then the tests that start jobs of their own.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/test.sh [--slow] [--only PATH]

  --slow       run the tests marked slow too, which take minutes each
  --only PATH  run only the tests in this file or folder
  --help       this text
TEXT
}

here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
marks='not slow' only=tests
while [ $# -gt 0 ]; do
    case $1 in
        --slow) marks='slow or not slow' ;;
        --only)
            [ $# -ge 2 ] || { echo "test.sh: --only needs a path" >&2; exit 2; }
            only=$2
            [ ! -e "$here/$2" ] || only=$here/$2
            shift
            ;;
        --help | -h)
            usage
            exit 0
            ;;
        *)
            echo "test.sh: unknown flag $1; --help lists the flags" >&2
            exit 2
            ;;
    esac
    shift
done

. scripts/venv.sh
use_venv test
ruff format --check .
ruff check .
mypy

# One thread for each process; a file stays in one process, for its tests share what they have compiled.
export OMP_NUM_THREADS=1
# pytest's exit code 5 is "no tests": --only may name some of one kind alone.
some() {
    pytest "$@" "$only" || [ $? = 5 ]
}
some -m "($marks) and not alone" --numprocesses auto --maxprocesses 4 --dist loadfile
some -m "($marks) and alone"
