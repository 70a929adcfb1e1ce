#!/usr/bin/env bash
#SBATCH --job-name=convert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=96G
#SBATCH --time=2:00:00
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.out
#
# Convert weights between checkpoints and Hugging Face folders, without a GPU:
#   sbatch [options of sbatch] slurm/convert.sh import --config FILE --hf DIR [key=value ...]
#   sbatch [options of sbatch] slurm/convert.sh export --config FILE --output DIR [key=value ...]
# Use --dependency to run it before or after a training or an evaluation (docs/clusters.md).
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" || exit
if [ ! -f slurm/common.sh ]; then
  echo "error: $PWD: must be the top folder of tensorlm (submit the job from there)" >&2
  exit 2
fi
. slurm/common.sh
load_site
need_job convert.sh
describe_job
exec python launcher/convert.py "$@"
