#!/usr/bin/env bash
# Times this project's training step against Hugging Face Mixtral and against its own dense twin, on this machine's CPU.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/benchmark.sh [--rounds N] [--steps N] [--sides A,B] [--output FILE.json]
                                 [--python PYTHON] [--hf-python PYTHON] [--torch-index URL]

Interleaved rounds of the same top-1 model with 8 experts here and as MixtralForCausalLM; prints tokens/s, CPU time,
memory and the ratios with their spread. Close other programs first: docs/performance.md says why.

  --rounds N           rounds, in each of which every side runs once (10)
  --steps N            training steps of a side in a round (4)
  --sides A,B          only these sides: hf hf-dense switch-5/4 switch-4/3 locmoe-5/4 dropless-5/4 dense-5 dense-4
  --output FILE.json   everything, raw rounds included
  --python PYTHON      run with this interpreter, which has the project installed, and install nothing
  --hf-python PYTHON   interpreter with torch and transformers, if that is another one
  --torch-index URL    where pip gets torch when there is none (https://download.pytorch.org/whl/cpu, because PyPI's
                       Linux build brings several GB of CUDA); "none": pip's own index
  --help               this text
TEXT
}

bad_flag() {
    echo "benchmark.sh: $1; --help lists the flags" >&2
    exit 2
}

flags=() python= hf_python= torch_index=https://download.pytorch.org/whl/cpu
while [ $# -gt 0 ]; do
    case "$1" in
        --help | -h) usage; exit 0 ;;
        --rounds | --steps | --sides | --output | --python | --hf-python | --torch-index)
            [ $# -ge 2 ] && [ -n "$2" ] || bad_flag "$1 needs a value"
            case "$1" in
                --rounds | --steps) [[ $2 =~ ^[1-9][0-9]*$ ]] || bad_flag "$1 must be a whole number of at least 1, not $2"; flags+=("$1" "$2") ;;
                --sides) flags+=("$1" "$2") ;;
                # Relative to where the script was called.
                --output)
                    [ -d "$(dirname "$2")" ] && [ ! -d "$2" ] || bad_flag "--output must be a file in an existing folder, not $2"
                    flags+=("$1" "$(cd "$(dirname "$2")" && pwd)/$(basename "$2")")
                    ;;
                --python | --hf-python)
                    command -v "$2" >/dev/null || bad_flag "$1: $2 is not a program"
                    printf -v "$(tr - _ <<<"${1#--}")" '%s' "$(command -v "$2")"
                    ;;
                --torch-index) torch_index=$2 ;;
            esac
            shift 2
            ;;
        *) bad_flag "unknown flag $1" ;;
    esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=$PWD/scripts${PYTHONPATH:+:$PYTHONPATH}
[ -z "$hf_python" ] || flags+=(--hf-python "$hf_python")
# Flags first: the driver needs nothing but Python, and an installation takes minutes.
"${python:-${PYTHON:-python3}}" -m benchmark.run --check ${flags[@]+"${flags[@]}"}

# The interpreter that runs our side: --python, or .venv with what is missing installed.
if [ -z "$python" ]; then
    . scripts/venv.sh
    use_venv ""
    python=$PWD/.venv/bin/python
    if [ -z "$hf_python" ]; then
        if ! "$python" -c 'import torch' 2>/dev/null; then
            index=(--index-url "$torch_index")
            [ "$torch_index" != none ] || index=()
            echo "installing torch into .venv" >&2
            "$python" -m pip install --quiet --disable-pip-version-check ${index[@]+"${index[@]}"} 'torch>=2.3' || {
                echo "no torch from $torch_index: give another --torch-index, or --hf-python PYTHON with torch and transformers" >&2
                exit 2
            }
        fi
        use_venv bench
    fi
fi
exec "$python" -m benchmark.run ${flags[@]+"${flags[@]}"}
