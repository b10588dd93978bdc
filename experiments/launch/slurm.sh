#!/bin/bash
# Trains the run {{name}} with one process for each GPU: sbatch THIS_FILE
# Options of sbatch's own command line, as --partition and --time, go before the ones here.
#SBATCH --job-name={{name}}
#SBATCH --nodes={{hosts}}
#SBATCH --ntasks-per-node={{devices}}
#SBATCH --gpus-per-node={{devices}}
# before the time is up, to the training alone: this script gets it only with "B:"
#SBATCH --signal=TERM@{{grace}}
#SBATCH --requeue
#SBATCH --open-mode=append

set -u
cd -- {{checkout}} || exit 2
# srun does not read what sbatch was told
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

# This script gets SIGTERM itself where Slurm ends the job: cancelled, or preempted and requeued by Slurm.
ended=
trap 'ended=1' TERM

# A process that fails is not the end of the others: they notice, and leave with a status that tells what happened.
# The status of srun is the highest of them.
srun --kill-on-bad-exit=0 --wait=0 {{command}}
status=$?

case $status in
  0 | 2 | 130) exit "$status" ;; # done, bad input, interrupted
esac
if [ -n "$ended" ]; then
  exit "$status"
fi
if [ "${SLURM_RESTART_COUNT:-0}" -ge {{max_restarts}} ]; then
  echo "status $status after {{max_restarts}} restarts: not started again" >&2
  exit "$status"
fi
echo "status $status: requeued" >&2
scontrol requeue "$SLURM_JOB_ID"
exit "$status"
