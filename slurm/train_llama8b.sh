#!/usr/bin/env bash
#SBATCH --job-name=llama8b
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
#
# Train until the run is done, from its newest checkpoint if it has one:
#   sbatch [options of sbatch] slurm/train_llama8b.sh [--config FILE] [key=value ...]
# First check the settings on the login node, for the requested nodes and GPUs:
#   slurm/train_llama8b.sh --dry-run [--nodes=N ...] [--config FILE] [key=value ...]
#
# When its time is nearly up, or when it is preempted, the job saves a checkpoint, returns to the
# queue and continues later. LAUNCHER=deepspeed|torchrun|srun|mpirun starts the ranks, one per GPU.
# Settings of your site: slurm/env.sh (see env.sh.example). Guide: docs/clusters.md.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit
if [ ! -f slurm/common.sh ]; then
  echo "error: $PWD: must be the top folder of tensorlm (submit the job from there)" >&2
  exit 2
fi
. slurm/common.sh
load_site
export LAUNCHER=${LAUNCHER:-deepspeed}
case $LAUNCHER in
deepspeed | torchrun | mpirun) need "$LAUNCHER" ;;
srun) ;;
*) die "LAUNCHER: must be deepspeed, torchrun, srun or mpirun, got $LAUNCHER" ;;
esac

# check RANKS ARGUMENTS...: print `key = value` lines about the run, or one line per problem.
check() {
  python launcher/train.py --dry-run "$@"
}

# --------------------------------------------------------------------------------------- dry run

# header OPTION: print the value of an #SBATCH line above.
header() {
  sed -n "s/^#SBATCH --$1=//p" slurm/train_llama8b.sh
}

if [ "${1:-}" = --dry-run ]; then
  shift
  options=() settings=(--config configs/llama8b_32k.toml)
  nodes=$(header nodes) gpus=$(header gpus-per-node) tasks=$(header ntasks-per-node)
  cpus=$(header cpus-per-task) partition=${SBATCH_PARTITION:-}
  while [ $# -gt 0 ]; do
    case $1 in # split an option and its value into two words
    --nodes=* | --gpus-per-node=* | --ntasks-per-node=* | --cpus-per-task=* | --partition=* | --config=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
      ;;
    -[Ncp]?*) set -- "${1:0:2}" "${1:2}" "${@:2}" ;;
    esac
    case $1 in
    -N | --nodes | --gpus-per-node | --ntasks-per-node | --config) need_value "$@" ;;&
    -c | --cpus-per-task | -p | --partition) need_value "$@" ;;&
    --config) settings+=("$1" "$2") && shift ;;
    -N | --nodes) nodes=${2##*-} ;;& # the 4 of 2-4
    --gpus-per-node) gpus=${2##*:} ;;& # the 8 of h100:8
    --ntasks-per-node) tasks=$2 ;;&
    -c | --cpus-per-task) cpus=$2 ;;&
    -p | --partition) partition=$2 ;;&
    -*) options+=("$1") ;;
    [a-z]*=*) settings+=("$1") ;;
    *) options+=("$1") ;; # the value of an option
    esac
    shift
  done
  [[ $nodes$gpus$tasks =~ ^[0-9]+$ ]] || die "--nodes, --gpus-per-node: must be integers"
  check_tasks "$tasks" "$gpus"
  check $((nodes * gpus)) "${settings[@]}" || exit
  sbatch --test-only "${options[@]}" slurm/train_llama8b.sh
  code=$?
  [ $code = 0 ] || explain_refusal "$nodes" "$tasks" "$cpus" "$gpus" "$partition"
  exit $code
fi

# ------------------------------------------------------------------------------------- the start

need_job train_llama8b.sh
# Slurm requests a stop. Rank 0 runs on this node and reads the file after each step.
interrupted=
request_stop() {
  interrupted=1
  touch "$RUN_DIR/REQUEUE" "$RUN_DIR/STOP"
}
trap 'interrupted=1' USR1 TERM

describe_job
export RANKS_PER_NODE=${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}
check_tasks "${SLURM_NTASKS_PER_NODE:-$RANKS_PER_NODE}" "$RANKS_PER_NODE"
ranks=$((SLURM_NNODES * RANKS_PER_NODE))
set -- --config configs/llama8b_32k.toml "$@" # the last --config counts
facts=$(check $ranks "$@") || exit
echo "$facts"
RUN_DIR=$(sed -n 's/^run.dir = //p' <<<"$facts")
end_step=$(sed -n 's/^end = checkpoint //p' <<<"$facts")
export RUN_DIR
mkdir -p "$RUN_DIR/logs" && ln -sfn "$(job_field StdOut)" "$RUN_DIR/logs/" || exit
rm -f "$RUN_DIR"/{STOP,STOPPED,REQUEUE}

# Count consecutive restarts from the same checkpoint. After MAX_RESTARTS (3), the job stops.
first_step=$(newest_step "$RUN_DIR") in_a_row=0
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ -f "$RUN_DIR/restarts" ]; then
  read -r step in_a_row <"$RUN_DIR/restarts"
  if [ "$step" = "$first_step" ]; then in_a_row=$((in_a_row + 1)); else in_a_row=0; fi
fi
if [ "$in_a_row" -ge "${MAX_RESTARTS:-3}" ]; then
  die "$RUN_DIR: $in_a_row restarts without a checkpoint after step $first_step" \
    "(read the log above; fix the cause and submit again)"
fi
echo "$first_step $in_a_row" >"$RUN_DIR/restarts"

choose_rendezvous
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=$RANKS_PER_NODE/" \
  >"$RUN_DIR/hostfile"
echo "launcher = $LAUNCHER, $ranks ranks, rendezvous at $MASTER_ADDR:$MASTER_PORT"

# -------------------------------------------------------------------------------------- training

case $LAUNCHER in
srun)
  start=(srun --kill-on-bad-exit=1 --ntasks="$ranks" --ntasks-per-node="$RANKS_PER_NODE"
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" slurm/task.sh)
  ;;
mpirun)
  # Open MPI itself starts an agent on each node, as a step of this job.
  export OMPI_MCA_orte_launch_agent="$PWD/slurm/task.sh orted"
  start=(mpirun -np "$ranks" --map-by "ppr:$RANKS_PER_NODE:node" --bind-to none
    -x MASTER_ADDR -x MASTER_PORT python)
  ;;
*)
  start=(srun --kill-on-bad-exit=1 --ntasks="$SLURM_NNODES" --ntasks-per-node=1
    --cpus-per-task="$SLURM_CPUS_ON_NODE" slurm/task.sh)
  ;;
esac
trap request_stop USR1 TERM
if [ -n "$interrupted" ]; then request_stop; fi # a signal arrived during the checks
"${start[@]}" launcher/train.py "$@" &
child=$!
while # `wait` returns early if a signal arrives
  interrupted=
  wait "$child"
  code=$?
  [ -n "$interrupted" ]
do :; done
trap '' USR1 TERM # a requeue sends TERM to this script

# --------------------------------------------------------------------------------------- the end

last_step=$(newest_step "$RUN_DIR") reason=
# A launcher that was killed may still exit with 0: deepspeed does.
if [ $code = 0 ] && [ "$last_step" -lt "${end_step:-0}" ]; then
  echo "error: $LAUNCHER: ended before checkpoint $end_step" >&2
  code=70
fi
if [ $code = 0 ]; then
  echo "done after step $last_step"
elif [ -e "$RUN_DIR/STOPPED" ]; then # stopped on request, of Slurm (REQUEUE) or of a user
  if [ -e "$RUN_DIR/REQUEUE" ]; then reason="saved on Slurm's request"; fi
elif [ $code != 2 ] && [ "$last_step" != "$first_step" ]; then
  reason="exit code $code, after new checkpoints"
fi
rm -f "$RUN_DIR"/{STOP,REQUEUE} # a pending request must not stop the next start
# The state of a job that is already being cancelled or requeued is not RUNNING.
if [ -n "$reason" ] && [ "$(job_field JobState)" = RUNNING ]; then
  echo "requeue: $reason; continues after step $last_step"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
