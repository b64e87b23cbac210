# shellcheck shell=bash
# Sourced by the launch scripts: their options, --dry-run and the named sets of libtpu flags.
set -euo pipefail

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then
  echo "error: bash $BASH_VERSION: too old; run this with bash 5.1 or newer" >&2
  exit 2
fi
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Of jaxvid.train when it saved because it was told to stop: launchers start it again.
STOPPED=75

die() {
  printf 'error: %s\n' "${1//[[:cntrl:]]/ }" >&2
  exit 2
}

# options "NAME ..." "$@" sets the variable NAME for --NAME=VALUE, `dry_run` for --dry-run and the
# array `arguments` to all that follows --. --help prints the head of the script.
options() {
  local known=" $1 " option_ name_
  shift
  dry_run=false arguments=()
  while (($#)); do
    option_=$1
    shift
    name_=${option_%%=*}
    case $option_ in
      --) arguments=("$@") && return ;;
      --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit ;;
      --dry-run) dry_run=true ;;
      --*=*)
        [[ $name_ =~ ^--[a-z_]+$ && $known == *" ${name_#--} "* ]] ||
          die "$name_: no such option; --help lists them, and those of jaxvid.train follow --"
        printf -v "${name_#--}" '%s' "${option_#*=}"
        ;;
      *) die "$option_: unexpected; write --name=value, and the options of jaxvid.train after --" ;;
    esac
  done
}

# need NAME... refuses options without a value.
need() {
  local name_
  for name_ in "$@"; do
    [[ -n ${!name_} ]] || die "--$name_: missing; --help says what it is"
  done
}

# need_training refuses a command line without options for jaxvid.train.
need_training() {
  ((${#arguments[@]})) || die "nothing to train; add -- --config=FILE --workdir=DIR"
}

# whole NAME... refuses what is no whole number from 1 on.
whole() {
  local name_
  for name_ in "$@"; do
    [[ ${!name_} =~ ^[1-9][0-9]{0,5}$ ]] || die "--$name_=${!name_}: must be a whole number from 1 on"
  done
}

# one_of NAME CHOICE... refuses other values.
one_of() {
  local name_=$1 choice
  shift
  for choice in "$@"; do
    [[ ${!name_} != "$choice" ]] || return 0
  done
  die "--$name_=${!name_}: unknown; use one of $*"
}

# quoted WORD... prints the words as a shell reads them back.
quoted() {
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}

# dns_name NAME refuses what Kubernetes and Cloud TPU do not take as a name.
dns_name() {
  [[ ${!1} =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    die "--$1=${!1}: use up to 40 small letters, digits and -, with a letter first"
}

# run COMMAND... runs it, or prints it under --dry-run.
run() {
  if $dry_run; then
    quoted "$@" && echo
  else
    "$@"
  fi
}

# train_command PYTHON: one line for a shell that starts the training, with the options after --.
train_command() {
  quoted "$1" -m jaxvid.train "--stopped_status=$STOPPED" "${arguments[@]}"
}

# libtpu_flags NAME: the flags of a named set of libtpu_flags.txt, none for "none".
libtpu_flags() {
  local name flags names=none
  [[ $1 != none ]] || return 0
  while read -r name flags; do
    [[ -n $name && $name != \#* ]] || continue
    names+=", $name"
    [[ $name != "$1" ]] || { printf '%s' "$flags" && return; }
  done <"$ROOT/launch/libtpu_flags.txt"
  die "--libtpu=$1: unknown; use one of $names"
}
