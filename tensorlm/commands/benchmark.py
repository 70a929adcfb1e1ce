"""Measure speed and memory on this machine, such as `python launcher/benchmark.py attention`.

Example for sp, on the 4 GPUs of one machine:
  torchrun --nproc_per_node 4 launcher/benchmark.py sp --config C parallel.sp=4 data.seq_len=65536
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from tensorlm.plan.exchange import Machine
from tensorlm.runtime.arguments import JSON, LOCAL_RANK, Command, Option, Settings, parse_command
from tensorlm.runtime.exit import run_launcher

from . import benchmark_runs


def main() -> int:
    args = parse_command(__doc__, COMMANDS, repeats_help=True)
    measure: Callable[[argparse.Namespace], int] = getattr(benchmark_runs, args.command)
    return measure(args)


_MACHINE = Machine()  # the machine of docs/sequence_parallelism.md
_REPEATS = "number of timed repeats"

COMMANDS = {
    "attention": Command(
        "time tensorized and routed attention against full attention and a window, on one GPU",
        {
            "--lengths LIST": Option(
                "lengths in tokens, separated by commas (default: 4096, doubled up to 131072)",
                "4096,8192,16384,32768,65536,131072",
            ),
            "--folds LIST": Option(
                "inner axes of tensorized attention, separated by semicolons, such as "
                "1024;512;32x32;full (default: 1024)",
                "1024",
            ),
            "--routes LIST": Option(
                "sizes of routed attention, TOP_K x BLOCK, separated by semicolons, such as "
                "16x64;32x64 (default: 16x64)",
                "16x64",
            ),
            "--stretch TOKENS": Option(
                "routed attention: tokens per rotary position beyond the window", 16
            ),
            "--union RATIO": Option(
                "routed attention: number of blocks that 16 neighboring tokens open, relative to "
                "one token's choice",
                2.3,
            ),
            "--full-limit TOKENS": Option(
                "longest length at which full attention is timed (default: 131072; 0: no limit)",
                131072,
            ),
            "--documents MEAN": Option(
                "use packed documents of this mean length in tokens (default: one document)"
            ),
            "--repeats N": Option(
                "number of timed repeats (full attention above 65,536 tokens: at most 3)", 10
            ),
            **JSON,
            "--plot FILE.png": Option("plot time against length into this file"),
        },
    ),
    "train": Command(
        "time a model's training passes, and compare with full attention and Hugging Face's Llama",
        {
            "--lengths LIST": Option(
                "lengths of the document in tokens, separated by commas", "32768,131072"
            ),
            "--methods LIST": Option(
                "methods to time, separated by commas: tensorized (the layers of the file), "
                "routed, strided, window (all layers of that kind), full, huggingface",
                "tensorized,full,huggingface",
            ),
            "--repeats N": Option(_REPEATS, 3),
            "--longest": Option(
                "also find the longest document that fits with each method", default=False
            ),
            **JSON,
            "--plot FILE.png": Option("plot speed and memory against length into this file"),
        },
        Settings("TOML file of the run, for its shape, fold, dtype and memory settings"),
    ),
    "decode": Command(
        "time generation after long prompts, and compare with Hugging Face's Llama",
        {
            "--lengths LIST": Option(
                "prompt lengths in tokens, separated by commas", "32768,131072"
            ),
            "--methods LIST": Option(
                "methods to time, separated by commas", "tensorlm,huggingface"
            ),
            "--new-tokens N": Option("number of generated tokens to time", 64),
            **JSON,
        },
        Settings("TOML file of the run, for its shape, layers and dtype"),
    ),
    "data": Command(
        "measure how fast one process prepares, plans and serves data, on any machine",
        {
            "--documents N": Option("number of documents to plan into rows", 10_000_000),
            "--tokenizer DIR": Option(
                "folder of the tokenizer (default: one trained for the benchmark)"
            ),
            "--max-bytes BYTES": Option("bytes of text to encode", 20_000_000),
        },
    ),
    "sp": Command(
        "time one layer whose rows are shared by the ranks of this job (under deepspeed, torchrun "
        "or srun), and project the time to 2 ... 1,024 GPUs",
        {
            "--repeats N": Option(_REPEATS, 10),
            **JSON,
            "--only-project": Option("print the projection without measuring", default=False),
            "--gpus-per-node N": Option("projection: GPUs per node", _MACHINE.gpus_per_node),
            "--nvlink GB/S": Option(
                "projection: bandwidth of a GPU inside a node in GB/s", _MACHINE.nvlink / 1e9
            ),
            "--network GB/S": Option(
                "projection: bandwidth of a GPU between nodes in GB/s", _MACHINE.network / 1e9
            ),
            "--latency US": Option(
                "projection: time per message in microseconds", _MACHINE.latency * 1e6
            ),
            "--tflops TFLOP/S": Option(
                "projection: compute rate of a GPU in TFLOP/s", _MACHINE.flops / 1e12
            ),
            "--overlap SHARE": Option(
                "projection: achieved fraction of the possible overlap of hop 1 with the swap of q "
                f"and k (0: none, 1: all; default: {_MACHINE.overlap:g})",
                _MACHINE.overlap,
            ),
            **LOCAL_RANK,
        },
        Settings(),
    ),
    "memory": Command(
        "compare the memory and time that launcher/plan.py predicts with those of real steps",
        {
            "--points FILE": Option(
                "TOML file with [[points]] to measure (default: built-in points for this machine)"
            ),
            **JSON,
            "--seconds SECONDS": Option("time limit in seconds for all points together", 570.0),
            "--each SECONDS": Option("time limit in seconds for one point", 180.0),
            "--one": Option(argparse.SUPPRESS),  # a point, in its own process
            "--answer FILE": Option(argparse.SUPPRESS),
        },
    ),
    "node": Command(
        "train, start, and evaluate Llama-8B on all GPUs of this host, within a time limit",
        {
            "--parts LIST": Option(
                "what to measure, in this order, separated by commas",
                "train,starters,longest,evaluation",
            ),
            "--folder DIR": Option(
                "folder for data and runs; another call uses its data again", Path("runs/node")
            ),
            "--limit SECONDS": Option(
                "time limit in seconds; what has been measured by then is reported", 570.0
            ),
            "--ranks N": Option("number of GPUs to use (0: all)", 0),
            "--host-memory GIB": Option("host memory in GiB (0: what the system reports)", 0.0),
            "--tiny": Option("use a tiny model and short rows, to try the command", default=False),
            **JSON,
        },
    ),
    "adaptation": Command(
        "compare the cost and quality of adapted models (make adapt)",
        {
            "runs RUN": Option(
                "folders of the runs; each contains reports of launcher/evaluate.py in code/, "
                "books/ and needles/; runs NAME, NAME-1, ... are seeds of one variant",
                nargs="+",
            )
        },
    ),
    "conversion": Command(
        "import and export a model of a given shape, and report the peak memory of both",
        {
            "--config FILE": Option(
                "TOML file of the run, for the shape of the model", required=True
            ),
            "--folder DIR": Option(
                "new folder for temporary files, 6 bytes per parameter; removed at the end",
                required=True,
            ),
        },
    ),
}


def run() -> None:
    """Run this command with the arguments of the process, and end the process."""
    run_launcher(main, leave_at_once=True)
