#!/usr/bin/env bash
# Times generated tokens by the window, with keys and values kept and by whole windows, on this machine's CPU.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

describe <<'TEXT'
Interleaved rounds of a model of the shape of configs/cpu_base.yaml with random weights; prints tokens/s by window with
their spread, the ratio in a round, and how much slower the longest window is than the shortest.
TEXT
handed measured --windows A,B 'window sizes (64,128,256,512)'
handed measured --rounds N 'rounds, in each of which every window and side runs once (9)'
handed measured --tokens N 'tokens of a side in a round (16)'
handed measured --router NAME 'any of our routers (locmoe)'
handed measured --seed N 'of weights, texts and draws (1)'
handed measured --output FILE 'everything as JSON, raw rounds included'
flag --python PROGRAM '' 'run with this interpreter, which has the project installed, and install nothing'
parse_flags "$@"

if [ -z "$python" ]; then
    . scripts/venv.sh
    use_venv ""
    python=$PWD/.venv/bin/python
fi
export PYTHONPATH=$PWD/scripts${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m benchmark.generation "${measured[@]}"
