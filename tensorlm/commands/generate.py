"""Generate text with an exported folder: `python launcher/generate.py --model DIR --prompt TEXT`.

The text is printed while it is generated. Code in the folder is never run; the model is built by
this installation.
"""

import argparse
import math
import os
import sys

from tensorlm.runtime.arguments import Option, parse
from tensorlm.runtime.errors import UserError
from tensorlm.runtime.exit import run_launcher
from tensorlm.runtime.imports import without_collection

OPTIONS = {
    "--model DIR": Option("exported folder to load", required=True),
    "--prompt TEXT": Option("text to continue (-: read it from standard input)", required=True),
    "--max-new-tokens N": Option("maximum number of tokens to generate", 128),
    "--temperature T": Option(
        "sampling temperature (default: 0, which always takes the most likely token)", 0.0
    ),
    "--top-p P": Option(
        "sample from the most likely tokens whose probabilities add up to this share; used only if "
        "the temperature is above 0",
        0.95,
    ),
    "--seed N": Option("seed of the sampling; used only if the temperature is above 0", 0),
    "--prefill-chunk TOKENS": Option(
        "read the prompt in pieces of this many tokens, to save memory (default: in one piece)"
    ),
}


def main() -> int:
    args = parse(__doc__, OPTIONS)
    check_arguments(args)
    prompt = read_prompt(args.prompt)

    with without_collection():
        import torch
        from transformers import TextStreamer
        from transformers.utils import logging

        from tensorlm.data.tokenizer.tokenizers import load_tokenizer
        from tensorlm.hf.load_folder import load_folder

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(args.model)
    model = load_folder(args.model).to(device)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    if ids[:1] != [tokenizer.bos_token_id]:  # documents began with it in training
        ids.insert(0, tokenizer.bos_token_id)
    tokens = torch.tensor([ids], device=device)
    settings = {"do_sample": args.temperature > 0, "prefill_chunk_size": args.prefill_chunk}
    if args.temperature > 0:
        settings |= {"temperature": args.temperature, "top_p": args.top_p}
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    settings |= {"max_new_tokens": args.max_new_tokens, "streamer": streamer}
    model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **settings)
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UserError, with one line for each invalid option."""
    if not (args.model / "config.json").exists():
        raise UserError(
            f"{args.model}: must contain config.json (write the folder with launcher/convert.py "
            "export)"
        )
    chunk = 1 if args.prefill_chunk is None else args.prefill_chunk
    checks = [
        ("max-new-tokens", args.max_new_tokens, args.max_new_tokens >= 1, "at least 1"),
        ("temperature", args.temperature,
         args.temperature == 0 or 1e-6 <= args.temperature < math.inf,
         "0 (greedy) or at least 1e-6"),
        ("top-p", args.top_p, 0 < args.top_p <= 1, "above 0 and at most 1"),
        ("seed", args.seed, 0 <= args.seed < 2**64, "at least 0 and below 2**64"),
        ("prefill-chunk", chunk, chunk >= 1, "at least 1"),
    ]  # fmt: skip
    problems = [
        f"--{name}: must be {rule}, got {value}" for name, value, is_good, rule in checks
        if not is_good
    ]  # fmt: skip
    if problems:
        raise UserError(*problems)


def read_prompt(argument: str) -> str:
    """Read the text of `--prompt`, or of standard input."""
    content = sys.stdin.buffer.read() if argument == "-" else os.fsencode(argument)
    if not content:
        raise UserError("--prompt: must not be empty")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt: must be UTF-8, got an {error.reason} at byte {error.start}"
        ) from None


def run() -> None:
    """Run this command with the arguments of the process, and end the process."""
    run_launcher(main)
