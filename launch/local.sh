#!/usr/bin/env bash
# Runs lopd in several processes on this machine: to try a multi-host run on CPU, or a process per
# GPU. See --help.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

readonly USAGE='launch/local.sh [OPTIONS] -- ARGS: lopd in several processes on this machine.

The first process writes to this terminal, the others behind "[number]". Exit code: 0, or that of
the first process that failed; the others are then stopped.

  --processes=N      how many processes [2]; at most 16, or one for each core where there are more,
                     or with --gpus one for each GPU
  --devices=N        fake CPU devices of each process [1]
  --gpus             a real GPU for each process instead
  --python=PYTHON    interpreter [python3]'

PROCESSES=2 DEVICES=1 GPUS=0 PYTHON=python3 INTERRUPTED=0
PIDS=()

own_option() {
  case "$1" in
    --processes=*) PROCESSES="${1#*=}" ;;
    --devices=*) DEVICES="${1#*=}" ;;
    --gpus) GPUS=1 ;;
    --python=*) PYTHON="${1#*=}" ;;
    *) return 1 ;;
  esac
}

# More would only take the machine's memory: each process holds a runtime of its own.
check_processes() {
  local cores most=16
  cores="$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)"
  ((cores <= most)) || most=$cores
  if ((GPUS)) && command -v nvidia-smi >/dev/null; then
    most="$(nvidia-smi --list-gpus | grep -c '^GPU' || true)"
    ((most)) || fail "--gpus: nvidia-smi lists no GPU on this machine"
  fi
  check_positive --processes "$PROCESSES" "$most"
}

free_port() {
  "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

signal_all() {
  local pid
  for pid in ${PIDS[@]+"${PIDS[@]}"}; do
    kill -s "$1" "$pid" 2>/dev/null || true
  done
}

on_interrupt() {
  INTERRUPTED=1
  signal_all TERM
}

command_of() { # process, port
  COMMAND=(env "JAX_COORDINATOR_ADDRESS=127.0.0.1:$2" "JAX_NUM_PROCESSES=$PROCESSES"
    "JAX_PROCESS_ID=$1" ${ENVIRONMENT[@]+"${ENVIRONMENT[@]}"})
  ((GPUS)) && COMMAND+=("CUDA_VISIBLE_DEVICES=$1")
  COMMAND+=("$PYTHON" -m lopd.main "${ARGS[@]}")
}

start_all() {
  local port process
  port="$(free_port)"
  PIDS=()
  for ((process = 0; process < PROCESSES; process++)); do
    command_of "$process" "$port"
    if ((process == 0)); then
      "${COMMAND[@]}" &
    else
      "${COMMAND[@]}" > >(sed "s/^/[$process] /") 2> >(sed "s/^/[$process] /" >&2) &
    fi
    PIDS+=($!)
  done
}

# Waits for every process. The result is 0 if all ended so, else the first other code; a process
# that failed takes the others with it, because they would wait for it.
wait_all() {
  local result=0 code pid failed_at=0
  while ((${#PIDS[@]})); do
    local running=()
    for pid in "${PIDS[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        running+=("$pid")
        continue
      fi
      code=0
      wait "$pid" || code=$?
      ((result)) || result=$code
    done
    PIDS=(${running[@]+"${running[@]}"})
    if ((result != 0 && result != STOPPED)); then
      if ((!failed_at)); then
        failed_at=$((SECONDS + 1))
        signal_all TERM
      elif ((SECONDS - failed_at > 20)); then
        signal_all KILL
      fi
    fi
    sleep 0.2
  done
  return "$result"
}

main() {
  parse "$@"
  check_args
  check_processes
  check_positive --devices "$DEVICES" 1024
  check_python
  if ((GPUS)); then gpu_env; else cpu_env "$DEVICES"; fi
  if ((DRY_RUN)); then
    local process
    for ((process = 0; process < PROCESSES; process++)); do
      command_of "$process" PORT
      run "${COMMAND[@]}"
    done
    return
  fi
  command -v -- "$PYTHON" >/dev/null || fail "--python=$PYTHON: there is no such program"
  trap on_interrupt TERM INT
  export PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"
  local attempt code
  for ((attempt = 0; attempt <= RETRIES; attempt++)); do
    start_all
    code=0
    wait_all || code=$?
    ((code == STOPPED && !INTERRUPTED)) || exit "$code"
    say "stopped; starting again ($((attempt + 1)) of $RETRIES)"
  done
  exit "$STOPPED"
}

main "$@"
