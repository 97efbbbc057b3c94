#!/bin/bash
# sbatch train.sh my.toml: one training on two hosts of eight NPUs. docs/ranks.md says more.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gres=npu:8
#SBATCH --time=24:00:00
# Five minutes before the time is over, all ranks finish their step and write a checkpoint; sbatch it again to go on.
#SBATCH --signal=TERM@300

export EXPERIMENT=$1 HERE=$SLURM_SUBMIT_DIR
export MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) PORT=$((10000 + SLURM_JOB_ID % 50000))

# A host on which a rank has failed ends the others: --kill-on-bad-exit.
srun --kill-on-bad-exit=1 bash -c '
    trap "" TERM  # of msrun, which would leave its ranks; they are sent the signal themselves, and take it
    msrun --worker_num=$((8 * SLURM_NNODES)) --local_worker_num=8 --node_rank=$SLURM_NODEID \
        --master_addr=$(getent ahostsv4 $MASTER | head -n 1 | cut -d " " -f 1) --master_port=$PORT \
        --log_dir=$HERE/logs-$SLURM_JOB_ID --join=True \
        python -m pipeline run TrainLoRA --experiment "$EXPERIMENT"'
