# shellcheck shell=bash
# Sourced first by every script, by way of job.sh where it trains: goes to the repository, and reads the flags. A script says
# once what it takes, and gets a variable for each, --help, and one line with exit code 2 for what is wrong:
#
#     describe <<'TEXT'                             what it does, for --help
#     takes NAME DEFAULT HELP                       an argument that is no flag: CONFIG becomes $config
#     takes_all ARRAY NAME HELP                     any number of them
#     flag NAME VALUE DEFAULT HELP [LEAST [MOST]]   --more-seeds N becomes $more_seeds
#     switch NAME HELP                              --quick becomes $quick, "yes" or ""
#     handed ARRAY NAME VALUE HELP                  any number of times; ARRAY gets NAME and VALUE, to hand them on
#     parse_flags "$@"
#
# VALUE stands in the help and says what is allowed:
#
#     auto|never              one of these
#     N                       a whole number from LEAST (1) to MOST (no end); PORT is one too
#     DIR, FILE, CHECKPOINT   a path from where the script was called
#     CONFIG                  the same, or one of ours from anywhere
#     PROGRAM                 a program; becomes its absolute path
#     anything else           any text; '' for `handed`: no value

here=$PWD # where the script was called
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

script=$(basename "$0")
flag_names=() flag_description='' flag_argument='' flag_arguments='' flag_unknown=''
declare -A flag_value=() flag_help=() flag_least=() flag_most=() flag_array=() flag_given=()

fail() {
    echo "$script: $1" >&2
    exit 2
}

# from_here PATH: a path from where the script was called, as one from the repository.
from_here() {
    if [[ $1 == /* ]] || [ "$here" -ef . ]; then
        printf '%s\n' "$1"
    else
        printf '%s\n' "$here/$1"
    fi
}

# config_from_here PATH: the same, but configs/cpu_smoke.yaml is also ours from anywhere.
config_from_here() {
    if [ ! -e "$(from_here "$1")" ] && [ -e "$1" ]; then
        printf '%s\n' "$1"
    else
        from_here "$1"
    fi
}

describe() {
    flag_description=$(cat)
}

takes() {
    flag_argument=${1,,}
    flag_names+=("$1") flag_value[$1]=$1 flag_help[$1]="$3 ($2)"
    printf -v "$flag_argument" '%s' "$2"
}

takes_all() {
    flag_arguments=$1
    flag_names+=("$2") flag_value[$2]='' flag_help[$2]=$3
    declare -ga "$1=()"
}

# hands_on ARRAY NAME HELP: as takes_all, and flags that the script does not know are among them.
hands_on() {
    takes_all "$@"
    flag_unknown=yes
}

flag() {
    flag_names+=("$1") flag_value[$1]=$2 flag_help[$1]="$4${3:+ ($3)}" flag_least[$1]=${5:-1} flag_most[$1]=${6:-}
    printf -v "$(flag_variable "$1")" '%s' "$3"
}

switch() {
    flag_names+=("$1") flag_value[$1]='' flag_help[$1]=$2
    printf -v "$(flag_variable "$1")" '%s' ''
}

handed() {
    flag_names+=("$2") flag_value[$2]=$3 flag_help[$2]=$4 flag_array[$2]=$1
    declare -ga "$1=()"
}

parse_flags() {
    local count=0 name value
    while [ $# -gt 0 ]; do
        name=$1
        shift
        case $name in
            --help | -h)
                flag_usage
                exit 0
                ;;
            -?*)
                if [ -z "${flag_help[$name]:-}" ]; then
                    [ -n "$flag_unknown" ] || fail "unknown flag $name; --help lists the flags"
                    flag_add "$flag_arguments" "$name"
                    continue
                fi
                value=''
                if [ -n "${flag_value[$name]}" ]; then
                    [[ $# -gt 0 && -n $1 && $1 != --* ]] || fail "$name needs a value"
                    value=$(flag_checked "$name" "$1") || exit 2
                    shift
                fi
                flag_set "$name" "$value"
                ;;
            *)
                if [ -n "$flag_arguments" ]; then
                    flag_add "$flag_arguments" "$name"
                else
                    count=$((count + 1))
                    [[ -n $flag_argument && $count -eq 1 && -n $name ]] || fail "unexpected argument '$name'; --help says what it takes"
                    printf -v "$flag_argument" '%s' "$(flag_checked "${flag_argument^^}" "$name")"
                fi
                ;;
        esac
    done
}

# given NAME: whether this flag was.
given() {
    [ -n "${flag_given[$1]:-}" ]
}

# unless_given NAME VALUE: another default, where it depends on other flags.
unless_given() {
    given "$1" || printf -v "$(flag_variable "$1")" '%s' "$2"
}

flag_variable() { # --more-seeds: more_seeds
    local name=${1#--}
    echo "${name//-/_}"
}

flag_add() { # flag_add ARRAY WORD...
    local -n flag_target=$1
    flag_target+=("${@:2}")
}

flag_set() { # flag_set NAME VALUE
    flag_given[$1]=yes
    if [ -n "${flag_array[$1]:-}" ]; then
        flag_add "${flag_array[$1]}" "$1" ${2:+"$2"}
    else
        printf -v "$(flag_variable "$1")" '%s' "${2:-yes}"
    fi
}

flag_checked() { # flag_checked NAME VALUE: prints the value as the script takes it
    local allowed=${flag_value[$1]} program=$2
    case $allowed in
        *'|'*)
            [[ $2 =~ ^($allowed)$ ]] || fail "$1 must be $(flag_choices "$allowed"), not $2"
            printf '%s\n' "$2"
            ;;
        N | PORT) flag_number "$1" "$2" "${flag_least[$1]:-1}" "${flag_most[$1]:-}" ;;
        DIR | FILE | CHECKPOINT) from_here "$2" ;;
        CONFIG) config_from_here "$2" ;;
        PROGRAM)
            [[ $2 != */* ]] || program=$(realpath --no-symlinks "$(from_here "$2")")
            type -P "$program" || fail "$1: $2 is not a program"
            ;;
        *) printf '%s\n' "$2" ;;
    esac
}

flag_number() { # flag_number NAME VALUE LEAST MOST
    local range="of at least $3"
    [ -z "$4" ] || range="from $3 to $4"
    [[ $2 =~ ^[0-9]{1,9}$ ]] && ((10#$2 >= $3 && 10#$2 <= ${4:-999999999})) || fail "$1 must be a whole number $range, not $2"
    echo $((10#$2))
}

flag_choices() { # auto|debian|pypi: auto, debian or pypi
    local all=${1%|*}
    echo "${all//|/, } or ${1##*|}"
}

flag_usage() {
    local name label wide=0 arguments=''
    for name in "${flag_names[@]}"; do
        [[ $name == -* ]] || arguments+=" [$name]"
        label="$name${flag_value[$name]:+ ${flag_value[$name]}}"
        [ ${#label} -gt 26 ] || [ ${#label} -le "$wide" ] || wide=${#label}
    done
    [ -z "$flag_arguments" ] || arguments+=...
    printf 'usage: bash scripts/%s%s [FLAGS]\n\n%s\n\n' "$script" "$arguments" "$flag_description"
    for name in "${flag_names[@]}"; do
        label=$name
        [[ $name != -* ]] || label+=${flag_value[$name]:+ ${flag_value[$name]}}
        flag_row "$wide" "$label" "${flag_help[$name]}"
    done
    flag_row "$wide" --help 'this text'
}

flag_row() { # flag_row WIDTH LABEL HELP: wrapped, the help in a column of its own
    local first=$2 line
    if [ ${#first} -gt "$1" ]; then
        printf '  %s\n' "$first"
        first=''
    fi
    while read -r line; do
        printf '  %-*s  %s\n' "$1" "$first" "$line"
        first=''
    done < <(fold -s -w $((110 - $1)) <<<"$3")
}
