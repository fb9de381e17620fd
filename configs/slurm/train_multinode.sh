#!/usr/bin/env bash
# Train on several nodes of a SLURM cluster, on all the GPUs that the job gets. From the checkout, which must lie on a disk that
# all nodes see, with the run folder:
#   sbatch --nodes=2 --gpus-per-node=4 configs/slurm/train_multinode.sh configs/busi.yaml [KEY=VALUE ...]
#   ENGINE=fsdp sbatch --nodes=2 --gpus-per-node=4 configs/slurm/train_multinode.sh configs/busi.yaml        (a file of configs/accelerate)
# Before its time is up, or when it is preempted, the training ends its optimizer step and saves a checkpoint; the job goes back
# to the queue, and then on from there.
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
    echo "asked to stop: saving a checkpoint, then back to the queue"
    kill -TERM "$launchers" || true # srun hands it to the launchers, and these to the training's processes
    wait "$launchers" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap requeue USR1 TERM

# One launcher a node, which starts a process for each GPU; they meet at the first node.
export python gpus engine main port=$((20000 + SLURM_JOB_ID % 20000))
# shellcheck disable=SC2016  # expanded on each node, where SLURM_NODEID is its own
srun --kill-on-bad-exit=1 bash -c 'exec "$python" -m accelerate.commands.launch \
    --config_file "configs/accelerate/$engine.yaml" --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
    --num_processes $((SLURM_NNODES * gpus)) --rdzv_backend c10d --main_process_ip "$main" --main_process_port "$port" \
    -m train_controlnet --config "$@"' bash "$@" &
launchers=$!
wait "$launchers"
