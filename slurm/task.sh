#!/usr/bin/env bash
# srun starts this script on each node (with LAUNCHER=srun, for each rank). It runs the launcher and
# shields it from Slurm's signals. Slurm sends SIGTERM to every process of a step. Launchers would
# end the ranks, or forward the signal to ranks that already have it and that take a second one as a
# request to end at once. So all of them block the signal. This script catches it and creates the
# stop file that the trainer reads. With any launcher, all ranks then save the same step.
set -u
interrupted=
# shellcheck disable=SC2317,SC2329  # called by the trap
request_stop() {
  interrupted=1
  # When one task has ended, srun sends SIGTERM to the others. That is not a request to stop.
  if [ ! -e "$RUN_DIR/STOPPED" ]; then touch "$RUN_DIR/REQUEUE" "$RUN_DIR/STOP"; fi
}
trap request_stop USR1 TERM

case $LAUNCHER in
deepspeed)
  start=(deepspeed --quiet --hostfile "$RUN_DIR/hostfile" --no_ssh --node_rank "$SLURM_NODEID"
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
  ;;
torchrun)
  start=(python slurm/torchrun.py --nnodes "$SLURM_NNODES" --nproc_per_node "$RANKS_PER_NODE"
    --node_rank "$SLURM_NODEID" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
  ;;
srun) start=(python) ;;
mpirun) start=() ;; # mpirun starts its agent on each node through this script
esac
block_signals='import os, sys, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
os.execvp(sys.argv[1], sys.argv[1:])'
python -c "$block_signals" "${start[@]}" "$@" &
child=$!
while # `wait` returns early if a signal arrives
  interrupted=
  wait "$child"
  code=$?
  [ -n "$interrupted" ]
do :; done
exit "$code"
