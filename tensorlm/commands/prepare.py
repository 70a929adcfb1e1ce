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
from tensorlm.runtime.arguments import check_plot
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
        help="files to read: text (one document each), .json, .jsonl, .ndjson (all of these also "
        "as .gz or .zst), .parquet, .arrow or .feather; or hf:NAME[:SUBSET[:SPLIT]] for a data set "
        "of the Hugging Face Hub or a local folder of `datasets`",
    )
    source.add_argument(
        "--exclude", nargs="*", default=[], metavar="GLOB",
        help="files of --input to skip (default: none)",
    )  # fmt: skip
    source.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="field that holds the text (default: text); meta.text is the field text inside meta",
    )
    source.add_argument(
        "--max-bytes", type=int, default=0, metavar="BYTES",
        help="stop after this many bytes of input (default: 0, which reads all)",
    )  # fmt: skip
    source.add_argument(
        "--max-document-bytes",
        type=int,
        default=LONGEST_DOCUMENT,
        metavar="BYTES",
        help="maximum size of a document, or of a record of a JSON file, after decompression; a "
        f"larger one ends the command with an error (default: {LONGEST_DOCUMENT:,})",
    )

    tokenizer = commands.add_parser(
        "tokenizer", parents=[source], help="train a sentencepiece BPE tokenizer"
    )
    tokenizer.add_argument(
        "--vocab-size",
        type=int,
        required=True,
        metavar="N",
        help="number of pieces in the vocabulary",
    )
    tokenizer.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder to write; must not contain a tokenizer",
    )

    shards = commands.add_parser(
        "encode", parents=[source], help="encode documents into token shards"
    )
    shards.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="PATH",
        help="tokenizer: a Hugging Face folder or a sentencepiece BPE .model file",
    )
    shards.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the data set to write; an interrupted call continues there",
    )
    shards.add_argument(
        "--holdout",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of the documents to hold out in the split valid/ (0: none; default: 0.01)",
    )
    shards.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="number of processes (default: 0, which means one per core, or one per MPI rank)",
    )
    shards.add_argument(
        "--shard-bytes",
        type=int,
        default=SHARD_BYTES,
        metavar="BYTES",
        help=f"approximate bytes of input per shard (default: {SHARD_BYTES:,}; more for many "
        "terabytes)",
    )

    packages = commands.add_parser(
        "packages", help="write the source of installed Python packages as long documents"
    )
    packages.add_argument(
        "--text",
        nargs="*",
        default=[],
        metavar="GLOB",
        help="write these text files (also .gz, .zst) as books instead of the packages",
    )
    packages.add_argument(
        "--hold-out", nargs="+", required=True, metavar="NAME",
        help="packages or books (file name without extensions) to write to held_out.jsonl",
    )  # fmt: skip
    packages.add_argument(
        "--output", type=Path, required=True, metavar="DIR",
        help="folder for train.jsonl (with some passages repeated) and held_out.jsonl",
    )  # fmt: skip

    verify = commands.add_parser("verify", help="check every byte of a data set and its tokenizer")
    verify.add_argument("data", type=Path, metavar="DATA", help="folder of the data set")

    inspect = commands.add_parser(
        "inspect", help="show counts, document lengths and samples of a data set"
    )
    inspect.add_argument("data", type=Path, metavar="DATA", help="folder of the data set")
    inspect.add_argument(
        "--samples",
        type=int,
        default=3,
        metavar="N",
        help="number of documents to show (default: 3; 0: none)",
    )
    inspect.add_argument(
        "--seq-len",
        type=int,
        nargs="+",
        default=[8192, 32768, 131072],
        metavar="TOKENS",
        help="row lengths for which to show how full packed rows are (default: 8192 32768 131072)",
    )
    inspect.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="plot document lengths into this file"
    )
    args = parser.parse_args()

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
