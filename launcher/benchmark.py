"""Measure on this machine: `launcher/benchmark.py attention --lengths 32768,131072 --folds 1024`.

`attention` times tensorized attention against full attention and a window on one GPU.
"""

import argparse
import json
from pathlib import Path

from tensorlm.errors import UserError, run_launcher


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_attention(commands.add_parser("attention", help="the operator against full attention"))
    args = parser.parse_args()
    return int(args.run(args))


def add_attention(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", default="4096,8192,16384,32768,65536,131072")
    parser.add_argument("--folds", default="1024", help="inner axes, e.g. 1024;512;32x32;full")
    parser.add_argument(
        "--full-limit", type=int, default=131072, help="longest full attention to time (0: any)"
    )
    parser.add_argument("--documents", type=int, metavar="MEAN", help="packed documents")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="plot time against length")
    parser.set_defaults(run=attention)


def attention(args: argparse.Namespace) -> int:
    try:
        lengths = [int(part) for part in args.lengths.split(",")]
        folds = [_fold(part) for part in args.folds.split(";")]
    except ValueError as reason:
        raise UserError(
            f"--lengths, --folds: {reason} (like 32768,131072 and 1024;32x32)"
        ) from None

    import torch

    if not torch.cuda.is_available():
        raise UserError("benchmark attention: needs a CUDA device")
    import triton

    from tensorlm.benchmarks import attention as bench

    ceilings = bench.measure_ceilings()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; "
        f"{ceilings.flops / 1e12:.0f} TFLOP/s, {ceilings.bandwidth / 1e9:.0f} GB/s measured\n",
        flush=True,
    )
    rows = []
    for length in lengths:
        documents = bench.random_documents(length, args.documents) if args.documents else None
        measured = bench.measure(length, folds, documents, args.full_limit)
        rows += measured
        print(bench.format_table(measured, ceilings) + "\n", flush=True)
        if args.json:  # after each length: what was measured outlives an interruption
            args.json.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
        if args.plot:
            bench.plot(rows, str(args.plot))
    return 0


def _fold(text: str) -> list[int]:
    return [] if text == "full" else [int(n) for n in text.split("x")]


if __name__ == "__main__":
    run_launcher(main)
