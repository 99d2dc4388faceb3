#!/usr/bin/env bash
# Times `prepare` against datasets.map with the same tokenizer on the same text, on this machine.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

describe <<'TEXT'
Both sides read the same JSON lines with a worker for each core, one after the other in each round; prints MB/s of text, and the
ratio. The text is drawn from the Python files of this installation unless --text names other. Close other programs first.
TEXT
handed measured --megabytes N 'text to draw (100)'
handed measured --rounds N 'rounds, in each of which every side runs once (3)'
handed measured --workers N 'processes of each side (the cores)'
handed measured --text FILE 'JSON lines in its place'
handed measured --output FILE 'everything as JSON'
flag --python PROGRAM '' 'run with this interpreter, which has the project and datasets installed, and install nothing'
parse_flags "$@"

export PYTHONPATH=$PWD/scripts${PYTHONPATH:+:$PYTHONPATH}
"${python:-${PYTHON:-python3}}" -m benchmark.prepare --check "${measured[@]}"
if [ -z "$python" ]; then
    . scripts/venv.sh
    use_venv ""
    python=$PWD/.venv/bin/python
    "$python" -c 'import datasets' 2>/dev/null ||
        "$python" -m pip install --quiet --disable-pip-version-check 'datasets>=3,<5' 'pyarrow<21'
fi
exec "$python" -m benchmark.prepare "${measured[@]}"
