"""Time of tensorized and routed attention, full attention and a window, on one GPU.

All methods get the same q, k, v (Llama-8B: 32 query heads, 8 key heads, size 128, batch 1, bf16,
causal, one document). Tensorized and routed attention include rotation; the others get rotated
inputs, so the ratios favor them. For routes, queries of neighboring tokens agree on blocks as in
a trained model (`routed_inputs`).
"""

import importlib
import importlib.util
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tensor_attention import (
    Rotary,
    choose_blocks,
    fold_axes,
    rotary_frequencies,
    rotary_table,
    routed_attention,
    tensor_attention,
)
from tensor_attention.routing import num_parts

from .routed_inputs import Route, agreeing_queries

HEADS, KEY_HEADS, HEAD_DIM = 32, 8, 128
ROPE_THETA = 500000.0  # as in Llama 3
WINDOW = 1024
# At 1,048,576 tokens, FlexAttention's window kernel reads illegal addresses (torch 2.11, H200) and
# ends the process, and its mask of tiles would take tens of GiB.
FLEX_LIMIT = 1 << 19


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


def tensorized_cost(fold: Sequence[int], length: int) -> tuple[float, float]:
    """Forward FLOPs (4 D per visited pair and head) and minimum bytes of all hops."""
    flops = moved = 0.0
    token = 2 * HEAD_DIM * length
    for i, axis in enumerate(fold_axes(fold, length)):
        steps = -(-length // axis.stride)
        window = min(axis.length, steps)
        pairs = steps * window - window * (window - 1) / 2 - (steps if i else 0)
        pairs *= length / steps
        flops += 4 * HEAD_DIM * HEADS * pairs
        values = KEY_HEADS if i == 0 else HEADS
        moved += token * (HEADS + KEY_HEADS + values + HEADS)
    return flops, moved


def routed_cost(route: Route, length: int) -> tuple[float, float]:
    """Forward FLOPs (keys of each token's own choice, and its block scores) and minimum bytes."""
    flops = 4 * HEAD_DIM * HEADS * route.keys(length) * length
    scores = length * length / 2 * num_parts(route.block, route.pool) / route.block
    flops += 2 * HEAD_DIM * KEY_HEADS * scores
    return flops, 2 * HEAD_DIM * length * (5 * HEADS + 4 * KEY_HEADS)


def rotary_of(length: int) -> Rotary:
    """The rotary table of Llama 3 for `length` positions, on the GPU."""
    device = torch.device("cuda")
    return rotary_table(rotary_frequencies(HEAD_DIM, ROPE_THETA, None, device), length, device)


def methods(
    length: int, folds: Sequence[list[int]], routes: Sequence[Route], doc_start: Tensor | None
) -> Iterator[tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor], tuple[float, float]]]:
    """(name, function of q, k, v [1, T, H, D], (FLOPs, bytes)) of each method available here."""
    rotary = rotary_of(length)
    for fold in folds:
        bias = torch.full((len(fold), HEADS), -4.0, device="cuda") if fold else None

        def run(
            q: Tensor, k: Tensor, v: Tensor, fold: list[int] = fold, bias: Tensor | None = bias
        ) -> Tensor:
            return tensor_attention(
                q, k, v, fold, doc_start=doc_start, hop_bias=bias, rotary=rotary, backend="triton"
            )

        yield f"tensor {fold}", run, tensorized_cost(fold, length)
    for route in routes:
        name = f"routed {route.top_k} x {route.block}"
        yield name, _routed(route, rotary, doc_start), routed_cost(route, length)
        if doc_start is None and length <= FLEX_LIMIT:
            yield f"Flex, tiles of {name}", _flex_tiles(route, rotary, length), (math.nan, math.nan)
    full = tensorized_cost([], length)
    for name, backend in (
        ("SDPA flash", SDPBackend.FLASH_ATTENTION),
        ("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION),
    ):
        yield name, _sdpa(backend), full
    window = WINDOW * (length - (WINDOW - 1) / 2) if length > WINDOW else length * (length + 1) / 2
    if length <= FLEX_LIMIT:
        cost = 4 * HEAD_DIM * HEADS * window, full[1]
        yield f"Flex window {WINDOW}", _flex_window(length), cost
    else:
        print(f"skipping FlexAttention at {length} tokens: not measured above {FLEX_LIMIT}")
    for version, module in ((2, "flash_attn"), (3, "flash_attn_interface")):
        if importlib.util.find_spec(module) is not None:
            yield f"flash-attn {version}", _flash_attn(module), full


def _routed(
    route: Route, rotary: Rotary, doc_start: Tensor | None
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return routed_attention(
            q, k, v, **route._asdict(), doc_start=doc_start, rotary=rotary, backend="triton"
        )

    return run


def _sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                is_causal=True, enable_gqa=True,
            )  # fmt: skip
        return out.transpose(1, 2)

    return run


def _flash_attn(module: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    attend = importlib.import_module(module).flash_attn_func

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out  # version 3 may also return log-sum-exps

    return run


def _flex_window(length: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def allowed(_b: Tensor, _h: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return (t >= u) & (t - u < WINDOW)

    torch.compiler.reset()  # each length compiles its own kernel, which would exhaust the cache
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    @cache
    def mask() -> Any:
        return create_block_mask(allowed, None, None, length, length, device="cuda", _compile=True)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask(), enable_gqa=True).transpose(1, 2)

    return run


def _flex_tiles(
    route: Route, rotary: Rotary, length: int
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention over the window and the blocks open in tiles of 128 tokens, for all tokens.

    The mask is computed from the first q and k and kept, so only the attention is timed. The
    backward does not compile for blocks of 64 (torch 2.11): blocks must be multiples of its tiles
    of 128 keys, and no kernel option changes that.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    tile = 128
    torch.compiler.reset()
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    masks: list[BlockMask] = []

    def causal(_b: Tensor, _h: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return t >= u

    def mask(q: Tensor, k: Tensor) -> BlockMask:
        choice = choose_blocks(
            q, k, window=route.window, block=route.block, top_k=route.top_k, pool=route.pool
        )
        tiles, blocks = length // tile, length // route.block
        slots = torch.where(choice < 0, blocks, choice)[0].unflatten(0, (tiles, tile))
        slots = slots.permute(2, 0, 1, 3).flatten(2).long()  # [K, tiles, tile * C]
        reads = torch.zeros(KEY_HEADS, tiles, blocks + 1, dtype=torch.bool, device=q.device)
        reads = reads.scatter(2, slots, True)[..., :blocks]
        first = torch.arange(tiles, device=q.device)[:, None] * tile
        block = torch.arange(blocks, device=q.device) * route.block
        reads |= (block + route.block > first - route.window + 1) & (block < first + tile)
        reads = reads.repeat_interleave(HEADS // KEY_HEADS, 0)[None]
        order = reads.int().argsort(dim=-1, descending=True, stable=True).int()
        return BlockMask.from_kv_blocks(
            reads.sum(-1).int(), order, BLOCK_SIZE=(tile, route.block), mask_mod=causal,
            seq_lengths=(length, length),
        )  # fmt: skip

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not masks:
            masks.append(mask(q.detach(), k.detach()))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=masks[0], enable_gqa=True).transpose(1, 2)

    return run


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
) -> list[Measurement]:
    """Measure every method at one length.

    Args:
        length: number of tokens T.
        folds: folds of tensorized attention.
        routes: settings of routed attention.
        doc_start: [1, T] document starts for tensorized and routed attention (None: one document).
        full_limit: longest length at which full attention is measured, NaN beyond (0: no limit).
    """
    q, k, v = (
        torch.randn(1, length, h, HEAD_DIM, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for h in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    if routes and length > 2 * routes[0].window:
        agreeing = agreeing_queries(k.detach(), HEADS, routes[0])
        q = agreeing.requires_grad_()
    cotangent = torch.randn_like(q)
    rows = []
    for name, run, (flops, moved) in methods(length, folds, routes, doc_start):
        forward_ms = both_ms = peak = math.nan
        is_full = name == "tensor []" or name.startswith(("SDPA", "flash-attn"))
        if not (is_full and full_limit and length > full_limit):
            repeats = 3 if is_full and length > 65536 else 10

            def both(run: Callable[..., Tensor] = run) -> None:
                torch.autograd.grad(run(q, k, v), (q, k, v), cotangent)

            try:
                with torch.no_grad():
                    forward_ms = median_ms(lambda run=run: run(q, k, v), repeats)  # type: ignore[misc]
                with _peak_memory() as peaks:
                    both()
                peak = peaks[0]
                both_ms = median_ms(both, repeats)
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
