#!/usr/bin/env bash
#SBATCH --job-name=prepare
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=32
#SBATCH --cpus-per-task=1
#SBATCH --mem-per-cpu=2G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
#
# Encode documents into shards, on all tasks of the job, without a GPU:
#   sbatch [options of sbatch] slurm/prepare_data.sh --input GLOB ... --tokenizer DIR --output DIR
#     [more options of launcher/prepare_data.py encode]
# If the job ends early, submit the same command again: it continues after the finished shards.
#
# mpirun starts the ranks, or srun if Slurm supports MPI (SRUN_MPI=pmix or pmi2).
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit
if [ ! -f slurm/common.sh ]; then
  echo "error: $PWD: must be the top folder of tensorlm (submit the job from there)" >&2
  exit 2
fi
. slurm/common.sh
load_site
need_job prepare_data.sh
if [ "$SLURM_NTASKS" = 1 ]; then
  start=() # a single process uses all its cores without MPI
elif [ -n "${SRUN_MPI:-}" ]; then
  start=(srun --mpi="$SRUN_MPI" --kill-on-bad-exit=1)
else
  need mpirun
  start=(mpirun --bind-to none)
fi
describe_job
echo "ranks = $SLURM_NTASKS"
exec "${start[@]}" python launcher/prepare_data.py encode "$@"
