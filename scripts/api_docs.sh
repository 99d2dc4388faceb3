#!/usr/bin/env bash
# Installs the extra docs and renders the API reference from the docstrings.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/api_docs.sh [--output DIR] [MODULE ...]

  --output DIR  where the pages go (docs/api, which git ignores)
  MODULE        only these modules, with what is below them (the whole package)
  --help        this text
TEXT
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
output=docs/api modules=()
while [ $# -gt 0 ]; do
    case $1 in
        --output)
            [ $# -ge 2 ] || { echo "api_docs.sh: --output needs a folder" >&2; exit 2; }
            output=$2
            shift
            ;;
        --help | -h)
            usage
            exit 0
            ;;
        -*)
            echo "api_docs.sh: unknown flag $1; --help lists the flags" >&2
            exit 2
            ;;
        *) modules+=("$1") ;;
    esac
    shift
done

. scripts/venv.sh
use_venv docs
exec python scripts/api_docs.py --output "$output" ${modules[@]+"${modules[@]}"}
