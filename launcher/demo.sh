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
row sample $out/sample.txt
printf '\n\033[1mresults\033[0m\n'
python - "$out/train" "$evaluation" <<'PYTHON'
import json
import math
import sys
import tomllib
from pathlib import Path

run, evaluation = map(Path, sys.argv[1:])
model = tomllib.loads((run / "config.toml").read_text())["model"]
steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
report = json.loads((evaluation / "report.json").read_text())
trained, longest = report["perplexity"][0], report["perplexity"][-1]
ratio = report["ratios"][-1]["ratio"]
change = {name: f"{100 * (value - 1):+.2f} %" for name, value in ratio.items()}
note = "; no measurable change" if ratio["low"] < 1 < ratio["high"] else ""
window, length = model["fold"][0], longest["length"]
print(f'''
Training: the perplexity of {math.exp(steps[0]["train/loss"]):,.0f} at the first step fell to \
{trained["perplexity"]:.1f} on held-out text after {len(steps)}
steps: the model now chooses the next token as if among {trained["perplexity"]:.0f} tokens instead of all \
{model["vocab_size"]:,}.

Longer text: on the same tokens, with {length:,} tokens of context instead of the trained \
{trained["length"]:,},
perplexity is {longest["perplexity"]:.1f} ({change["mean"]}; 95 % interval: {change["low"]} to {change["high"]}{note}).

Cost: each layer reads at most {window} + {length // window} positions per token; full attention reads up to \
{length:,}.
'''.strip())
PYTHON
