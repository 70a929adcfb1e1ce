"""Prepare data: train a tokenizer, encode documents into shards, verify them.

launcher/prepare_data.py tokenizer --input 'texts/**/*.txt' --vocab-size 4096 --output TOKENIZER
launcher/prepare_data.py encode --input 'corpus/*.parquet' --tokenizer TOKENIZER --output DATA
launcher/prepare_data.py verify DATA
"""

import argparse
from pathlib import Path

from tensorlm.data.prepare import encode, find_files, read_documents
from tensorlm.data.shards import open_shards, verify_shards
from tensorlm.data.tokenizers import train_tokenizer
from tensorlm.errors import UserError, run_launcher


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
        help="text files (one document each), .jsonl[.gz|.zst], .parquet, .arrow",
    )
    source.add_argument("--exclude", nargs="*", default=[], metavar="GLOB", help="files to skip")
    source.add_argument("--text-field", default="text", help="field that holds the text")
    source.add_argument("--max-bytes", type=int, default=0, help="stop after this much text")

    tokenizer = commands.add_parser("tokenizer", parents=[source], help="train a sentencepiece BPE")
    tokenizer.add_argument("--vocab-size", type=int, required=True)
    tokenizer.add_argument("--output", type=Path, required=True, help="folder to write")

    shards = commands.add_parser("encode", parents=[source], help="encode documents into shards")
    shards.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        help="Hugging Face folder, or one with a sentencepiece tokenizer.model",
    )
    shards.add_argument("--output", type=Path, required=True, help="folder of the data set")
    shards.add_argument(
        "--holdout",
        type=float,
        default=0.01,
        help="share of the documents kept for evaluation (default 0.01)",
    )
    shards.add_argument("--shard-tokens", type=int, default=1 << 28, help="tokens in one shard")

    verify = commands.add_parser("verify", help="check every byte of a data set")
    verify.add_argument("data", type=Path)
    args = parser.parse_args()

    if args.command == "tokenizer":
        files = find_files(args.input, args.exclude)
        texts = read_documents(files, args.text_field, args.max_bytes)
        train_tokenizer(texts, args.vocab_size, args.output)
        print(f"{args.output}: sentencepiece tokenizer, {args.vocab_size:,} pieces")
    elif args.command == "encode":
        summary = encode(
            find_files(args.input, args.exclude), args.tokenizer, args.output,
            text_field=args.text_field, max_bytes=args.max_bytes,
            shard_tokens=args.shard_tokens, holdout=args.holdout,
        )  # fmt: skip
        print(summary)
    else:
        for split in ("train", "valid"):
            if not any((args.data / split).glob("shard-*.json")):
                continue
            bad = verify_shards(args.data / split)
            if bad:
                raise UserError(*(f"{args.data / split / name}: checksum differs" for name in bad))
            print(f"{args.data / split}: {len(open_shards(args.data / split))} shards are whole")
    return 0


if __name__ == "__main__":
    run_launcher(main)
