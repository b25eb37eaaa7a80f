# shellcheck shell=bash disable=SC2034  # the launchers use what is only set here
# What the launchers share: options, exit codes, quoting and flags. Sourced, never run.
#
# A launcher sets USAGE, defines own_option, sources this file and calls `parse "$@"`.

readonly DONE=0 ERROR=2 STOPPED=75 # of lopd.main, see lopd/shutdown.py

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
NAME=lopd RETRIES=100 DRY_RUN=0
ENVIRONMENT=() ARGS=()

readonly COMMON_USAGE='
Options of every launcher:
  --name=NAME        of the job or machine [lopd]
  --env=NAME=VALUE   a variable for the run; may be repeated, and wins over what the launcher sets
  --retries=N        how often a run that was stopped (exit code 75) or lost its machine is started
                     again [100]; it continues from what is finished
  --dry-run          print the commands, run none
  --help             this text
  -- ARGS            what python -m lopd.main gets, as --config=configs/tiny.py --workdir=DIR'

fail() {
  echo "${0##*/}: error: $*" >&2
  exit "$ERROR"
}

say() {
  echo "${0##*/}: $*" >&2
}

# Reads the common options and hands the others to own_option, which fails on one it does not know.
parse() {
  while (($#)); do
    [[ ! "$1" =~ ^--[a-z-]+=$ ]] || fail "$1 is empty: give a value, or leave the option out"
    case "$1" in
      --help | -h)
        echo "${USAGE:?}${COMMON_USAGE}"
        exit "$DONE"
        ;;
      --dry-run) DRY_RUN=1 ;;
      --name=*) NAME="${1#*=}" ;;
      --env=*)
        [[ "${1#--env=}" =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] ||
          fail "$1 must be --env=NAME=VALUE, the name of letters, digits and underscores"
        ENVIRONMENT+=("${1#*=}")
        ;;
      --retries=*) RETRIES="${1#*=}" ;;
      --)
        shift
        ARGS=("$@")
        break
        ;;
      *) own_option "$1" || fail "unknown option '$1'; --help lists them, and those of the run come after --" ;;
    esac
    shift
  done
  is_count "$RETRIES" || fail "--retries=$RETRIES must be a number, written in decimal, below a million"
  local LC_ALL=C
  [[ "$NAME" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail "--name=$NAME must be lower-case letters, digits and inner hyphens, 40 at most"
}

# Without a leading 0, which the shell's arithmetic takes for octal, and within its range.
is_count() {
  [[ "$1" =~ ^(0|[1-9][0-9]{0,5})$ ]]
}

check_positive() { # option, value, most [999999]
  { is_count "$2" && (($2 >= 1 && $2 <= ${3:-999999})); } ||
    fail "$1=$2 must be a number from 1 to ${3:-999999}, written in decimal"
}

# `env` runs it, and would set a variable instead.
check_python() {
  [[ "$PYTHON" != *=* && "$PYTHON" != -* ]] || fail "--python=$PYTHON must have no = and no leading hyphen"
}

# The run needs both; without them every process would fail after the machines are paid for.
check_args() {
  local word found=''
  for word in ${ARGS[@]+"${ARGS[@]}"}; do
    [[ "$word" != --config=?* ]] || found+=c
    [[ "$word" != --workdir=?* ]] || found+=w
  done
  [[ "$found" == *c* && "$found" == *w* ]] ||
    fail "the run's own arguments are missing: end with -- --config=FILE --workdir=DIR"
}

# Command words as text that any POSIX shell reads back as the same words: what is not plain stands
# in single quotes, newlines too. (`printf %q` writes $'...', which a pod's sh takes for a dollar.)
quoted() {
  local LC_ALL=C word text='' quote="'" escaped="'\\''"
  for word in "$@"; do
    [[ "$word" =~ ^[-A-Za-z0-9_./:,@%+=]+$ ]] || word="'${word//$quote/$escaped}'"
    text+=" $word"
  done
  printf '%s\n' "${text# }"
}

# Runs a command, or prints it under --dry-run.
run() {
  if ((DRY_RUN)); then
    quoted "$@"
  else
    "$@"
  fi
}

# Sets a variable of the run unless --env did.
default_env() {
  local entry
  for entry in ${ENVIRONMENT[@]+"${ENVIRONMENT[@]}"}; do
    [[ "${entry%%=*}" == "$1" ]] && return
  done
  ENVIRONMENT+=("$1=$2")
}

# TPU: gather the next layer's weights, and scatter gradients, while the present one computes; FSDP
# does both for every layer, and on its own the compiler leaves much of it exposed.
tpu_env() {
  default_env LIBTPU_INIT_ARGS "--xla_tpu_enable_async_collective_fusion=true \
--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true \
--xla_tpu_enable_async_collective_fusion_multiple_steps=true \
--xla_tpu_overlap_compute_collective_tc=true \
--xla_enable_async_all_gather=true"
}

# NVIDIA: overlap collectives with compute; join small collectives of a layer into messages large
# enough for the network; and leave XLA more than the usual three quarters of the memory, as nothing
# else runs on the GPU.
gpu_env() {
  default_env XLA_FLAGS "--xla_gpu_enable_latency_hiding_scheduler=true \
--xla_gpu_all_gather_combine_threshold_bytes=134217728 \
--xla_gpu_reduce_scatter_combine_threshold_bytes=134217728 \
--xla_gpu_all_reduce_combine_threshold_bytes=134217728"
  default_env XLA_PYTHON_CLIENT_MEM_FRACTION 0.9
}

# CPU: fake devices, so that a mesh can be tried.
cpu_env() {
  default_env JAX_PLATFORMS cpu
  default_env XLA_FLAGS "--xla_force_host_platform_device_count=$1"
}
