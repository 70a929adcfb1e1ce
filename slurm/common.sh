# shellcheck shell=bash
# What the job scripts share; sourced from the top folder of the checkout.

die() {
  echo "error: $*" >&2
  exit 2
}

# The Python environment, and what the site wants to be different.
load_site() {
  # Left over in the shell that submitted, these would stand in for what is found out here.
  unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
  if [ -d .venv/bin ]; then PATH=$PWD/.venv/bin:$PATH; fi
  # shellcheck source=/dev/null
  if [ -f slurm/env.sh ]; then . slurm/env.sh; fi
  command -v python >/dev/null ||
    die "python: not found (make install, or activate your environment in slurm/env.sh)"
  export PATH PYTHONUNBUFFERED=1 NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
}

# need COMMAND: ends the script with one line where it is not there.
need() {
  command -v "$1" >/dev/null || die "$1: not found (load it in slurm/env.sh)"
}

# need_value OPTION [VALUE ...]: ends the script where an option stands alone.
need_value() {
  [ -n "${2:-}" ] || die "$1: what it is set to is missing"
}

# need_job SCRIPT: ends a script that was not started by sbatch.
need_job() {
  [ -n "${SLURM_JOB_ID:-}" ] || die "slurm/$1: is a job (start it with sbatch slurm/$1)"
}

# check_tasks TASKS GPUS, of a node: each rank is a task of its own.
check_tasks() {
  [ "$1" -ge "$2" ] || die "--ntasks-per-node: $1 tasks for $2 GPUs (ask for as many)"
}

# explain_refusal NODES TASKS CPUS GPUS [PARTITION]: Slurm refused NODES nodes with so many tasks, CPUs
# for each task and GPUs on each of them, and does not say why. Prints what no node has, if anything.
explain_refusal() {
  local wanted=$(($2 * $3)) count=0 most_cpus=0 most_gpus=0 name cpus gres found fix
  while read -r name cpus gres; do
    if [ -z "${5:-}" ] && [[ $name != *\* ]]; then continue; fi # not the default partition
    count=$((count + 1))
    gres=${gres%%(*} # of gpu:h100:8(S:0-1) the 8
    found=$([[ $gres == *gpu:* ]] && grep -o '[0-9]*$' <<<"$gres")
    if [ "$cpus" -gt "$most_cpus" ]; then most_cpus=$cpus; fi
    if [ "${found:-0}" -gt "$most_gpus" ]; then most_gpus=$found; fi
  done < <(sinfo -hN ${5:+"--partition=$5"} -o '%P %c %G' 2>/dev/null)
  if [ "$count" = 0 ]; then return; fi # nothing is known about the nodes
  if [ "$1" -gt "$count" ]; then
    echo "error: --nodes: must be at most $count, the nodes of the partition, got $1" >&2
  fi
  if [ "$4" -gt "$most_gpus" ]; then
    echo "error: --gpus-per-node: must be at most $most_gpus, the GPUs of a node, got $4" >&2
  fi
  if [ "$wanted" -gt "$most_cpus" ]; then
    fix="pass --cpus-per-task=$((most_cpus / $2))"
    if [ "$2" -gt "$4" ] && [ $(($4 * $3)) -le "$most_cpus" ]; then
      fix="pass --ntasks-per-node=$4, a task for each GPU"
    fi
    echo "error: --ntasks-per-node x --cpus-per-task: must be at most $most_cpus, the CPUs of a" \
      "node, got $2 x $3 = $wanted ($fix)" >&2
  fi
}

# run_dir_of CONFIG SETTINGS...: the folder of the run, or one line per mistake.
run_dir_of() {
  python - "$@" <<'PYTHON'
import sys
from tensorlm.config import load_config
from tensorlm.runtime.exit import run_launcher
run_launcher(lambda: print(load_config(sys.argv[1], sys.argv[2:]).run.dir))
PYTHON
}

# job_field NAME: a field of this job, as the controller sees it now.
job_field() {
  scontrol show job -o "$SLURM_JOB_ID" | sed -n "s/^JobId=$SLURM_JOB_ID .* $1=\([^ ]*\).*/\1/p"
}

# First lines of every log: which job this is, and where it runs.
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

# newest_step RUN: step of its newest checkpoint; 0 where there is none.
newest_step() {
  local folder newest=0
  for folder in "$1"/step-????????; do
    if [ -d "$folder" ]; then newest=$((10#${folder##*-})); fi
  done
  echo "$newest"
}

# MASTER_ADDR and MASTER_PORT: rank 0's node, which is this one, and a port that is free here.
choose_rendezvous() {
  local first
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  if [ -z "${MASTER_ADDR:-}" ]; then
    MASTER_ADDR=$first
    # A node's name in Slurm need not be one that the network knows.
    getent hosts "$first" >/dev/null ||
      MASTER_ADDR=$(scontrol show node -o "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
  fi
  if [ -z "${MASTER_PORT:-}" ]; then
    # Below the ports that the system itself hands out; jobs that share a node start apart.
    MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
    while (exec 3<>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do
      MASTER_PORT=$((MASTER_PORT + 1))
    done
  fi
  export MASTER_ADDR MASTER_PORT
}
