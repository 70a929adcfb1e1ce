"""Measure speed and memory on this machine, such as `python launcher/benchmark.py attention`.

attention   times tensorized and routed attention against full attention and a window, on one GPU
train       times forward and backward of a model against full attention and Hugging Face's Llama
decode      times generation after long prompts, and compares it with Hugging Face's Llama
data        times preparing, planning and serving data, with one process on any machine
sp          times one layer whose rows are shared by the ranks of this job (under deepspeed,
            torchrun or srun), and projects the time to 8 ... 1,024 GPUs
memory      compares the memory and time that launcher/plan.py predicts with those of real steps
adaptation  compares the cost and quality of adapted models (make adapt)
conversion  imports and exports a model of a given shape, and reports the peak memory of both

Example for sp, on the 4 GPUs of one machine:
  torchrun --nproc_per_node 4 launcher/benchmark.py sp --config C parallel.sp=4 data.seq_len=65536
"""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

from tensorlm.config import load_config
from tensorlm.runtime.arguments import (
    add_json,
    add_settings,
    check_plot,
    check_positive,
    parse_arguments,
    parse_lengths,
    write_json,
)
from tensorlm.runtime.errors import UserError
from tensorlm.runtime.exit import run_launcher
from tensorlm.runtime.launch_env import grow_memory_segments, read_launch_env


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_attention(
        commands.add_parser("attention", help="time the attention operators against full attention")
    )
    add_train(
        commands.add_parser("train", help="time a model against full attention and Hugging Face")
    )
    add_decode(commands.add_parser("decode", help="time generated tokens after long prompts"))
    add_sp(commands.add_parser("sp", help="time one layer whose rows are shared by ranks"))
    add_conversion(
        commands.add_parser("conversion", help="measure the peak memory of import and export")
    )
    add_memory(
        commands.add_parser("memory", help="compare a plan's predictions with real training steps")
    )
    add_adaptation(
        commands.add_parser("adaptation", help="compare the cost and quality of adapted models")
    )
    add_data(commands.add_parser("data", help="time preparing, planning and serving data"))
    args = parse_arguments(parser)
    return int(args.run(args))


def add_attention(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lengths",
        default="4096,8192,16384,32768,65536,131072",
        metavar="LIST",
        help="lengths in tokens, separated by commas (default: 4096, doubled up to 131072)",
    )
    parser.add_argument(
        "--folds",
        default="1024",
        metavar="LIST",
        help="inner axes of tensorized attention, separated by semicolons, such as "
        "1024;512;32x32;full (default: 1024)",
    )
    parser.add_argument(
        "--routes",
        default="16x64",
        metavar="LIST",
        help="sizes of routed attention, TOP_K x BLOCK, separated by semicolons, such as "
        "16x64;32x64 (default: 16x64)",
    )
    parser.add_argument(
        "--stretch",
        type=int,
        default=16,
        help="routed attention: tokens per rotary position beyond the window (default: 16)",
    )
    parser.add_argument(
        "--full-limit",
        type=int,
        default=131072,
        metavar="TOKENS",
        help="longest length at which full attention is timed (default: 131072; 0: no limit)",
    )
    parser.add_argument(
        "--documents",
        type=int,
        metavar="MEAN",
        help="use packed documents of this mean length in tokens (default: one document)",
    )
    add_json(parser)
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="plot time against length into this file"
    )
    parser.set_defaults(run=attention)


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--documents",
        type=int,
        default=10_000_000,
        metavar="N",
        help="number of documents to plan into rows (default: 10,000,000)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="folder of the tokenizer (default: one trained for the benchmark)",
    )
    parser.add_argument(
        "--max-bytes",
        type=int,
        default=20_000_000,
        metavar="BYTES",
        help="bytes of text to encode (default: 20,000,000)",
    )
    parser.set_defaults(run=data)


def data(args: argparse.Namespace) -> int:
    check_positive(args, "documents", "max_bytes")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core
    from tensorlm.benchmarks import data as bench

    for line in bench.measure_planning(args.documents):
        print(line, flush=True)
    for line in bench.measure_data(args.tokenizer, args.max_bytes):
        print(line, flush=True)
    return 0


def attention(args: argparse.Namespace) -> int:
    check_plot(args.plot)
    try:
        lengths = [int(part) for part in args.lengths.split(",")]
        folds = [_fold(part) for part in args.folds.split(";") if part]
        sizes = [_fold(part) for part in args.routes.split(";") if part]
        if any(len(size) != 2 for size in sizes):
            raise ValueError("a route must be TOP_KxBLOCK")
    except ValueError as reason:
        raise UserError(
            "--lengths, --folds, --routes: must be like 32768,131072 and 1024;32x32 and 16x64, got "
            f"{args.lengths} and {args.folds} and {args.routes} ({reason})"
        ) from None

    import torch

    if not torch.cuda.is_available():
        raise UserError("benchmark attention: needs a CUDA device")
    import triton

    from tensorlm.benchmarks import attention as bench
    from tensorlm.benchmarks.routed_inputs import Route

    routes = [Route(bench.WINDOW, block, top_k, args.stretch) for top_k, block in sizes]
    ceilings = bench.measure_ceilings()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; "
        f"{ceilings.flops / 1e12:.0f} TFLOP/s, {ceilings.bandwidth / 1e9:.0f} GB/s measured\n",
        flush=True,
    )
    rows = []
    for length in lengths:
        documents = bench.random_documents(length, args.documents) if args.documents else None
        measured = bench.measure(length, folds, routes, documents, args.full_limit)
        rows += measured
        print(bench.format_table(measured, ceilings) + "\n", flush=True)
        # after each length, so that an interruption loses nothing
        write_json(args.json, [row._asdict() for row in rows])
        if args.plot:
            bench.plot(rows, str(args.plot))
    return 0


def add_sp(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument(
        "--repeats", type=int, default=10, metavar="N", help="number of timed repeats (default: 10)"
    )
    add_json(parser)
    parser.add_argument(
        "--only-project", action="store_true", help="print the projection without measuring"
    )
    from tensorlm.plan.exchange import Machine

    machine = Machine()  # the machine of docs/sequence_parallelism.md
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        metavar="N",
        help=f"projection: GPUs per node (default: {machine.gpus_per_node})",
    )
    parser.add_argument(
        "--nvlink",
        type=float,
        metavar="GB/S",
        help=f"projection: bandwidth of a GPU inside a node in GB/s "
        f"(default: {machine.nvlink / 1e9:g})",
    )
    parser.add_argument(
        "--network",
        type=float,
        metavar="GB/S",
        help=f"projection: bandwidth of a GPU between nodes in GB/s "
        f"(default: {machine.network / 1e9:g})",
    )
    parser.add_argument(
        "--latency",
        type=float,
        metavar="US",
        help=f"projection: time per message in microseconds (default: {machine.latency / 1e-6:g})",
    )
    parser.add_argument(
        "--tflops",
        type=float,
        metavar="TFLOP/S",
        help=f"projection: compute rate of a GPU in TFLOP/s (default: {machine.flops / 1e12:g})",
    )
    parser.add_argument(
        "--overlap",
        type=float,
        metavar="SHARE",
        help="projection: achieved fraction of the possible overlap of hop 1 with the swap of q "
        f"and k (0: none, 1: all; default: {machine.overlap:g})",
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.set_defaults(run=sp)


def sp(args: argparse.Namespace) -> int:
    config, launch = load_config(args.config, args.overrides), read_launch_env()
    check_positive(args, "repeats", "gpus_per_node", "nvlink", "network", "latency", "tflops")
    if args.overlap is not None and not 0 <= args.overlap <= 1:
        raise UserError(f"--overlap: must be from 0 to 1, got {args.overlap:g}")
    if not args.only_project:
        config.check_ranks(launch.world_size)

    from tensorlm.benchmarks import sp as bench
    from tensorlm.plan.exchange import Machine, format_projection, project_all

    stated = {
        "gpus_per_node": (args.gpus_per_node, 1), "nvlink": (args.nvlink, 1e9),
        "network": (args.network, 1e9), "latency": (args.latency, 1e-6),
        "flops": (args.tflops, 1e12), "overlap": (args.overlap, 1),
    }  # fmt: skip
    machine = Machine(**{name: x * unit for name, (x, unit) in stated.items() if x is not None})
    cost = None if args.only_project else bench.measure(config, launch, args.repeats)
    if launch.rank == 0:
        projections = project_all(config, machine)
        if cost:
            print(bench.format_cost(cost, config), end="\n\n")
        print(format_projection(projections, config, machine))
        projected = [projection._asdict() for projection in projections]
        write_json(args.json, {"measured": cost and asdict(cost), "projected": projected})
    return 0


def add_train(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, "TOML file of the run, for its shape, fold, dtype and memory settings")
    parser.add_argument(
        "--lengths",
        default="32768,131072",
        metavar="LIST",
        help="lengths of the document in tokens, separated by commas (default: 32768,131072)",
    )
    parser.add_argument(
        "--methods",
        default="tensorized,full,huggingface",
        metavar="LIST",
        help="methods to time, separated by commas: tensorized (the layers of the file), routed, "
        "strided, window (all layers of that kind), full, huggingface "
        "(default: tensorized,full,huggingface)",
    )
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="number of timed repeats (default: 3)"
    )
    parser.add_argument(
        "--longest",
        action="store_true",
        help="also find the longest document that fits with each method",
    )
    add_json(parser)
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="plot speed and memory against length into this file",
    )
    parser.set_defaults(run=train)


def train(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    lengths = parse_lengths(args.lengths)
    check_positive(args, "repeats")
    check_plot(args.plot)

    import torch

    if args.longest and not torch.cuda.is_available():
        raise UserError("--longest: needs a CUDA device")
    from tensorlm.benchmarks import train as bench
    from tensorlm.benchmarks.train_methods import METHODS, shape_of

    methods = args.methods.split(",")
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise UserError(f"--methods: must be one of {', '.join(METHODS)}, got {unknown[0]}")
    try:
        for method in methods:
            shape_of(config.model, method)
    except ValueError as error:
        raise UserError(f"--methods: {error}") from None
    rows: list[bench.TrainMeasurement] = []
    found: dict[str, int] = {}

    def save() -> None:  # after each measurement, so that an interruption loses nothing
        write_json(args.json, {"rows": [row._asdict() for row in rows], "longest": found})
        if args.plot:
            bench.plot(rows, str(args.plot))

    grow_memory_segments()
    for row in bench.measure(config, lengths, methods, args.repeats):
        rows.append(row)
        save()
    print(bench.format_table(rows), flush=True)
    for method in methods if args.longest else ():
        found[method] = bench.measure_longest(config, method)
        print(f"longest document that fits, {method}: {found[method]:,} tokens", flush=True)
        save()
    return 0


def add_decode(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, "TOML file of the run, for its shape, layers and dtype")
    parser.add_argument(
        "--lengths",
        default="32768,131072",
        metavar="LIST",
        help="prompt lengths in tokens, separated by commas (default: 32768,131072)",
    )
    parser.add_argument(
        "--methods",
        default="tensorlm,huggingface",
        metavar="LIST",
        help="methods to time, separated by commas (default: tensorlm,huggingface)",
    )
    parser.add_argument(
        "--new-tokens",
        type=int,
        default=64,
        metavar="N",
        help="number of generated tokens to time (default: 64)",
    )
    add_json(parser)
    parser.set_defaults(run=decode)


def decode(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    lengths = parse_lengths(args.lengths)
    check_positive(args, "new_tokens")

    from tensorlm.benchmarks import decode as bench

    methods = args.methods.split(",")
    unknown = [method for method in methods if method not in bench.METHODS]
    if unknown:
        allowed = ", ".join(bench.METHODS)
        raise UserError(f"--methods: must be one of {allowed}, got {unknown[0]}")
    rows: list[bench.DecodeMeasurement] = []
    for row in bench.measure(config, lengths, methods, args.new_tokens):
        rows.append(row)
        # after each measurement, so that an interruption loses nothing
        write_json(args.json, [row._asdict() for row in rows])
    print(bench.format_table(rows), flush=True)
    return 0


def add_adaptation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folders of the runs; each contains reports of launcher/evaluate.py in code/, books/ "
        "and needles/",
    )
    parser.set_defaults(run=adaptation)


def adaptation(args: argparse.Namespace) -> int:
    from tensorlm.benchmarks import adaptation as bench

    print(bench.format_table(bench.read_variants(args.runs)))
    return 0


def add_conversion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        required=True,
        help="TOML file of the run, for the shape of the model",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        required=True,
        metavar="DIR",
        help="new folder for temporary files, 6 bytes per parameter; removed at the end",
    )
    parser.set_defaults(run=conversion)


def conversion(args: argparse.Namespace) -> int:
    from tensorlm.benchmarks import conversion as bench

    print(bench.format_table(bench.measure(args.config, load_config(args.config), args.folder)))
    return 0


def add_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--points",
        default="default",
        metavar="FILE",
        help="TOML file with [[points]] to measure (default: built-in points for this machine)",
    )
    add_json(parser)
    parser.add_argument(
        "--seconds",
        type=float,
        default=570,
        help="time limit in seconds for all points together (default: 570)",
    )
    parser.add_argument(
        "--each",
        type=float,
        default=180,
        metavar="SECONDS",
        help="time limit in seconds for one point (default: 180)",
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a point, in its own process
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(run=memory)


def memory(args: argparse.Namespace) -> int:
    from tensorlm.benchmarks import memory_points as bench

    if args.one:
        from tensorlm.benchmarks.memory import measure

        point = bench.Point.model_validate_json(args.one)
        measurement = measure(bench.point_config(point), read_launch_env(), point.steps)
        args.answer.write_text(json.dumps(asdict(measurement)))
        return 0
    check_positive(args, "seconds", "each")
    if args.points == "default":
        import torch

        points = bench.default_points(torch.cuda.is_available())
    else:
        points = bench.read_points(Path(args.points))
    outcomes = []
    print(bench.TABLE_HEAD, flush=True)
    for outcome in bench.measure_points(points, args.seconds, args.each):
        outcomes.append(asdict(outcome))
        print(bench.format_outcome(outcome), flush=True)
        # after each point, so that an interruption loses nothing
        write_json(args.json, outcomes)
    return 0


def _fold(text: str) -> list[int]:
    return [] if text == "full" else [int(n) for n in text.split("x")]


def run() -> None:
    """Run this command with the arguments of the process, and end the process."""
    run_launcher(main, leave_at_once=True)
