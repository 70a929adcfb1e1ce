#!/usr/bin/env bash
# The whole workflow, on the source code of this machine's Python standard library: tokenizer,
# shards, training, resume, evaluation, export, generation. Run it with `make demo`.
set -euo pipefail
cd "$(dirname "$0")/.."

out=runs/demo
config=configs/demo.toml
stdlib=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
gpus=$(python -c 'import torch; print(min(2, torch.cuda.device_count()))')
port=$(python -c 'from tensorlm.runtime.launch_env import free_port; print(free_port())')
if [ "$gpus" -gt 0 ]; then
  ranks=(--num_gpus "$gpus")
else
  export DS_ACCELERATOR=cpu
  ranks=(--num_accelerators 2)
fi
export TOKENIZERS_PARALLELISM=true PYTHONUNBUFFERED=1

run() {
  printf '\n\033[1m$ %s\033[0m\n' "$*"
  "$@"
}
train() { run deepspeed --quiet "${ranks[@]}" --master_port "$port" launcher/train.py "$@"; }

started=$SECONDS
rm -rf "$out"
mkdir -p "$out"
corpus=(--input "$stdlib/**/*.py" --exclude '*/site-packages/*' '*/test/*' '*/tests/*'
  --max-bytes 8000000)
run python launcher/prepare_data.py tokenizer "${corpus[@]}" --vocab-size 2048 \
  --output $out/tokenizer
run python launcher/prepare_data.py encode "${corpus[@]}" --tokenizer $out/tokenizer \
  --output $out/data --holdout 0.12

train --config $config train.stop_at=80
train --config $config # resumes from checkpoint 80

run python launcher/evaluate.py --config $config --lengths 4096,8192,16384
run python launcher/convert.py export --config $config --output $out/hf --dtype fp32

prompt='def read_file(path):
    """'
printf '\n\033[1mgenerate with plain transformers\033[0m\n'
(cd $out && python -I - "$prompt" <<'PYTHON'
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

model = AutoModelForCausalLM.from_pretrained("./hf", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("./hf", trust_remote_code=True)
set_seed(0)
inputs = tokenizer(sys.argv[1], return_tensors="pt", return_token_type_ids=False)
tokens = model.generate(**inputs, max_new_tokens=60, do_sample=True, temperature=0.7)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
PYTHON
) | tee $out/sample.txt

checkpoint=$(ls -d $out/train/step-* | tail -n 1)
evaluation=$out/train/eval/$(basename "$checkpoint")
printf '\n\033[1m%-17s %s\033[0m\n' "done in $((SECONDS - started)) s" file
row() { printf '%-17s %s\n' "$1" "$2"; }
row tokenizer $out/tokenizer
row shards $out/data
row checkpoint "$checkpoint"
row metrics $out/train/metrics.jsonl
row TensorBoard ".venv/bin/tensorboard --logdir $out/train/tensorboard"
row 'evaluation' "$evaluation/report.html"
row plot "$evaluation/ratio.png"
row 'Hugging Face' $out/hf
row 'more text' ".venv/bin/python launcher/generate.py --model $out/hf --prompt 'class Stack:'"
printf '\n\033[1mresults\033[0m\n'
sed -n 's/^\*\*\(.*\)\*\*$/\1/p' "$evaluation/report.md" | fold -sw 100
