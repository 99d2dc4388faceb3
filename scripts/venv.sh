# shellcheck shell=bash
# Sourced by the other scripts: `use_venv EXTRA` makes .venv if there is none, installs the project with an extra
# ("" for none) when setup.py has changed since, and puts .venv first on the PATH.

use_venv() {
    local extra=$1 stamp want python=${PYTHON:-python3}
    if [ ! -x .venv/bin/python ]; then
        "$python" -c 'import sys; sys.exit(not (3, 9) <= sys.version_info < (3, 13))' || {
            echo "MindSpore 2.10 needs Python 3.9 to 3.12, $python is $("$python" -V 2>&1); set PYTHON to another one" >&2
            return 2
        }
        echo "making .venv" >&2
        if ! "$python" -m venv .venv >/dev/null 2>&1; then
            rm -rf .venv
            # Debian keeps the venv module's pip in a package of its own.
            if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
                apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv >/dev/null
            fi
            "$python" -m venv .venv || {
                echo "cannot make .venv: install python3-venv (apt-get install python3-venv) and try again" >&2
                return 2
            }
        fi
    fi
    export PATH="$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD/scripts${PYTHONPATH:+:$PYTHONPATH}"
    stamp=.venv/.installed-${extra:-core}
    want=$(cksum <setup.py)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
        echo "installing pangu_locmoe${extra:+[$extra]} into .venv" >&2
        pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}" || {
            echo "installation failed: see pip's message above; it needs a package index such as PyPI" >&2
            return 2
        }
        # Every extra brings the core with it.
        echo "$want" | tee "$stamp" >.venv/.installed-core
    fi
}
