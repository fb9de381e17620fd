#!/usr/bin/env bash
# Train on all allocated GPUs of several nodes of a SLURM cluster. The checkout and the run folder
# must be on a disk that all nodes share. Run from the checkout:
#   sbatch --nodes=2 --gpus-per-node=4 configs/slurm/train_multinode.sh configs/busi.yaml [KEY=VALUE ...]
#   ENGINE=fsdp sbatch --nodes=2 --gpus-per-node=4 configs/slurm/train_multinode.sh configs/busi.yaml
# ENGINE names a file in configs/accelerate. Before its time limit, or when it is preempted, the
# training finishes its optimizer step and saves a checkpoint; the job is requeued and resumes from
# there.
#SBATCH --job-name=maskloom-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
gpus=${SLURM_GPUS_ON_NODE:-1}
engine=${ENGINE:-ddp}
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
main=${nodes%%$'\n'*}

requeue() {
    trap '' USR1 TERM
    echo "received a stop signal: saving a checkpoint, then requeueing"
    # srun forwards the signal to the launchers, which forward it to the training processes.
    kill -TERM "$launchers" || true
    wait "$launchers" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap requeue USR1 TERM

# One launcher per node starts one process per GPU; the first node is the rendezvous host.
export python gpus engine main port=$((20000 + SLURM_JOB_ID % 20000))
# shellcheck disable=SC2016  # expanded on each node, where SLURM_NODEID is its own
srun --kill-on-bad-exit=1 bash -c 'exec "$python" -m accelerate.commands.launch \
    --config_file "configs/accelerate/$engine.yaml" --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
    --num_processes $((SLURM_NNODES * gpus)) --rdzv_backend c10d --main_process_ip "$main" --main_process_port "$port" \
    -m train_controlnet --config "$@"' bash "$@" &
launchers=$!
wait "$launchers"
