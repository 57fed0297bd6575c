#!/usr/bin/env bash
# Train on a Slurm cluster; a job that reaches its time limit or is preempted saves, is put back into the queue, and goes
# on where it stopped:
#     sbatch scripts/slurm.sh train_dreambooth_kronecker.py --config configs/sd15.yaml --output_dir outputs/dog
#
#SBATCH --job-name=kronecker
#SBATCH --gpus=1
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# --signal has Slurm send USR1 300 s before the end to what srun starts. A step, the samples if they are being drawn, and
# a checkpoint have to fit in. Python is started without `accelerate launch`, which would end at the signal and not pass
# it on. For several GPUs start one task for each (#SBATCH --ntasks=N), each with the variables RANK=$SLURM_PROCID,
# LOCAL_RANK=$SLURM_LOCALID, WORLD_SIZE=$SLURM_NTASKS, MASTER_ADDR and MASTER_PORT: a signal to one then stops all.
set -uo pipefail

stopping=
srun python "$@" --resume_from_checkpoint latest &
training=$!
trap 'stopping=yes; kill -TERM "$training"' TERM # of a preemption; srun passes it on
wait "$training"
code=$?
if [ -n "$stopping" ]; then # the signal has ended that `wait`, and the training is about to end
    wait "$training"
    code=$?
fi
if [ "$code" -eq 75 ]; then # stopped and saved
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
