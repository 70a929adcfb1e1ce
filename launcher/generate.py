"""Write text with an exported folder: `launcher/generate.py --model DIR --prompt "def main"`.

The text appears as it is generated. A folder's own code is never run: this installation's is.
"""

import argparse
from pathlib import Path

from tensorlm.errors import UserError, run_launcher


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="exported folder")
    parser.add_argument("--prompt", required=True, help="text to continue; - reads standard input")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--prefill-chunk", type=int, metavar="TOKENS", help="read a long prompt in pieces"
    )
    args = parser.parse_args()
    if not (args.model / "config.json").exists():
        raise UserError(f"{args.model}: no config.json (make it with launcher/convert.py export)")
    for option in ("max_new_tokens", "prefill_chunk"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise UserError(f"--{option.replace('_', '-')}: must be at least 1")

    import sys

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, TextStreamer
    from transformers.utils import logging

    from tensorlm.data.tokenizers import load_tokenizer
    from tensorlm.hf.configuration_tensorlm import TensorLMConfig
    from tensorlm.hf.modeling_tensorlm import TensorLMForCausalLM

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    device = "cuda" if torch.cuda.is_available() else "cpu"
    AutoConfig.register("tensorlm", TensorLMConfig)
    AutoModelForCausalLM.register(TensorLMConfig, TensorLMForCausalLM)
    tokenizer = load_tokenizer(args.model)
    try:
        model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=False).to(device)
    except (OSError, ValueError) as error:
        raise UserError(f"{args.model}: {str(error).strip().splitlines()[0]}") from None
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    if inputs["input_ids"].shape[1] == 0:
        raise UserError("--prompt: is empty")
    settings = {"do_sample": args.temperature > 0, "prefill_chunk_size": args.prefill_chunk}
    if args.temperature > 0:
        settings |= {"temperature": args.temperature, "top_p": args.top_p}
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=args.max_new_tokens, streamer=streamer, **settings)
    return 0


if __name__ == "__main__":
    run_launcher(main)
