#!/usr/bin/env bash
# Compare kinds of attention on a pretrained Llama: download SmolLM2-135M, adapt each variant of
# configs/adapt on the same rows, evaluate and compare them, export one, generate. `make adapt`.
#
#   VARIANTS="full window routed"   names in configs/adapt (default: these three; on a GPU: all)
#   SEEDS="0 1 2"                   seeds (default: 0); the table gives means and deviations
#   BOOKS="texts/*.txt"             books, in addition to the source of installed Python packages
#   HELD_OUT="sympy networkx"       packages and names of books to evaluate on
#   TASKS='["ruler"]'               retrieval tasks, on a GPU (default: passkey and needles)
#   MODEL=DIR                       a Hugging Face folder of SmolLM2-135M (default: download it)
set -euo pipefail
cd "$(dirname "$0")/.."

out=runs/adapt
# Memory of the GPU in GiB, or 0.
gpu=$(python -c 'import torch.cuda as c
print(c.get_device_properties(0).total_memory >> 30 if c.is_available() else 0)')
read -ra held_out <<<"${HELD_OUT:-sympy networkx sklearn}"
read -ra books <<<"${BOOKS:-}"
export TOKENIZERS_PARALLELISM=true PYTHONUNBUFFERED=1

# On a CPU: fewer variants, shorter rows, fewer steps. Evaluation uses 4 times the trained length.
if [ "$gpu" -gt 0 ]; then
  variants=${VARIANTS:-full window window_2048 strided hybrid routed_random routed_wide routed routed_24}
  size=() window=() route=() code_bytes=0 trained=8192 predicted=1048576
  tasks=${TASKS:-'["passkey","niah"]'}
else
  export DS_ACCELERATOR=cpu
  variants=${VARIANTS:-full window routed}
  size=(data.seq_len=1024 train.dtype=fp32 zero.stage=2 train.micro_batch=1 train.rows_per_step=1
    train.steps=3 optim.warmup_steps=1 checkpoint.every=3)
  window=(model.window=128) route=(model.route.block=32 model.route.top_k=6)
  code_bytes=3000000 trained=1024 predicted=4096
  tasks=
fi

run() {
  printf '\n\033[1m$ %s\033[0m\n' "$*"
  "$@"
}

# Losses on each text, and retrieval, of the run in $dir.
evaluate() {
  for text in "${texts[@]}"; do
    run python launcher/evaluate.py --config $config --output $dir/$text \
      --lengths $trained,$((4 * trained)) --tasks ppl "${settings[@]}" \
      eval.text=$out/texts/$text/held_out.jsonl eval.max_tokens=$predicted
  done
  [ -z "$tasks" ] || grep -q '^choice = "random"' $config || # it cannot generate
    run python launcher/evaluate.py --config $config --output $dir/needles \
      --lengths $trained,$((4 * trained)) "${settings[@]}" "eval.tasks=$tasks" \
      "eval.text=$out/texts/${texts[-1]}/held_out.jsonl"
}

# On a GPU, run a command beside the next training: background LOG COMMAND ...
jobs=() logs=()
background() {
  local log=$1
  shift
  set -m # a process group of its own
  "$@" >"$log" 2>&1 &
  jobs+=($!) logs+=("$log")
  set +m
}
# Wait for these commands; the script ends if one failed.
finish() {
  local i
  for i in "${!jobs[@]}"; do
    wait "${jobs[i]}" || {
      tail -n 3 "${logs[i]}" || true
      exit 1
    }
  done
  jobs=() logs=()
}
# Nothing is left on the GPU if the script ends early.
trap 'for job in "${jobs[@]}"; do kill -- "-$job" 2>/dev/null || true; done' EXIT

mkdir -p $out
if [ -n "${MODEL:-}" ]; then
  model=$MODEL
else
  model=$out/smollm2
  [ -e $model/config.json ] || run python -m tensorlm.benchmarks.smollm2 $model
fi

texts=(code)
[ -e $out/texts/code/held_out.jsonl ] ||
  run python launcher/prepare_data.py packages --hold-out "${held_out[@]}" --output $out/texts/code
if [ ${#books[@]} -gt 0 ]; then
  texts+=(books)
  [ -e $out/texts/books/held_out.jsonl ] ||
    run python launcher/prepare_data.py packages --text "${books[@]}" --hold-out "${held_out[@]}" \
      --output $out/texts/books
fi
sources=()
for text in "${texts[@]}"; do
  run python launcher/prepare_data.py encode --input $out/texts/$text/train.jsonl \
    --tokenizer "$model" --output $out/data/$text --holdout 0 --max-bytes $code_bytes
  [ $text = code ] && weight=4 || weight=1
  sources+=("{path = \"$out/data/$text\", weight = $weight}")
done
sources="data.sources=[$(IFS=,; echo "${sources[*]}")]"

# One run for each seed and variant, on the same rows.
runs=() names=() seeds=()
for seed in ${SEEDS:-0}; do
  for variant in $variants; do
    dir=$out/$variant
    [ "$seed" = 0 ] || dir+=-$seed
    runs+=("$dir") names+=("$variant") seeds+=("$seed")
  done
done

# Set $config, $dir and $settings of run $1.
choose() {
  config=configs/adapt/${names[$1]}.toml dir=${runs[$1]}
  settings=("run.seed=${seeds[$1]}" "run.dir=$dir" "$sources" "${size[@]}")
  ! grep -q '^window' $config || settings+=("${window[@]}")
  ! grep -q '^.model.route' $config || settings+=("${route[@]}")
}

import() {
  choose "$1"
  [ -e $dir/step-00000000 ] ||
    run python launcher/convert.py import --config $config --hf "$model" "${settings[@]}"
}

minutes() { printf '%d min' $((($1 + 30) / 60)); }

first=$SECONDS
for i in "${!runs[@]}"; do
  # Each run takes about as long as those before it.
  left=''
  [ $i = 0 ] || left=", about $(minutes $(((SECONDS - first) * (${#runs[@]} - i) / i))) left"
  printf '\n\033[1mrun %d of %d: %s, seed %s (%s since the start%s)\033[0m\n' \
    $((i + 1)) ${#runs[@]} "${names[i]}" "${seeds[i]}" "$(minutes $SECONDS)" "$left"
  import "$i"
  # Generation leaves a GPU mostly idle, so the next run is trained meanwhile if both fit.
  if [ "$gpu" -ge 40 ]; then
    [ $((i + 1)) = ${#runs[@]} ] || background $out/import.log import $((i + 1))
    run python launcher/train.py --config $config "${settings[@]}"
    finish
    echo "evaluation in the background: $dir/evaluation.log"
    background $dir/evaluation.log evaluate
  else
    run python launcher/train.py --config $config "${settings[@]}"
    evaluate
  fi
done
finish

# The last variant (not routed_random) answers a prompt under plain transformers.
rm -rf $out/hf
run python launcher/convert.py export --config "$config" --output $out/hf --dtype fp32 \
  "${settings[@]}"
run python launcher/generate.py --model $out/hf --max-new-tokens 24 \
  --prompt 'The pass key is 71432. Remember it. What is the pass key? The pass key is'

printf '\n\033[1mresults after %s\033[0m\n' "$(minutes $SECONDS)"
run python launcher/benchmark.py adaptation "${runs[@]}"
