#!/usr/bin/env bash
# Prepare a dataset on a SLURM cluster: an array of jobs reads the raw data, one more writes the dataset. From the checkout:
#   job=$(sbatch --parsable --array=1-16 configs/slurm/prepare.sh configs/camelyon.yaml data.raw_dir=PATH)
#   sbatch --dependency=afterok:$job configs/slurm/prepare.sh configs/camelyon.yaml data.raw_dir=PATH
# A job that was killed is submitted again: what it has read is kept. The run folder must lie on a disk that all nodes see.
#SBATCH --job-name=maskloom-prepare
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH --time=04:00:00
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    exec "$python" -m data_prep --config "$@" --shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
fi
exec "$python" -m data_prep merge --config "$@"
