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
    case "$1" in
      --help | -h)
        echo "${USAGE:?}${COMMON_USAGE}"
        exit "$DONE"
        ;;
      --dry-run) DRY_RUN=1 ;;
      --name=*) NAME="${1#*=}" ;;
      --env=*=*) ENVIRONMENT+=("${1#*=}") ;;
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
  is_count "$RETRIES" || fail "--retries=$RETRIES must be a number"
  [[ "$NAME" =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
    fail "--name=$NAME must be lower-case letters, digits and inner hyphens"
}

is_count() {
  [[ "$1" =~ ^[0-9]+$ ]]
}

check_positive() { # option, value
  [[ "$2" =~ ^[1-9][0-9]*$ ]] || fail "$1=$2 must be a number, 1 or more"
}

# The run needs both; without them every process would fail after the machines are paid for.
check_args() {
  local given=" ${ARGS[*]-}"
  [[ "$given" == *" --config="* && "$given" == *" --workdir="* ]] ||
    fail "the run's own arguments are missing: end with -- --config=FILE --workdir=DIR"
}

# Command words as one line that a shell reads back as the same words.
quoted() {
  local line
  printf -v line '%q ' "$@"
  echo "${line% }"
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
