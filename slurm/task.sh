#!/usr/bin/env bash
# What srun starts on each node (with LAUNCHER=srun, for each rank): the launcher, out of the reach
# of Slurm's signals. Slurm sends SIGTERM to every process of a step: launchers would end the ranks,
# or send it on to ranks that have had it already and take the second one as "end at once". So it
# is blocked in all of them and caught here, where it becomes the stop file that the trainer reads:
# all ranks save the same step, whatever started them.
set -u
interrupted=
# shellcheck disable=SC2317,SC2329  # called by the trap
request_stop() {
  interrupted=1
  # When one task has left, srun sends SIGTERM to the others: that is no request.
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
mpirun) start=() ;; # it starts its own agent on each node through this script
esac
block_signals='import os, sys, signal
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
os.execvp(sys.argv[1], sys.argv[1:])'
python -c "$block_signals" "${start[@]}" "$@" &
child=$!
while # `wait` returns early when a signal has arrived
  interrupted=
  wait "$child"
  code=$?
  [ -n "$interrupted" ]
do :; done
exit "$code"
