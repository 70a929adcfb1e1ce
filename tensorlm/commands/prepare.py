"""Prepare data: train a tokenizer, encode documents into shards, verify and inspect them.

python launcher/prepare_data.py tokenizer --input 'texts/*.txt' --vocab-size 4096 --output TOKENIZER
python launcher/prepare_data.py encode --input '*.parquet' --tokenizer TOKENIZER --output DATA
mpirun -np 8 python launcher/prepare_data.py encode ...    # the same, over the ranks (also: srun)
python launcher/prepare_data.py verify DATA
python launcher/prepare_data.py inspect DATA --plot lengths.png
"""

import argparse
import os
from pathlib import Path

from tensorlm.data.prepare.encode import SHARD_BYTES, encode
from tensorlm.data.prepare.inputs import LONGEST_DOCUMENT, find_files, read_documents
from tensorlm.data.shards import open_shards, verify_shards
from tensorlm.data.tokenizer.tokenizers import (
    check_new_tokenizer,
    check_tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from tensorlm.runtime.errors import UserError
from tensorlm.runtime.exit import run_launcher
from tensorlm.runtime.launch_env import launched_world_size


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    source = argparse.ArgumentParser(add_help=False)
    source.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="GLOB",
        help="text files (one document each), .json, .jsonl, .ndjson (these also .gz, .zst), "
        ".parquet, .arrow, or hf:NAME[:SUBSET[:SPLIT]] for a data set of the hub or a local folder "
        "of `datasets`",
    )
    source.add_argument("--exclude", nargs="*", default=[], metavar="GLOB", help="files to skip")
    source.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="field that holds the text (default text); meta.text is field text inside field meta",
    )
    source.add_argument("--max-bytes", type=int, default=0, help="stop after this much input")
    source.add_argument(
        "--max-document-bytes",
        type=int,
        default=LONGEST_DOCUMENT,
        metavar="BYTES",
        help="largest document that is accepted, decompressed; of JSON files the largest record "
        f"(default {LONGEST_DOCUMENT:,}); a larger one ends the call with an error",
    )

    tokenizer = commands.add_parser("tokenizer", parents=[source], help="train a sentencepiece BPE")
    tokenizer.add_argument("--vocab-size", type=int, required=True)
    tokenizer.add_argument("--output", type=Path, required=True, help="folder without a tokenizer")

    shards = commands.add_parser("encode", parents=[source], help="encode documents into shards")
    shards.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        help="Hugging Face folder, or a sentencepiece BPE .model",
    )
    shards.add_argument("--output", type=Path, required=True, help="folder of the data set")
    shards.add_argument(
        "--holdout",
        type=float,
        default=0.01,
        help="share of the documents kept for evaluation (default 0.01)",
    )
    shards.add_argument(
        "--workers", type=int, default=0, help="processes (default: one a core; one an MPI rank)"
    )
    shards.add_argument(
        "--shard-bytes", type=int, default=SHARD_BYTES, help="input bytes in one shard"
    )

    verify = commands.add_parser("verify", help="check every byte of a data set")
    verify.add_argument("data", type=Path)

    inspect = commands.add_parser("inspect", help="counts, document lengths, samples")
    inspect.add_argument("data", type=Path)
    inspect.add_argument("--samples", type=int, default=3, help="documents to show")
    inspect.add_argument(
        "--seq-len", type=int, nargs="+", default=[8192, 32768, 131072], help="rows to plan"
    )
    inspect.add_argument("--plot", type=Path, metavar="FILE.png", help="plot document lengths")
    args = parser.parse_args()

    _check(args)
    if args.command == "tokenizer":
        check_new_tokenizer(args.output)  # now: training takes minutes
        files = find_files(args.input, args.exclude)
        texts = read_documents(files, args.text_field, args.max_bytes, args.max_document_bytes)
        train_tokenizer(texts, args.vocab_size, args.output)
        print(f"{args.output}: sentencepiece tokenizer, {args.vocab_size:,} pieces")
    elif args.command == "encode":
        own_cores = len(os.sched_getaffinity(0)) if launched_world_size() == 1 else 1
        summary = encode(
            find_files(args.input, args.exclude), args.tokenizer, args.output,
            text_field=args.text_field, max_bytes=args.max_bytes, shard_bytes=args.shard_bytes,
            holdout=args.holdout, workers=args.workers or own_cores,
            longest=args.max_document_bytes,
        )  # fmt: skip
        if summary:
            print(summary)
    elif args.command == "verify":
        for split in _splits(args.data):
            if bad := verify_shards(split):
                raise UserError(*bad)
            found, _ = open_shards(split)
            check_tokenizer(args.data / "tokenizer", found[0].header.tokenizer_sha256)
            load_tokenizer(args.data / "tokenizer")
            print(f"{split}: {len(found)} shards are whole")
    else:
        _inspect(args)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Numbers and names that argparse takes as they are."""
    least = {
        "vocab_size": 1, "max_bytes": 0, "max_document_bytes": 1, "workers": 0, "shard_bytes": 1,
        "samples": 0,
    }  # fmt: skip
    for name, value in least.items():
        if getattr(args, name, value) < value:
            raise UserError(f"--{name.replace('_', '-')}: {getattr(args, name)} is too small")
    if args.command == "encode" and not 0 <= args.holdout < 1:
        raise UserError(f"--holdout: {args.holdout} is not a share (0 <= share < 1)")
    if args.command == "inspect":
        if min(args.seq_len) < 1:
            raise UserError(f"--seq-len: {min(args.seq_len)} is too small")
        if args.plot and args.plot.suffix != ".png":
            raise UserError(f"--plot: {args.plot} is not a name of a .png")


def _splits(data: Path) -> list[Path]:
    splits = [data / name for name in ("train", "valid") if (data / name).is_dir()]
    if not splits:
        raise UserError(f"{data}: no data set (no train/ or valid/; make one with encode)")
    return splits


def _inspect(args: argparse.Namespace) -> None:
    from tensorlm.data import inspect

    splits = []
    for split in _splits(args.data):
        if inspect.is_empty(split):
            print(f"{split}: empty", end="\n\n")
            continue
        splits.append(split)
        print(inspect.describe_split(split, args.seq_len), end="\n\n")
        print(*inspect.sample_documents(args.data, split.name, args.samples), sep="\n", end="\n\n")
    if args.plot:
        inspect.plot_lengths(splits, args.plot)
        print(f"plot: {args.plot}")


def run() -> None:
    """Run this command with the arguments of the process, and end the process."""
    run_launcher(main)
