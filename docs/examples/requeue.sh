#!/usr/bin/env bash
#SBATCH --requeue --open-mode=append --signal=B:TERM@120
# A run or a sweep that a scheduler may stop at any time:  sbatch requeue.sh -m seed=0,1,2 output=/shared/runs
# SLURM sends SIGTERM to this shell two minutes before the end. esper saves and ends with 75, the job is queued again under its
# own number, and its next start goes on where it was. Every other code is the end of it.
set -u

esper "$@" resume=auto &
child=$!
trap 'kill -TERM $child' TERM
wait $child  # a signal that is trapped ends this wait early …
code=$?
while kill -0 $child 2>/dev/null; do  # … and what esper says is the answer of a later one
  wait $child
  code=$?
done
if [ $code -eq 75 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
