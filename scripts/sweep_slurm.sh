#!/usr/bin/env bash
# Run a grid on a Slurm cluster, one cell a task of an array; --dry_run of scripts/sweep.sh says how many cells there are:
#     sbatch --array=0-63%8 scripts/sweep_slurm.sh GRID --output_dir DIR
# The cells of a second round follow those of the first in number, and are known once that has ended:
#     sbatch --dependency=afterany:JOB --array=64-99%8 scripts/sweep_slurm.sh GRID --output_dir DIR
#
#SBATCH --job-name=sweep
#SBATCH --gpus=1
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log
#
# A task that reaches its time limit or is preempted saves a checkpoint, returns to the queue and continues, as with
# scripts/slurm.sh.
set -uo pipefail

stopping=
srun python studies/sweep.py "$@" --cell "$SLURM_ARRAY_TASK_ID" &
cell=$!
trap 'stopping=yes; kill -TERM "$cell"' TERM # sent on preemption; srun passes it on
wait "$cell"
code=$?
if [ -n "$stopping" ]; then # the signal interrupted that `wait`; the training is about to end
    wait "$cell"
    code=$?
fi
if [ "$code" -eq 75 ]; then # stopped and saved
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
