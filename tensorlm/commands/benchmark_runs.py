"""What each sub-command of `launcher/benchmark.py` does with its arguments.

Benchmarks that take minutes write their results after each measurement, so that an interruption
loses nothing.
"""

import argparse
import json
import os

from tensorlm.config import load_config
from tensorlm.plan.exchange import Machine
from tensorlm.runtime.arguments import check_plot, check_positive, parse_lengths, write_json
from tensorlm.runtime.errors import UserError
from tensorlm.runtime.launch_env import grow_memory_segments, read_launch_env


def attention(args: argparse.Namespace) -> int:
    check_plot(args.plot)
    check_positive(args, "repeats")
    lengths = parse_lengths(args.lengths)
    folds = _products("folds", args.folds, "1024;32x32;full")
    sizes = _products("routes", args.routes, "16x64;32x64", factors=2)

    import torch

    from tensorlm.benchmarks.routed_inputs import NEIGHBORS, Route

    if not 1 <= args.union <= NEIGHBORS:
        raise UserError(f"--union: must be from 1 to {NEIGHBORS}, got {args.union:g}")
    if not torch.cuda.is_available():
        raise UserError("benchmark attention: needs a CUDA device")
    import triton

    from tensorlm.benchmarks import attention as bench
    from tensorlm.benchmarks.attention_methods import WINDOW

    routes = [Route(WINDOW, block, top_k, args.stretch) for top_k, block in sizes]
    ceilings = bench.measure_ceilings()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; "
        f"{ceilings.flops / 1e12:.0f} TFLOP/s, {ceilings.bandwidth / 1e9:.0f} GB/s measured\n",
        flush=True,
    )
    rows = []
    for length in lengths:
        documents = bench.random_documents(length, args.documents) if args.documents else None
        measured = bench.measure(
            length, folds, routes, documents, args.full_limit, args.union, args.repeats
        )
        rows += measured
        print(bench.format_table(measured, ceilings) + "\n", flush=True)
        write_json(args.json, [row._asdict() for row in rows])
        if args.plot:
            bench.plot(rows, str(args.plot))
    return 0


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

    methods = _choices("--methods", args.methods, METHODS)
    try:
        for method in methods:
            shape_of(config.model, method)
    except ValueError as error:
        raise UserError(f"--methods: {error}") from None
    rows: list[bench.TrainMeasurement] = []
    found: dict[str, int] = {}

    def save() -> None:
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


def decode(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    lengths = parse_lengths(args.lengths)
    check_positive(args, "new_tokens")

    from tensorlm.benchmarks import decode as bench

    methods = _choices("--methods", args.methods, bench.METHODS)
    rows: list[bench.DecodeMeasurement] = []
    for row in bench.measure(config, lengths, methods, args.new_tokens):
        rows.append(row)
        write_json(args.json, [row._asdict() for row in rows])
    print(bench.format_table(rows), flush=True)
    return 0


def data(args: argparse.Namespace) -> int:
    check_positive(args, "documents", "max_bytes")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core
    from tensorlm.benchmarks import data as bench

    for line in bench.measure_planning(args.documents):
        print(line, flush=True)
    for line in bench.measure_data(args.tokenizer, args.max_bytes):
        print(line, flush=True)
    return 0


def sp(args: argparse.Namespace) -> int:
    config, launch = load_config(args.config, args.overrides), read_launch_env()
    check_positive(args, "repeats", "gpus_per_node", "nvlink", "network", "latency", "tflops")
    if not 0 <= args.overlap <= 1:
        raise UserError(f"--overlap: must be from 0 to 1, got {args.overlap:g}")
    if not args.only_project:
        config.check_ranks(launch.world_size)

    from tensorlm.benchmarks import sp as bench
    from tensorlm.plan.exchange import format_projection, project_all

    machine = Machine(
        args.gpus_per_node, args.nvlink * 1e9, args.network * 1e9, args.latency * 1e-6,
        args.tflops * 1e12, args.overlap,
    )  # fmt: skip
    cost = None if args.only_project else bench.measure(config, launch, args.repeats)
    if launch.rank == 0:
        projections = project_all(config, machine)
        if cost:
            print(bench.format_cost(cost, config), end="\n\n")
        print(format_projection(projections, config, machine))
        projected = [projection._asdict() for projection in projections]
        write_json(args.json, {"measured": cost and cost._asdict(), "projected": projected})
    return 0


def memory(args: argparse.Namespace) -> int:
    from tensorlm.benchmarks import memory_points as bench

    if args.one:
        from tensorlm.benchmarks.memory import measure

        point = bench.Point.model_validate_json(args.one)
        measurement = measure(bench.point_config(point), read_launch_env(), point.steps)
        args.answer.write_text(json.dumps(measurement._asdict()))
        return 0
    check_positive(args, "seconds", "each")
    if args.points is None:
        import torch

        points = bench.default_points(torch.cuda.is_available())
    else:
        points = bench.read_points(args.points)
    outcomes = []
    print(bench.TABLE_HEAD, flush=True)
    for outcome in bench.measure_points(points, args.seconds, args.each):
        outcomes.append(outcome._asdict())
        print(bench.format_outcome(outcome), flush=True)
        write_json(args.json, outcomes)
    return 0


def node(args: argparse.Namespace) -> int:
    check_positive(args, "limit")
    import psutil
    import torch

    from tensorlm.benchmarks.node import run as bench
    from tensorlm.benchmarks.node.host import Host

    parts = _choices("--parts", args.parts, tuple(bench.PARTS))
    ranks = args.ranks or max(1, torch.cuda.device_count())
    memory = args.host_memory * 2**30 or psutil.virtual_memory().total
    bench.measure(
        Host(args.folder.resolve(), ranks, args.limit, memory, args.tiny), parts, args.json
    )
    return 0


def adaptation(args: argparse.Namespace) -> int:
    from tensorlm.benchmarks import adaptation as bench

    variants = bench.read_variants(args.runs)
    print(bench.format_table(variants), bench.explain_table(variants), sep="\n\n")
    return 0


def conversion(args: argparse.Namespace) -> int:
    from tensorlm.benchmarks import conversion as bench

    print(bench.format_table(bench.measure(args.config, load_config(args.config), args.folder)))
    return 0


def _choices(option: str, text: str, allowed: tuple[str, ...]) -> list[str]:
    choices = text.split(",")
    if unknown := [choice for choice in choices if choice not in allowed]:
        raise UserError(f"{option}: must be one of {', '.join(allowed)}, got {unknown[0]}")
    return choices


def _products(name: str, text: str, example: str, factors: int | None = None) -> list[list[int]]:
    """The numbers of each `AxB` in a list separated by semicolons; [] for `full`."""
    parts = [part.replace("full", "") for part in text.split(";") if part]
    found = [part.split("x") if part else [] for part in parts]
    numbers = [n for product in found for n in product]
    has_other = factors is not None and any(len(product) != factors for product in found)
    if has_other or not all(n.isdecimal() for n in numbers):
        raise UserError(f"--{name}: must be like {example}, got {text}")
    return [[int(n) for n in product] for product in found]
