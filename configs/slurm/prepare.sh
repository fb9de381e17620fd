#!/usr/bin/env bash
# Prepare a dataset on a SLURM cluster: a job array reads the raw data, one further job writes the
# dataset. Run from the checkout:
#   job=$(sbatch --parsable --array=1-16 configs/slurm/prepare.sh configs/camelyon.yaml data.raw_dir=PATH)
#   sbatch --dependency=afterok:$job configs/slurm/prepare.sh configs/camelyon.yaml data.raw_dir=PATH
# A job that is preempted or reaches its time limit is requeued and keeps what it has read. Resubmit
# a job that was killed. The run folder must be on a disk that all nodes share.
#SBATCH --job-name=maskloom-prepare
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
#SBATCH --open-mode=append
set -euo pipefail
python=${PYTHON:-.venv/bin/python}

requeue() {
    trap '' USR1 TERM
    echo "received a stop signal: requeueing"
    kill -TERM "$reader" || true
    wait "$reader" || true
    scontrol requeue "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
    exit 0
}
trap requeue USR1 TERM

if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    "$python" -m data_prep --config "$@" --shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" &
else
    "$python" -m data_prep merge --config "$@" &
fi
reader=$!
wait "$reader"
