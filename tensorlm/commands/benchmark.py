"""Measure speed and memory on this machine, such as `python launcher/benchmark.py attention`.

Example for sp, on the 4 GPUs of one machine:
  torchrun --nproc_per_node 4 launcher/benchmark.py sp --config C parallel.sp=4 data.seq_len=65536
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tensorlm.plan.exchange import Machine
from tensorlm.runtime.arguments import (
    JSON,
    LOCAL_RANK,
    Option,
    Options,
    Parser,
    add_options,
    add_settings,
    parse_args,
)
from tensorlm.runtime.exit import run_launcher

from . import benchmark_runs as runs


class Benchmark(NamedTuple):
    """A sub-command: its description, code and options; `config` describes `--config`, if any."""

    text: str
    run: Callable[[argparse.Namespace], int]
    options: Options
    config: str = ""


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, benchmark in BENCHMARKS.items():
        sentence = f"{benchmark.text[0].upper()}{benchmark.text[1:]}."
        command = commands.add_parser(name, help=benchmark.text, description=sentence)
        if benchmark.config:
            add_settings(command, benchmark.config)
        add_options(command, benchmark.options)
    args = parse_args(parser)
    return BENCHMARKS[args.command].run(args)


_MACHINE = Machine()  # the machine of docs/sequence_parallelism.md
_REPEATS = "number of timed repeats"

BENCHMARKS = {
    "attention": Benchmark(
        "time tensorized and routed attention against full attention and a window, on one GPU",
        runs.attention,
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
                "use packed documents of this mean length in tokens (default: one document)",
                type=int,
            ),
            **JSON,
            "--plot FILE.png": Option("plot time against length into this file", type=Path),
        },
    ),
    "train": Benchmark(
        "time forward and backward of a model against full attention and Hugging Face's Llama",
        runs.train,
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
            "--plot FILE.png": Option(
                "plot speed and memory against length into this file", type=Path
            ),
        },
        "TOML file of the run, for its shape, fold, dtype and memory settings",
    ),
    "decode": Benchmark(
        "time generated tokens after long prompts, and compare with Hugging Face's Llama",
        runs.decode,
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
        "TOML file of the run, for its shape, layers and dtype",
    ),
    "data": Benchmark(
        "time preparing, planning and serving data, with one process on any machine",
        runs.data,
        {
            "--documents N": Option("number of documents to plan into rows", 10_000_000),
            "--tokenizer DIR": Option(
                "folder of the tokenizer (default: one trained for the benchmark)", type=Path
            ),
            "--max-bytes BYTES": Option("bytes of text to encode", 20_000_000),
        },
    ),
    "sp": Benchmark(
        "time one layer whose rows are shared by the ranks of this job (under deepspeed, torchrun "
        "or srun), and project the time to 8 ... 1,024 GPUs",
        runs.sp,
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
        "TOML file of the run",
    ),
    "memory": Benchmark(
        "compare the memory and time that launcher/plan.py predicts with those of real steps",
        runs.memory,
        {
            "--points FILE": Option(
                "TOML file with [[points]] to measure (default: built-in points for this machine)",
                type=Path,
            ),
            **JSON,
            "--seconds SECONDS": Option("time limit in seconds for all points together", 570.0),
            "--each SECONDS": Option("time limit in seconds for one point", 180.0),
            "--one": Option(argparse.SUPPRESS),  # a point, in its own process
            "--answer": Option(argparse.SUPPRESS, type=Path),
        },
    ),
    "node": Benchmark(
        "train, start, and evaluate Llama-8B on all GPUs of this host, within a time limit",
        runs.node,
        {
            "--parts LIST": Option(
                "what to measure, in this order, separated by commas",
                "train,starters,longest,evaluation",
            ),
            "--folder DIR": Option(
                "folder for data and runs; another call uses its data again",
                Path("runs/node"),
                type=Path,
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
    "adaptation": Benchmark(
        "compare the cost and quality of adapted models (make adapt)",
        runs.adaptation,
        {
            "runs RUN": Option(
                "folders of the runs; each contains reports of launcher/evaluate.py in code/, "
                "books/ and needles/; runs NAME, NAME-1, ... are seeds of one variant",
                type=Path,
                nargs="+",
            )
        },
    ),
    "conversion": Benchmark(
        "import and export a model of a given shape, and report the peak memory of both",
        runs.conversion,
        {
            "--config FILE": Option(
                "TOML file of the run, for the shape of the model", type=Path, required=True
            ),
            "--folder DIR": Option(
                "new folder for temporary files, 6 bytes per parameter; removed at the end",
                type=Path,
                required=True,
            ),
        },
    ),
}


def run() -> None:
    """Run this command with the arguments of the process, and end the process."""
    run_launcher(main, leave_at_once=True)
