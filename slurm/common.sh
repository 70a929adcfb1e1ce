# shellcheck shell=bash
# Functions of the job scripts; source this file from the top folder of the checkout.

die() {
  echo "error: $*" >&2
  exit 2
}

# Set up the Python environment and the settings of the site.
load_site() {
  # Values left over in the submitting shell would override those of the job.
  unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
  if [ -d .venv/bin ]; then PATH=$PWD/.venv/bin:$PATH; fi
  # shellcheck source=/dev/null
  if [ -f slurm/env.sh ]; then . slurm/env.sh; fi
  command -v python >/dev/null ||
    die "python: not found (make install, or activate your environment in slurm/env.sh)"
  export PATH PYTHONUNBUFFERED=1 NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
}

# need COMMAND: end the script with one line if the command does not exist.
need() {
  command -v "$1" >/dev/null || die "$1: not found (load it in slurm/env.sh)"
}

# need_value OPTION [VALUE ...]: end the script if an option has no value.
need_value() {
  [ -n "${2:-}" ] || die "$1: needs a value"
}

# need_job SCRIPT: end the script if it was not started by sbatch.
need_job() {
  [ -n "${SLURM_JOB_ID:-}" ] || die "slurm/$1: must run as a Slurm job (sbatch slurm/$1)"
}

# check_tasks TASKS GPUS: end the script unless a node has a task for each GPU.
check_tasks() {
  [ "$1" -ge "$2" ] ||
    die "--ntasks-per-node: must be at least $2, one task per GPU, got $1"
}

# explain_refusal NODES TASKS CPUS GPUS [PARTITION]: Slurm refused a job of NODES nodes with TASKS
# tasks of CPUS CPUs and GPUS GPUs per node, without a reason. Print which requests no node can meet.
explain_refusal() {
  local wanted=$(($2 * $3)) count=0 most_cpus=0 most_gpus=0 name cpus gres found fix
  while read -r name cpus gres; do
    if [ -z "${5:-}" ] && [[ $name != *\* ]]; then continue; fi # not the default partition
    count=$((count + 1))
    gres=${gres%%(*} # the 8 of gpu:h100:8(S:0-1)
    found=$([[ $gres == *gpu:* ]] && grep -o '[0-9]*$' <<<"$gres")
    if [ "$cpus" -gt "$most_cpus" ]; then most_cpus=$cpus; fi
    if [ "${found:-0}" -gt "$most_gpus" ]; then most_gpus=$found; fi
  done < <(sinfo -hN ${5:+"--partition=$5"} -o '%P %c %G' 2>/dev/null)
  if [ "$count" = 0 ]; then return; fi # the nodes are not known
  if [ "$1" -gt "$count" ]; then
    echo "error: --nodes: must be at most $count, the partition's number of nodes, got $1" >&2
  fi
  if [ "$4" -gt "$most_gpus" ]; then
    echo "error: --gpus-per-node: must be at most $most_gpus, the GPUs in a node, got $4" >&2
  fi
  if [ "$wanted" -gt "$most_cpus" ]; then
    fix="pass --cpus-per-task=$((most_cpus / $2))"
    if [ "$2" -gt "$4" ] && [ $(($4 * $3)) -le "$most_cpus" ]; then
      fix="pass --ntasks-per-node=$4, one task per GPU"
    fi
    echo "error: --ntasks-per-node x --cpus-per-task: must be at most $most_cpus, the CPUs in a" \
      "node, got $2 x $3 = $wanted ($fix)" >&2
  fi
}

# run_dir_of CONFIG SETTINGS...: print the folder of the run, or one line per problem.
run_dir_of() {
  python - "$@" <<'PYTHON'
import sys
from tensorlm.config import load_config
from tensorlm.runtime.exit import run_launcher
run_launcher(lambda: print(load_config(sys.argv[1], sys.argv[2:]).run.dir))
PYTHON
}

# job_field NAME: print a field of this job as the controller sees it now.
job_field() {
  scontrol show job -o "$SLURM_JOB_ID" | sed -n "s/^JobId=$SLURM_JOB_ID .* $1=\([^ ]*\).*/\1/p"
}

# Print the first lines of each log: the job and its nodes.
describe_job() {
  local gpus=none name
  if [ "${SLURM_GPUS_ON_NODE:-0}" -gt 0 ]; then
    name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
    gpus="$SLURM_GPUS_ON_NODE on each node (${name:-nvidia-smi finds none})"
  fi
  echo "=== $(date '+%F %T') job $SLURM_JOB_ID $SLURM_JOB_NAME, restart ${SLURM_RESTART_COUNT:-0}"
  echo "nodes = $SLURM_NNODES ($SLURM_JOB_NODELIST)"
  echo "gpus = $gpus"
  echo "log = $(job_field StdOut)"
}

# newest_step RUN: print the step of the newest checkpoint; 0 if there is none.
newest_step() {
  local folder newest=0
  for folder in "$1"/step-????????; do
    if [ -d "$folder" ]; then newest=$((10#${folder##*-})); fi
  done
  echo "$newest"
}

# Set MASTER_ADDR and MASTER_PORT to rank 0's node, which is this one, and a free port on it.
choose_rendezvous() {
  local first
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  if [ -z "${MASTER_ADDR:-}" ]; then
    MASTER_ADDR=$first
    # A node's name in Slurm may not be known to the network.
    getent hosts "$first" >/dev/null ||
      MASTER_ADDR=$(scontrol show node -o "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
  fi
  if [ -z "${MASTER_PORT:-}" ]; then
    # Below the range of ephemeral ports. Jobs that share a node begin with different ports.
    MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
    while (exec 3<>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do
      MASTER_PORT=$((MASTER_PORT + 1))
    done
  fi
  export MASTER_ADDR MASTER_PORT
}
