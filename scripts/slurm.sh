#!/usr/bin/env bash
# Train on a Slurm cluster. A job that reaches its time limit or is preempted saves a checkpoint, returns to the queue, and
# continues where it stopped:
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
# With --signal, Slurm sends USR1 to what srun started, 300 s before the end. A step, the samples if they are being drawn,
# and a checkpoint must fit into that time. Python is started without `accelerate launch`, which would end at the signal
# without passing it on. For several GPUs, start one task per GPU (#SBATCH --ntasks=N), each with the variables
# RANK=$SLURM_PROCID, LOCAL_RANK=$SLURM_LOCALID, WORLD_SIZE=$SLURM_NTASKS, MASTER_ADDR and MASTER_PORT; a signal to one
# then stops all.
set -uo pipefail

stopping=
srun python "$@" --resume_from_checkpoint latest &
training=$!
trap 'stopping=yes; kill -TERM "$training"' TERM # sent on preemption; srun passes it on
wait "$training"
code=$?
if [ -n "$stopping" ]; then # the signal interrupted that `wait`; training is about to end
    wait "$training"
    code=$?
fi
if [ "$code" -eq 75 ]; then # stopped and saved
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
