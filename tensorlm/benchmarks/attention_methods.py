"""Methods of the attention benchmark: one function of q, k, v each, with its FLOPs and bytes."""

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

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

from .routed_inputs import Route

HEADS, KEY_HEADS, HEAD_DIM = 32, 8, 128
ROPE_THETA = 500000.0  # as in Llama 3
WINDOW = 1024
# At 1,048,576 tokens, FlexAttention's window kernel reads illegal addresses (torch 2.11, H200) and
# ends the process, and its mask of tiles would take tens of GiB.
FLEX_LIMIT = 1 << 19
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # of q, k, v [1, T, H, D]


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
) -> Iterator[tuple[str, Attend, tuple[float, float]]]:
    """(name, function of q, k, v [1, T, H, D], (FLOPs, bytes)) of each method available here."""
    rotary = rotary_of(length)
    settings: dict[str, Any] = {"doc_start": doc_start, "rotary": rotary, "backend": "triton"}
    for fold in folds:
        bias = torch.full((len(fold), HEADS), -4.0, device="cuda") if fold else None
        run = partial(tensor_attention, fold=fold, hop_bias=bias, **settings)
        yield f"tensor {fold}", run, tensorized_cost(fold, length)
    for route in routes:
        name = f"routed {route.top_k} x {route.block}"
        run = partial(routed_attention, **route._asdict(), **settings)
        yield name, run, routed_cost(route, length)
        if doc_start is None and length <= FLEX_LIMIT:
            yield f"Flex, tiles of {name}", _flex_tiles(route, rotary, length), (math.nan, math.nan)
    full = tensorized_cost([], length)
    for name, backend in (
        ("SDPA flash", SDPBackend.FLASH_ATTENTION),
        ("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION),
    ):
        yield name, partial(_sdpa, backend=backend), full
    window = WINDOW * (length - (WINDOW - 1) / 2) if length > WINDOW else length * (length + 1) / 2
    if length <= FLEX_LIMIT:
        cost = 4 * HEAD_DIM * HEADS * window, full[1]
        yield f"Flex window {WINDOW}", _flex_window(length), cost
    else:
        print(f"skipping FlexAttention at {length} tokens: not measured above {FLEX_LIMIT}")
    for version, module in ((2, "flash_attn"), (3, "flash_attn_interface")):
        if importlib.util.find_spec(module) is not None:
            yield f"flash-attn {version}", _flash_attn(module), full


def _sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


def _flash_attn(module: str) -> Attend:
    attend = importlib.import_module(module).flash_attn_func

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out  # version 3 may also return log-sum-exps

    return run


def _flex_window(length: int) -> Attend:
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


def _flex_tiles(route: Route, rotary: Rotary, length: int) -> Attend:
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
