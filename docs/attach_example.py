"""Train a plain Llama with strided or routed attention in Hugging Face's Trainer (LoRA: --lora).

    python docs/attach_example.py --model LLAMA_FOLDER --text FILE.txt --fold 1024 --output DIR
    python docs/attach_example.py --model LLAMA_FOLDER --text FILE.txt --window 1024 \\
      --route 64 16 16 --output DIR

Load the result with AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True).
"""

import argparse

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from tensorlm.data.tokenizer.tokenizers import load_tokenizer
from tensorlm.hf import attach


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a Llama model")
    parser.add_argument("--text", required=True, help="text file with one document per line")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--fold", type=int, nargs="+", default=[1024],
        help="lengths of the inner axes, innermost first (default: 1024)",
    )  # fmt: skip
    kind.add_argument(
        "--route", type=int, nargs=3, metavar=("BLOCK", "TOP_K", "STRETCH"),
        help="routed layers: tokens per block, blocks that each token chooses, and divisor of "
        "rotary positions beyond the window",
    )  # fmt: skip
    parser.add_argument(
        "--window", type=int, default=1024, help="window of routed layers (default: 1024)"
    )
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument(
        "--length", type=int, default=8192, help="maximum tokens per document (default: 8192)"
    )
    parser.add_argument("--steps", type=int, default=100, help="training steps (default: 100)")
    parser.add_argument("--lora", action="store_true", help="train only adapters and hop biases")
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.model)  # gives the ids of tokenizer.json
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model)
    # In place, before PEFT and before the optimizer.
    if args.route:
        route = dict(zip(("block", "top_k", "stretch"), args.route, strict=True))
        attach(model, window=args.window, route=route)
    else:
        attach(model, fold=args.fold)
    if args.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
        for name, parameter in model.named_parameters():
            if name.endswith("hop_bias"):  # PEFT has frozen them
                parameter.requires_grad = True

    def encode(lines: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return dict(tokenizer(lines["text"], truncation=True, max_length=args.length))

    texts = load_dataset("text", data_files=args.text, split="train")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=f"{args.output}-trainer",
            max_steps=args.steps,
            per_device_train_batch_size=2,
            learning_rate=1e-4,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=texts.map(encode, batched=True, remove_columns=["text"]),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    if args.lora:
        model = model.merge_and_unload()  # an adapter alone does not contain the hop biases
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
