#!/usr/bin/env bash
# Runs lopd on all workers of a TPU slice that gcloud's queued resources provide. See --help.
# shellcheck disable=SC2016  # what stands in single quotes is for the worker's shell
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

readonly USAGE='launch/tpu_pod.sh COMMAND [OPTIONS] [-- ARGS]: lopd on all workers of a TPU slice.

  run      everything: queues for the slice if it is not there, copies this checkout, installs it,
           runs on all workers and follows the log. After a preemption it queues again and the run
           continues. Interrupting this command does not stop the run; the same command follows it
           again.
  create   only queues for the slice, and waits until it is there
  setup    only copies this checkout to all workers and installs it
  log      only follows the log of the first worker
  stop     only stops the run, with all work safe
  delete   only deletes the slice; nothing else does, but run with --delete

The workdir must be a bucket (gs://...) that all workers may write. gcloud talks to several workers
through an agent: run "ssh-add ~/.ssh/google_compute_engine" once. Exit code: that of the run.

  --zone=ZONE                 needed
  --accelerator-type=TYPE     needed by run and create, as v5litepod-16, v5p-32 or v6e-8
  --runtime-version=VERSION   of the machine image [by the accelerator type]
  --project=PROJECT           [that of gcloud config]
  --spot                      preemptible and cheaper
  --reserved                  from a reservation
  --delete                    run deletes the slice when the run has ended, well or not
  --poll=SECONDS              between looks at the queue [30]'

ZONE='' ACCELERATOR='' RUNTIME='' PROJECT='' CAPACITY=() DELETE=0 POLL=30

own_option() {
  case "$1" in
    --zone=*) ZONE="${1#*=}" ;;
    --accelerator-type=*) ACCELERATOR="${1#*=}" ;;
    --runtime-version=*) RUNTIME="${1#*=}" ;;
    --project=*) PROJECT="${1#*=}" ;;
    --spot | --reserved) CAPACITY=("$1") ;;
    --delete) DELETE=1 ;;
    --poll=*) POLL="${1#*=}" ;;
    *) return 1 ;;
  esac
}

# The images that Google names for each generation.
default_runtime() {
  case "$ACCELERATOR" in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "--accelerator-type=$ACCELERATOR: give --runtime-version too" ;;
  esac
}

tpus() { # group, command, arguments
  run gcloud compute tpus "$@" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"}
}

on_worker() { # worker or "all", script
  tpus tpu-vm ssh "$NAME" "--worker=$1" "--command=$2"
}

# Of the request, and once that is ACTIVE of its node, which a preemption shows earlier (READY: it
# can be used). Nothing where there is no request.
state() {
  local request
  request="$(tpus queued-resources describe "$NAME" "--format=value(state.state)" 2>/dev/null)" || return 0
  [[ "$request" != ACTIVE ]] || request="$(tpus tpu-vm describe "$NAME" "--format=value(state)" 2>/dev/null)"
  echo "${request:-UNKNOWN}"
}

create() {
  [[ -n "$ACCELERATOR" ]] || fail "--accelerator-type is needed to create $NAME"
  tpus queued-resources create "$NAME" "--node-id=$NAME" "--accelerator-type=$ACCELERATOR" \
    "--runtime-version=${RUNTIME:-$(default_runtime)}" ${CAPACITY[@]+"${CAPACITY[@]}"} >&2 ||
    fail "gcloud could not queue for $NAME"
}

# --force also deletes a slice whose node is still there.
delete() {
  tpus queued-resources delete "$NAME" --force --quiet
}

# Returns when the slice can be used; sets FRESH if it is another one than before.
ensure_active() {
  local attempt now
  if ((DRY_RUN)); then
    create 2>&1
    return
  fi
  for ((attempt = 0; attempt <= RETRIES; )); do
    now="$(state)"
    case "$now" in
      READY) return ;;
      '')
        say "queues for $NAME, a $ACCELERATOR in $ZONE"
        create
        FRESH=1
        ;;
      FAILED | SUSPENDED | PREEMPTED | TERMINATED)
        say "$NAME is $now: deletes it and queues again"
        delete >&2 || fail "gcloud could not delete $NAME"
        attempt=$((attempt + 1))
        ;;
      *)
        say "$NAME is $now"
        sleep "$POLL"
        ;;
    esac
  done
  fail "$NAME could not be had in $RETRIES tries"
}

# uv, because the images' own Python is older than lopd needs.
setup() {
  local archive="${TMPDIR:-/tmp}/$NAME-code-$$.tar.gz" result=0
  if ((!DRY_RUN)); then
    git -C "$REPOSITORY" ls-files -z --cached --others --exclude-standard |
      tar -C "$REPOSITORY" -czf "$archive" --null --files-from=- ||
      fail "the code at $REPOSITORY could not be packed"
  fi
  { tpus tpu-vm scp "$archive" "$NAME:lopd-code.tar.gz" --worker=all &&
    on_worker all 'set -e
rm -rf ~/lopd-code && mkdir -p ~/lopd-code && tar -C ~/lopd-code -xzf ~/lopd-code.tar.gz
python3 -m pip install --quiet --user uv
[ -d ~/lopd-venv ] || ~/.local/bin/uv venv --quiet --python 3.12 ~/lopd-venv
~/.local/bin/uv pip install --quiet --python ~/lopd-venv/bin/python -e "$HOME/lopd-code[tpu]"'; } ||
    result=$?
  rm -f "$archive"
  return "$result"
}

readonly STOP_SCRIPT='pid=$(cat ~/lopd-run/pid 2>/dev/null) || exit 0
kill -TERM -- "-$pid" 2>/dev/null || exit 0
for i in $(seq 120); do kill -0 -- "-$pid" 2>/dev/null || exit 0; sleep 1; done
kill -KILL -- "-$pid"'

# Starts the run on every worker, detached, unless it is running there. The shell around it is the
# leader of its process group and writes its number first and the run's exit code last; it ignores
# SIGTERM so as to outlive the run.
start() {
  local command body
  # The home directory is known on the worker only.
  command="$(quoted env "${ENVIRONMENT[@]}") ~/lopd-venv/bin/python $(quoted -m lopd.main "${ARGS[@]}")"
  body="echo \$\$ > ~/lopd-run/pid; trap : TERM; cd ~/lopd-code; $command & run=\$!
while :; do wait \$run; code=\$?; kill -0 \$run 2>/dev/null || break; done; echo \$code > ~/lopd-run/code"
  on_worker all "mkdir -p ~/lopd-run
pid=\$(cat ~/lopd-run/pid 2>/dev/null) && kill -0 -- \"-\$pid\" 2>/dev/null && exit 0
rm -f ~/lopd-run/pid ~/lopd-run/code
nohup setsid bash -c $(quoted "$body") > ~/lopd-run/log 2>&1 < /dev/null &
for i in \$(seq 100); do [ -e ~/lopd-run/pid ] && exit 0; sleep 0.1; done; exit 1"
}

# Shows the log of the first worker until its run ends; returns the run's exit code, or 255 where
# there is none: the connection broke, or the machine went away.
follow() {
  on_worker 0 'pid=$(cat ~/lopd-run/pid 2>/dev/null) || exit 255
tail -n +1 -F --pid="$pid" ~/lopd-run/log 2>/dev/null
exit "$(cat ~/lopd-run/code 2>/dev/null || echo 255)"'
}

is_running() {
  on_worker 0 'kill -0 -- "-$(cat ~/lopd-run/pid)"' >/dev/null 2>&1
}

# Whether a run that ended with this code can go on: stopped, killed by a signal (as jax does when
# another worker is gone), out of reach, or on a slice that is no longer there. Otherwise it would
# fail again.
may_continue() {
  (($1 == STOPPED || $1 >= 128)) || [[ "$(state)" != READY ]]
}

run_to_the_end() {
  local attempt code
  FRESH=1
  for ((attempt = 0; attempt <= RETRIES; attempt++)); do
    ensure_active
    if ((attempt == 0 && !DRY_RUN)) && is_running; then
      say "it is running: follows its log"
      FRESH=0
    fi
    code=0
    if ((FRESH)); then setup || code=$?; fi
    if ((code == 0)); then
      FRESH=0
      { start && follow; } || code=$?
    fi
    if ((code == DONE)) || ! may_continue "$code"; then return "$code"; fi
    say "the run on $NAME ended with code $code; continues ($((attempt + 1)) of $RETRIES)"
    # Workers that are left over wait for those that are gone.
    ((code == 255)) || on_worker all "$STOP_SCRIPT" || true
    sleep "$POLL"
  done
  return "$code"
}

main() {
  local command="${1-}" code=0
  case "$command" in
    run | create | setup | log | stop | delete) shift ;;
    '' | --help | -h) command=run && set -- --help ;;
    *) fail "unknown command '$command': run, create, setup, log, stop or delete" ;;
  esac
  parse "$@"
  [[ -n "$ZONE" ]] || fail "--zone is needed"
  is_count "$POLL" || fail "--poll=$POLL must be a number"
  case "$command" in
    run)
      check_args
      tpu_env
      run_to_the_end || code=$?
      if ((DELETE)); then delete || code=$?; fi
      ;;
    create) ensure_active ;;
    setup) setup || code=$? ;;
    log) follow || code=$? ;;
    stop) on_worker all "$STOP_SCRIPT" || code=$? ;;
    delete) delete || code=$? ;;
  esac
  return "$code"
}

main "$@"
