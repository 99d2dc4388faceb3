#!/usr/bin/env bash
# Installs the extra docs and renders the API reference from the docstrings.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

describe <<'TEXT'
Renders the docstrings as web pages; prints the first page to open.
TEXT
takes_all modules MODULE 'only these modules, with what is below them (the whole package)'
flag --output DIR docs/api 'where the pages go; git ignores the default'
parse_flags "$@"

. scripts/venv.sh
use_venv docs
exec python scripts/api_docs.py --output "$output" "${modules[@]}"
