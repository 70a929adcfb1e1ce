"""Time of tensorized and routed attention, full attention and a window, on one GPU.

All methods get the same q, k, v (Llama-8B: 32 query heads, 8 key heads, size 128, batch 1, bf16,
causal, one document). Tensorized and routed attention include rotation; the others get rotated
inputs, so the ratios favor them. For routes, queries of neighboring tokens agree on blocks as in
a trained model (`routed_inputs`).
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_methods import HEAD_DIM, HEADS, KEY_HEADS, methods
from .routed_inputs import MEASURED_UNION, Route, agreeing_queries, union_of_neighbors


class Measurement(NamedTuple):
    """Medians in milliseconds, FLOPs and bytes of one method; NaN if not measured or not available.

    FLOPs count each visited (query, key) pair. Bytes count each tensor once per hop (inputs read
    once, outputs written once).
    """

    method: str
    length: int
    forward_ms: float
    both_ms: float
    peak_gib: float
    forward_flops: float
    forward_bytes: float


class Ceilings(NamedTuple):
    """Rates that this GPU reaches: FLOP/s of a large bf16 product, bytes/s of a large copy."""

    flops: float
    bandwidth: float


def median_ms(function: Callable[[], object], repeats: int) -> float:
    """Median time of `function` on the device, measured by events, after two warm-up calls.

    The host waits only at the end, as in training. It runs ahead, so the time to launch kernels is
    hidden.
    """
    for _ in range(2):
        function()
    marks = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks)


def measure_ceilings() -> Ceilings:
    """Measure an 8192^3 bf16 product and a copy of 1 GiB (read and written)."""
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = median_ms(lambda: x @ y, 10)
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copy = median_ms(lambda: target.copy_(source), 10)
    return Ceilings(2 * 8192**3 / product * 1e3, 2 * source.nbytes / copy * 1e3)


@contextmanager
def _peak_memory() -> Iterator[list[float]]:
    """Context that appends to a list the peak GiB allocated in its body, beyond earlier memory."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result: list[float] = []
    yield result
    torch.cuda.synchronize()
    result.append((torch.cuda.max_memory_allocated() - before) / 2**30)


def measure(
    length: int,
    folds: Sequence[list[int]],
    routes: Sequence[Route],
    doc_start: Tensor | None = None,
    full_limit: int = 0,
    union: float = MEASURED_UNION,
    repeats: int = 10,
) -> list[Measurement]:
    """Measure every method at one length.

    Args:
        length: number of tokens T.
        folds: folds of tensorized attention.
        routes: settings of routed attention.
        doc_start: [1, T] document starts for tensorized and routed attention (None: one document).
        full_limit: longest length at which full attention is measured, NaN beyond (0: no limit).
        union: number of blocks that 16 neighboring tokens open, relative to one token's choice.
        repeats: number of timed repeats; full attention above 65,536 tokens has at most 3.
    """
    q, k, v = (
        torch.randn(1, length, h, HEAD_DIM, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for h in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    if routes and length > 2 * routes[0].window:
        agreeing = agreeing_queries(k.detach(), HEADS, routes[0], union)
        q = agreeing.requires_grad_()
        reached = [f"{union_of_neighbors(q.detach(), k.detach(), r):.2f}" for r in routes]
        print(f"{length} tokens, union of 16 neighbors for each route: {', '.join(reached)}")
    cotangent = torch.randn_like(q)
    rows = []
    for name, run, (flops, moved) in methods(length, folds, routes, doc_start):
        forward_ms = both_ms = peak = math.nan
        is_full = name == "tensor []" or name.startswith(("SDPA", "flash-attn"))
        if not (is_full and full_limit and length > full_limit):
            timed = min(3, repeats) if is_full and length > 65536 else repeats

            def both(run: Callable[..., Tensor] = run) -> None:
                torch.autograd.grad(run(q, k, v), (q, k, v), cotangent)

            try:
                with torch.no_grad():
                    forward_ms = median_ms(lambda run=run: run(q, k, v), timed)  # type: ignore[misc]
                with _peak_memory() as peaks:
                    both()
                peak = peaks[0]
                both_ms = median_ms(both, timed)
            except (RuntimeError, torch.OutOfMemoryError) as reason:
                print(f"{name} at {length}: {str(reason).splitlines()[0]}", flush=True)
        rows.append(Measurement(name, length, forward_ms, both_ms, peak, flops, moved))
        torch.cuda.empty_cache()
    return rows


def random_documents(length: int, mean: int, seed: int = 0) -> Tensor:
    """[1, length] int32 document starts; lengths are exponentially distributed with this mean."""
    generator = torch.Generator().manual_seed(seed)
    starts, position = torch.zeros(1, length, dtype=torch.int32), 0
    while position < length:
        starts[:, position:] = position
        draw = torch.empty(1).exponential_(1 / mean, generator=generator)
        position += max(1, int(draw))
    return starts.cuda()


def format_table(rows: Sequence[Measurement], ceilings: Ceilings) -> str:
    """A Markdown table with rates, shares of the roofline, and ratios to full attention."""
    lines = [
        "| tokens | method | fwd ms | fwd+bwd ms | fwd TFLOP/s | fwd GB/s | fwd roofline | "
        "fwd vs flash | fwd vs cuDNN | fwd+bwd vs flash | fwd+bwd vs cuDNN | extra GiB |",
        "|---" * 12 + "|",
    ]
    reference = {(r.method, r.length): r for r in rows}
    nothing = Measurement("", 0, math.nan, math.nan, math.nan, math.nan, math.nan)
    for r in rows:
        flash = reference.get(("SDPA flash", r.length), nothing)
        cudnn = reference.get(("SDPA cuDNN", r.length), nothing)
        seconds = r.forward_ms / 1e3
        floor = max(r.forward_flops / ceilings.flops, r.forward_bytes / ceilings.bandwidth)
        lines.append(
            f"| {r.length} | {r.method} | {r.forward_ms:.2f} | {r.both_ms:.2f} "
            f"| {r.forward_flops / seconds / 1e12:.0f} | {r.forward_bytes / seconds / 1e9:.0f} "
            f"| {floor / seconds:.0%} | {flash.forward_ms / r.forward_ms:.1f} "
            f"| {cudnn.forward_ms / r.forward_ms:.1f} | {flash.both_ms / r.both_ms:.1f} "
            f"| {cudnn.both_ms / r.both_ms:.1f} | {r.peak_gib:.2f} |"
        )
    return "\n".join(lines)


def plot(rows: Sequence[Measurement], path: str) -> None:
    """Plot time against length, one line per method, with logarithmic axes (PNG)."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for axes, title in zip(panels, ("forward", "forward and backward"), strict=True):
        for name in dict.fromkeys(r.method for r in rows):
            measured = sorted((r for r in rows if r.method == name), key=lambda r: r.length)
            times = [r.forward_ms if title == "forward" else r.both_ms for r in measured]
            axes.plot([r.length for r in measured], times, marker="o", label=name)
        axes.set(yscale="log", xlabel="tokens", title=title)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:g}k")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("milliseconds")
    panels[0].legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
