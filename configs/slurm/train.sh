#!/usr/bin/env bash
# Train on all allocated GPUs of one node of a SLURM cluster. Run from the checkout:
#   sbatch --gpus=4 configs/slurm/train.sh configs/busi.yaml [KEY=VALUE ...]
#   ENGINE=fsdp sbatch --gpus=4 configs/slurm/train.sh configs/busi.yaml
# ENGINE names a file in configs/accelerate. Before its time limit, or when it is preempted, the
# training finishes its optimizer step and saves a checkpoint; the job is requeued and resumes from
# there.
#SBATCH --job-name=maskloom-train
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
gpus=${SLURM_GPUS_ON_NODE:-1}
engine=${ENGINE:-$([[ $gpus -gt 1 ]] && echo ddp || echo single)}

requeue() {
    trap '' USR1 TERM
    echo "received a stop signal: saving a checkpoint, then requeueing"
    # Signal the training processes: the launcher would exit without waiting for them.
    pkill -TERM -P "$launcher" || true
    wait "$launcher" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap requeue USR1 TERM

"$python" -m accelerate.commands.launch --config_file "configs/accelerate/$engine.yaml" --num_processes "$gpus" \
    --main_process_port $((20000 + SLURM_JOB_ID % 20000)) -m train_controlnet --config "$@" &
launcher=$!
wait "$launcher"
