#!/usr/bin/env bash
#SBATCH --job-name=eval128k
#SBATCH --array=0-5
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=12
#SBATCH --mem=96G
#SBATCH --time=8:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%A_%a.out
#
# Evaluate checkpoints at 4k to 128k, each (checkpoint, length) separately and in parallel. When all
# have ended, another job joins their reports:
#   sbatch [options of sbatch] slurm/eval_128k.sh [--config FILE] [--lengths 4096,8192,...]
#     [--checkpoints STEP,STEP,... | --hf DIR] [options of launcher/evaluate.py] [key=value ...]
#
# Default checkpoint: the newest one when the first task starts. Any number of array tasks share the
# work (`--array=0-11%4`). The GPUs of a task share the prompts, and with parallel.sp also each
# window. Result: RUN/eval/eval128k-JOB/report.html. Guide: docs/clusters.md.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit
if [ ! -f slurm/common.sh ]; then
  echo "error: $PWD: must be the top folder of tensorlm (submit the job from there)" >&2
  exit 2
fi
. slurm/common.sh
load_site
need_job eval_128k.sh

# --------------------------------------------------------------------------------- the last task

if [ "${1:-}" = --collect ]; then
  out=$2 code=0
  python launcher/evaluate.py --compare "$out/parts" --output "$out" || exit
  while read -r part; do
    if [ ! -f "$out/parts/$part/report.json" ]; then
      echo "error: $out/parts/$part: report.json is missing (see its log in slurm/logs)" >&2
      code=1
    fi
  done <"$out/expected"
  exit $code
fi

# ------------------------------------------------------------------------------------ every task

config=configs/llama8b_32k.toml lengths=4096,8192,16384,32768,65536,131072 checkpoints=
options=() settings=() hugging_face=
while [ $# -gt 0 ]; do
  case $1 in --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac # --hf=DIR like --hf DIR
  case $1 in
  --config | --lengths | --checkpoint | --checkpoints | --hf) need_value "$@" ;;&
  --config) config=$2 && shift ;;
  --lengths) lengths=$2 && shift ;;
  --checkpoint | --checkpoints) checkpoints=$2 && shift ;;
  --hf) hugging_face=$2 && shift ;;
  [a-z]*.*=*) settings+=("$1") ;;
  *) options+=("$1") ;;
  esac
  shift
done
longest=$(tr , '\n' <<<"$lengths" | sort -n | tail -n 1)
describe_job
gpus=${SLURM_GPUS_ON_NODE:-1}
check_tasks "${SLURM_NTASKS_PER_NODE:-$gpus}" "$gpus"
run_dir=$(run_dir_of "$config" "${settings[@]}") || exit
out=$run_dir/eval/$SLURM_JOB_NAME-$SLURM_ARRAY_JOB_ID
echo "output = $out"
mkdir -p "$out/parts" || exit

# The first task to arrive decides the list of (checkpoint, length) for all tasks, and submits the
# job that joins the reports. `ln` is atomic and fails if the name exists.
if [ ! -f "$out/expected" ]; then
  if [ -n "$hugging_face" ]; then
    names=hf
  else
    names=${checkpoints:-$(newest_step "$run_dir")}
  fi
  mine=$out/.expected-$SLURM_ARRAY_TASK_ID
  for name in ${names//,/ }; do
    for length in ${lengths//,/ }; do echo "$name-$length"; done
  done >"$mine"
  if ln "$mine" "$out/expected" 2>/dev/null; then
    # afterany: the job that joins the reports names the parts that failed.
    collect=(sbatch --parsable --dependency="afterany:$SLURM_ARRAY_JOB_ID" --array=0
      --job-name="$SLURM_JOB_NAME-report" --partition="$SLURM_JOB_PARTITION"
      ${SLURM_JOB_ACCOUNT:+"--account=$SLURM_JOB_ACCOUNT"} ${SLURM_JOB_QOS:+"--qos=$SLURM_JOB_QOS"}
      --nodes=1 --gpus-per-node=0 --ntasks-per-node=1 --cpus-per-task=1 --mem=8G --time=30
      slurm/eval_128k.sh --collect "$out")
    echo "report = job $("${collect[@]}")" ||
      echo "warning: cannot submit the job that joins the reports; submit it yourself: ${collect[*]}"
  fi
  rm "$mine"
fi

# ------------------------------------------------------------------------------ this task's share

ranks=$((SLURM_NNODES * gpus))
choose_rendezvous
number=0 code=0
while read -r part <&3; do
  if [ $((number++ % SLURM_ARRAY_TASK_COUNT)) != $((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN)) ]; then
    continue
  fi
  checkpoint=${part%-*}
  which=(--checkpoint "$checkpoint")
  if [ -n "$hugging_face" ]; then which=(--hf "$hugging_face"); fi
  echo "part = $part"
  # eval.segment: all lengths predict the same held-out tokens.
  srun --kill-on-bad-exit=1 --ntasks="$ranks" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    python launcher/evaluate.py --config "$config" "${which[@]}" --lengths "${part##*-}" \
    --output "$out/parts/$part" "${options[@]}" "eval.segment=$longest" "${settings[@]}" ||
    code=$?
done 3<"$out/expected"
exit $code
