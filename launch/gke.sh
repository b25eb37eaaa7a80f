#!/usr/bin/env bash
# Submits lopd to a GKE cluster of TPU slices through xpk. See --help.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

readonly USAGE='launch/gke.sh COMMAND [OPTIONS] [-- ARGS]: lopd on a GKE cluster made by xpk (pip install xpk).

  run      submits a workload: xpk adds this checkout to the image; the pods install it and run. A
           run that was stopped is started again by the cluster, as after a lost node.
  list     workloads of the cluster and their states
  delete   deletes the workload

The workdir must be a bucket (gs://...) that the pods may write.

  --cluster=NAME     needed
  --tpu-type=TYPE    needed by run, as v5litepod-16 or v6e-8
  --image=IMAGE      base image with Python 3.11 or newer [python:3.12]
  --project=PROJECT  [that of gcloud config]
  --zone=ZONE        [that of gcloud config]
  --spot             preemptible capacity, where the cluster provisions it itself'

CLUSTER='' TPU_TYPE='' IMAGE=python:3.12 WHERE=() CAPACITY=()

own_option() {
  case "$1" in
    --cluster=*) CLUSTER="${1#*=}" ;;
    --tpu-type=*) TPU_TYPE="${1#*=}" ;;
    --image=*) IMAGE="${1#*=}" ;;
    --project=* | --zone=*) WHERE+=("$1") ;;
    --spot) CAPACITY=("$1") ;;
    *) return 1 ;;
  esac
}

submit() {
  local command entry newline=$'\n' env_options=()
  check_args
  [[ -n "$TPU_TYPE" ]] || fail "--tpu-type is needed"
  tpu_env
  for entry in "${ENVIRONMENT[@]}"; do
    [[ "$entry" != *"$newline"* ]] ||
      fail "--env=${entry%%=*}: a value with a line break does not pass through xpk's YAML"
    env_options+=("--env=$entry")
  done
  # xpk runs it in a shell and sends that SIGTERM: exec hands it to Python.
  command="pip install --quiet -e '.[tpu]' && exec $(quoted python -m lopd.main "${ARGS[@]}")"
  # xpk writes it into one line of YAML, so a line break, which stands in single quotes, is made there.
  if [[ "$command" == *"$newline"* ]]; then
    entry="'\"\$newline\"'"
    command="newline=\"\$(printf '\\n.')\" && newline=\"\${newline%.}\" && ${command//$newline/$entry}"
  fi
  run xpk workload create "--cluster=$CLUSTER" "--workload=$NAME" "--tpu-type=$TPU_TYPE" \
    "--base-docker-image=$IMAGE" "--script-dir=$REPOSITORY" "--command=$command" \
    "--max-restarts=$RETRIES" "--restart-on-exit-codes=$STOPPED" \
    --termination-grace-period-seconds=300 "${env_options[@]}" \
    ${CAPACITY[@]+"${CAPACITY[@]}"} ${WHERE[@]+"${WHERE[@]}"}
}

main() {
  local command="${1-}"
  case "$command" in
    run | list | delete) shift ;;
    '' | --help | -h) command=run && set -- --help ;;
    *) fail "unknown command '$command': run, list or delete" ;;
  esac
  parse "$@"
  [[ -n "$CLUSTER" ]] || fail "--cluster is needed"
  case "$command" in
    run) submit ;;
    list) run xpk workload list "--cluster=$CLUSTER" ${WHERE[@]+"${WHERE[@]}"} ;;
    delete) run xpk workload delete "--cluster=$CLUSTER" "--workload=$NAME" ${WHERE[@]+"${WHERE[@]}"} ;;
  esac
}

main "$@"
