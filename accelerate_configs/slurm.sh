#!/usr/bin/env bash
# Two machines of eight GPUs each under SLURM. Submit it from a folder that both machines can access:
#   sbatch accelerate_configs/slurm.sh --recipe fast-cifar10 --exp-name two-machines
#SBATCH --job-name=fastvit-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=01:00:00
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export first port=$((20000 + SLURM_JOB_ID % 10000)) # differs between jobs on one machine

# One launcher per machine. It starts one process per GPU.
srun --cpus-per-task "$SLURM_CPUS_PER_TASK" bash -c 'accelerate launch --config_file accelerate_configs/multi_node.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$first" --main_process_port "$port" \
    -m fastvit_train "$@"' launcher "$@"
