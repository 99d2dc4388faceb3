#!/usr/bin/env bash
# Times this project's training step against Hugging Face Mixtral and against its own dense twin, on this machine's CPU.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

describe <<'TEXT'
Interleaved rounds of the same top-1 model with 8 experts here and as MixtralForCausalLM; prints tokens/s, CPU time,
memory and the ratios with their spread. Close other programs first: docs/performance.md says why.
TEXT
handed measured --rounds N 'rounds, in each of which every side runs once (10)'
handed measured --steps N 'training steps of a side in a round (4)'
handed measured --sides A,B 'only these: hf hf-dense switch-5/4 switch-4/3 locmoe-5/4 dropless-5/4 dense-5 dense-4'
handed measured --output FILE 'everything as JSON, raw rounds included'
flag --python PROGRAM '' 'run with this interpreter, which has the project installed, and install nothing'
handed measured --hf-python PROGRAM 'interpreter with torch and transformers, if that is another one'
flag --torch-index URL https://download.pytorch.org/whl/cpu \
    "where pip gets torch when there is none: PyPI's Linux build brings several GB of CUDA; \"none\": pip's own index"
parse_flags "$@"

export PYTHONPATH=$PWD/scripts${PYTHONPATH:+:$PYTHONPATH}
# Flags first: the driver needs nothing but Python, and an installation takes minutes.
"${python:-${PYTHON:-python3}}" -m benchmark.run --check "${measured[@]}"

# The interpreter that runs our side: --python, or .venv with what is missing installed.
if [ -z "$python" ]; then
    . scripts/venv.sh
    use_venv ""
    python=$PWD/.venv/bin/python
    if ! given --hf-python; then
        if ! "$python" -c 'import torch' 2>/dev/null; then
            index=(--index-url "$torch_index")
            [ "$torch_index" != none ] || index=()
            echo "installing torch into .venv" >&2
            "$python" -m pip install --quiet --disable-pip-version-check "${index[@]}" 'torch>=2.3' ||
                fail "no torch from $torch_index: give another --torch-index, or --hf-python with torch and transformers"
        fi
        use_venv bench
    fi
fi
exec "$python" -m benchmark.run "${measured[@]}"
