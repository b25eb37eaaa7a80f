#!/usr/bin/env bash
# Submits lopd to Slurm GPU nodes, one process per GPU. See --help.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

readonly USAGE='launch/slurm.sh [OPTIONS] -- ARGS: submits lopd to Slurm, one process per GPU.

Slurm tells the processes of each other, lopd reads it by itself. Five minutes before the time limit
the run gets SIGTERM, brings its work to safety, and the job is queued again, as it is by Slurm after
a preemption. Prints the job number and where the log is.

  --nodes=N          [1]
  --gpus=N           of each node [8]
  --cpus=N           of each process [8]
  --time=TIME        limit of one go, as Slurm writes it [24:00:00]
  --partition=NAME
  --account=NAME
  --setup=COMMAND    run on each node first, as "module load cuda" or "source .venv/bin/activate"
  --logs=DIR         [logs]
  --python=PYTHON    interpreter [python3]'

NODES=1 GPUS=8 CPUS=8 TIME=24:00:00 PARTITION='' ACCOUNT='' SETUP='' LOGS=logs PYTHON=python3

own_option() {
  case "$1" in
    --nodes=*) NODES="${1#*=}" ;;
    --gpus=*) GPUS="${1#*=}" ;;
    --cpus=*) CPUS="${1#*=}" ;;
    --time=*) TIME="${1#*=}" ;;
    --partition=*) PARTITION="${1#*=}" ;;
    --account=*) ACCOUNT="${1#*=}" ;;
    --setup=*) SETUP="${1#*=}" ;;
    --logs=*) LOGS="${1#*=}" ;;
    --python=*) PYTHON="${1#*=}" ;;
    *) return 1 ;;
  esac
}

# The batch script, on standard output. `exec` hands SIGTERM to Python instead of a shell, and
# srun's code is the highest of its tasks', which all stop together.
job_script() {
  local command
  command="cd $(quoted "$REPOSITORY") && ${SETUP:+$SETUP && }exec env $(quoted \
    "${ENVIRONMENT[@]}" "$PYTHON" -m lopd.main "${ARGS[@]}")"
  cat <<SCRIPT
#!/usr/bin/env bash
srun --kill-on-bad-exit=0 --wait=300 bash -c $(quoted "$command")
code=\$?
if [ "\$code" -eq $STOPPED ] && [ "\${SLURM_RESTART_COUNT:-0}" -lt $RETRIES ]; then
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$code"
SCRIPT
}

main() {
  parse "$@"
  check_args
  check_positive --nodes "$NODES"
  check_positive --gpus "$GPUS"
  check_positive --cpus "$CPUS"
  check_python
  gpu_env
  local submit=(sbatch --parsable "--job-name=$NAME" "--nodes=$NODES" "--ntasks-per-node=$GPUS"
    "--gpus-per-node=$GPUS" "--cpus-per-task=$CPUS" "--time=$TIME" --signal=TERM@300 --requeue
    --open-mode=append "--output=$LOGS/$NAME-%j.log")
  [[ -z "$PARTITION" ]] || submit+=("--partition=$PARTITION")
  [[ -z "$ACCOUNT" ]] || submit+=("--account=$ACCOUNT")
  if ((DRY_RUN)); then
    run "${submit[@]}"
    job_script
    return
  fi
  mkdir -p -- "$LOGS" || fail "--logs=$LOGS cannot be made"
  local job
  job="$(job_script | "${submit[@]}")" || fail "sbatch refused the job"
  echo "job ${job%%;*}, log $LOGS/$NAME-${job%%;*}.log"
}

main "$@"
