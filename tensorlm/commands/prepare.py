"""Prepare data: train a tokenizer, encode documents into token shards, verify and inspect shards.

Train a tokenizer:
  python launcher/prepare_data.py tokenizer --input 'texts/*.txt' --vocab-size 4096 --output TOK
Encode documents on all cores of this machine, or on all MPI ranks (mpirun or srun):
  python launcher/prepare_data.py encode --input '*.parquet' --tokenizer TOK --output DATA
  mpirun -np 8 python launcher/prepare_data.py encode ...
Write the source of installed Python packages as long documents, some of them held out:
  python launcher/prepare_data.py packages --hold-out sympy networkx --output TEXTS
Check every byte of a data set, and show what it contains:
  python launcher/prepare_data.py verify DATA
  python launcher/prepare_data.py inspect DATA --plot lengths.png
"""

import argparse
import os
from pathlib import Path

from tensorlm.data.prepare.encode import SHARD_BYTES, encode
from tensorlm.data.prepare.files import find_files
from tensorlm.data.prepare.inputs import read_documents
from tensorlm.data.prepare.packages import books, installed_packages, write_long_texts
from tensorlm.data.prepare.readers import LONGEST_DOCUMENT
from tensorlm.data.shards import open_shards, verify_shards
from tensorlm.data.tokenizer.tokenizers import check_tokenizer, load_tokenizer
from tensorlm.data.tokenizer.training import check_new_tokenizer, train_tokenizer
from tensorlm.runtime.arguments import Command, Option, check_plot, parse_command
from tensorlm.runtime.errors import UserError
from tensorlm.runtime.exit import run_launcher
from tensorlm.runtime.launch_env import launched_world_size

SOURCE = {
    "--input GLOB": Option(
        "files to read: text (one document each), .json, .jsonl, .ndjson (all of these also as .gz "
        "or .zst), .parquet, .arrow or .feather; or hf:NAME[:SUBSET[:SPLIT]] for a data set of the "
        "Hugging Face Hub or a local folder of `datasets`",
        nargs="+",
        required=True,
    ),
    "--exclude GLOB": Option("files of --input to skip (default: none)", [], nargs="*"),
    "--text-field NAME": Option(
        "field that holds the text (default: text); meta.text is the field text inside meta", "text"
    ),
    "--max-bytes BYTES": Option(
        "stop after this many bytes of input (default: 0, which reads all)", 0
    ),
    "--max-document-bytes BYTES": Option(
        "maximum size of a document, or of a record of a JSON file, after decompression; a larger "
        "one ends the command with an error",
        LONGEST_DOCUMENT,
    ),
}
DATA = {"data DATA": Option("folder of the data set")}
COMMANDS = {
    "tokenizer": Command(
        "train a sentencepiece BPE tokenizer",
        {
            **SOURCE,
            "--vocab-size N": Option("number of pieces in the vocabulary", required=True),
            "--output DIR": Option("folder to write; must not contain a tokenizer", required=True),
        },
    ),
    "encode": Command(
        "encode documents into token shards",
        {
            **SOURCE,
            "--tokenizer PATH": Option(
                "tokenizer: a Hugging Face folder or a sentencepiece BPE .model file", required=True
            ),
            "--output DIR": Option(
                "folder of the data set to write; an interrupted call continues there",
                required=True,
            ),
            "--holdout SHARE": Option(
                "share of the documents to hold out in the split valid/ (0: none; default: 0.01)",
                0.01,
            ),
            "--workers N": Option(
                "number of processes (default: 0, which means one per core, or one per MPI rank)", 0
            ),
            "--shard-bytes BYTES": Option(
                f"approximate bytes of input per shard (default: {SHARD_BYTES:,}; more for many "
                "terabytes)",
                SHARD_BYTES,
            ),
        },
    ),
    "packages": Command(
        "write the source of installed Python packages as long documents",
        {
            "--text GLOB": Option(
                "write these text files (also .gz, .zst) as books instead of the packages",
                [],
                nargs="*",
            ),
            "--hold-out NAME": Option(
                "packages or books (file name without extensions) to write to held_out.jsonl",
                nargs="+",
                required=True,
            ),
            "--output DIR": Option(
                "folder for train.jsonl (with repeated passages, and facts that are asked for "
                "later) and held_out.jsonl",
                required=True,
            ),
        },
    ),
    "verify": Command("check every byte of a data set and its tokenizer", DATA),
    "inspect": Command(
        "show counts, document lengths and samples of a data set",
        {
            **DATA,
            "--samples N": Option("number of documents to show (default: 3; 0: none)", 3),
            "--seq-len TOKENS": Option(
                "row lengths for which to show how full packed rows are (default: 8192 32768 "
                "131072)",
                [8192, 32768, 131072],
                nargs="+",
            ),
            "--plot FILE.png": Option("plot document lengths into this file"),
        },
    ),
}


def main() -> int:
    args = parse_command(__doc__, COMMANDS)
    _check(args)
    if args.command == "tokenizer":
        check_new_tokenizer(args.output)  # early: training takes minutes
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
    elif args.command == "packages":
        long_texts = books(args.text) if args.text else installed_packages()
        print(write_long_texts(long_texts, args.hold_out, args.output))
    elif args.command == "verify":
        for split in _splits(args.data):
            if bad := verify_shards(split):
                raise UserError(*bad)
            found, _ = open_shards(split)
            check_tokenizer(args.data / "tokenizer", found[0].header.tokenizer_sha256)
            load_tokenizer(args.data / "tokenizer")
            print(f"{split}: all shards are intact ({len(found)})")
    else:
        _inspect(args)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Check numbers and names that argparse does not check."""
    least = {
        "vocab_size": 1, "max_bytes": 0, "max_document_bytes": 1, "workers": 0, "shard_bytes": 1,
        "samples": 0,
    }  # fmt: skip
    for name, value in least.items():
        if getattr(args, name, value) < value:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option}: must be at least {value}, got {getattr(args, name)}")
    if args.command == "encode" and not 0 <= args.holdout < 1:
        raise UserError(f"--holdout: must be at least 0 and below 1, got {args.holdout}")
    if args.command == "inspect":
        if min(args.seq_len) < 1:
            raise UserError(f"--seq-len: must be at least 1, got {min(args.seq_len)}")
        check_plot(args.plot)


def _splits(data: Path) -> list[Path]:
    splits = [data / name for name in ("train", "valid") if (data / name).is_dir()]
    if not splits:
        raise UserError(f"{data}: must contain train/ or valid/ (write a data set with encode)")
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
