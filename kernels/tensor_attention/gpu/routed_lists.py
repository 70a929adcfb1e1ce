# ruff: noqa: N803 - compile-time constants of Triton kernels are capitals
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Lists of the open blocks of each tile of tokens, and of the tiles that read each block.

A choice lists blocks per token. Queries are processed in tiles, so the kernels need the union of a
tile's blocks, with one bit per token. The kernel for keys and values needs the inverse. Both are
built in order and without atomics. The GPU does not wait for the host: buffers have maximum sizes,
and counts stay on the device.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .routed_launch import TILE, Routed, starts_of
from .routed_tiles import list_warps

_SIZES = ["num_tokens", "num_tiles", "per_group", "num_slots", "earlier", "first_known"]


@triton.jit(do_not_specialize=_SIZES)
def tile_list_kernel(
    choice, doc_start, entries, counts, num_tokens, num_tiles, earlier, first_known,
    K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, OPEN: tl.constexpr, TILE: tl.constexpr,
    TOKENS: tl.constexpr, CAPACITY: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """entries [B, K, tiles, CAPACITY] int64 = first token of a block << 32 | bits of its readers,
    ascending; counts [B, K, tiles]. TOKENS includes, with open tiles, those of the previous tile.

    choice [B, num_tokens, K, C] and doc_start [B, num_tokens] start at token `first_known` of the
    row. Tiles start at the first query, `earlier` tokens later.

    Sorting (block, bit) pairs makes the readers of a block adjacent. A running sum adds their bits;
    its differences at the boundaries between blocks are the masks.
    """
    tile = tl.program_id(0)
    key_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    doc_start += batch * num_tokens
    entries += ((batch * K + key_head) * num_tiles + tile) * CAPACITY
    first = earlier + tile * TILE
    place = tl.arange(0, SORTED)
    token = first - (TOKENS - TILE) + place // C
    valid = (place < CAPACITY) & (token >= 0) & (token < num_tokens)
    document = tl.load(doc_start + token, mask=valid, other=0)
    chosen = (batch * num_tokens + token) * K + key_head
    index = tl.load(choice + chosen * C + place % C, mask=valid, other=-1)
    valid = valid & (index >= 0)
    if OPEN > 1:  # blocks of earlier tokens count if they are in the open tile of the first token
        first_document = tl.load(doc_start + first)
        same = (document == first_document) & (
            (first_known + token - document) // OPEN
            == (first_known + first - first_document) // OPEN
        )
        valid = valid & ((token >= first) | same)
    bit = tl.maximum(token - first, 0)
    start = document + index * BLOCK
    key = tl.sort(tl.where(valid, start * TILE + bit, 2147483647))

    valid = key < 2147483647
    tl.store(entries + place, key.to(tl.int64), mask=place < CAPACITY)
    tl.debug_barrier()
    before = tl.load(entries + place - 1, mask=(place > 0) & (place < CAPACITY), other=-TILE)
    before = before.to(tl.int32)
    opens = valid & (key // TILE != before // TILE)
    bits = tl.where(valid & (key != before), 1 << (key % TILE), 0)
    rank = tl.cumsum(opens.to(tl.int32)) - 1
    running = tl.cumsum(bits) - bits
    count = tl.sum(opens.to(tl.int32))
    total = tl.sum(bits)
    tl.debug_barrier()
    packed = ((key // TILE).to(tl.int64) << 32) | running.to(tl.int64)
    tl.store(entries + rank, packed, mask=opens)
    tl.debug_barrier()
    listed = (place < count) & (place < CAPACITY)
    packed = tl.load(entries + place, mask=listed, other=0)
    after = tl.load(entries + place + 1, mask=listed & (place + 1 < count), other=0)
    after = tl.where(place + 1 < count, after & 0xFFFFFFFF, total)
    mask = (after - (packed & 0xFFFFFFFF)).to(tl.int32)
    if OPEN > 1:  # copy a bit to the later tokens of its open tile
        lane = tl.arange(0, TILE)
        here = first + lane
        known = here < num_tokens
        own = tl.load(doc_start + here, mask=known, other=0)
        previous = tl.load(doc_start + here - 1, mask=known & (lane > 0), other=-1)
        joined = (own == previous) & ((first_known + here - own) % OPEN > 0)
        joins = tl.sum(joined.to(tl.int32) << lane)
        for step in tl.static_range(4):
            mask = mask | ((mask << (1 << step)) & joins)
            joins = joins & (joins << (1 << step))
    tl.debug_barrier()
    tl.store(entries + place, ((packed >> 32) << 32) | mask.to(tl.int64), mask=listed)
    tl.store(counts + (batch * K + key_head) * num_tiles + tile, count)


@triton.jit(do_not_specialize=_SIZES)
def rank_kernel(
    entries, counts, seen, num_tiles, num_slots, per_group,
    BLOCK: tl.constexpr, CAPACITY: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Number the readers of each block within a group of tiles, in order.

    seen [B K, slots, GROUPS] int32 (zeros) is set to the number of tiles of the group that read
    each slot; bits 16 to 31 of an entry, to the number before it. A tile lists a block once, so no
    two places collide.
    """
    group = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    entries += row * num_tiles * CAPACITY
    counts += row * num_tiles
    seen += row * num_slots * GROUPS + group
    first = group * per_group
    base = entries + first.to(tl.int64) * CAPACITY
    for tile in range(first, tl.minimum(first + per_group, num_tiles)):
        count = tl.load(counts + tile)
        for start in range(0, count, WIDTH):
            place = start + tl.arange(0, WIDTH)
            listed = place < count
            entry = tl.load(base + place, mask=listed, other=0)
            cell = seen + ((entry >> 32) // BLOCK) * GROUPS
            rank = tl.load(cell, mask=listed, other=0)
            tl.store(base + place, entry | (rank.to(tl.int64) << 16), mask=listed)
            tl.store(cell, rank + 1, mask=listed)
        base += CAPACITY
        tl.debug_barrier()


@triton.jit(do_not_specialize=_SIZES)
def reader_kernel(
    entries, counts, begins, readers, num_tiles, num_slots, per_group,
    BLOCK: tl.constexpr, CAPACITY: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """readers [B K, tiles CAPACITY] int64 = tile << 16 | bits, slot by slot, tiles ascending.

    begins [B K, slots GROUPS]: index in `readers` of each group's first reader of a slot.
    """
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    count = tl.load(counts + row * num_tiles + tile)
    base = entries + (row * num_tiles + tile) * CAPACITY
    begins += row * num_slots * GROUPS + tile // per_group
    readers += row * num_tiles * CAPACITY
    for start in range(0, count, WIDTH):
        place = start + tl.arange(0, WIDTH)
        listed = place < count
        entry = tl.load(base + place, mask=listed, other=0)
        begin = tl.load(begins + ((entry >> 32) // BLOCK) * GROUPS, mask=listed, other=0)
        target = begin + ((entry >> 16) & 0xFFFF)
        tl.store(readers + target, (tile.to(tl.int64) << 16) | (entry & 0xFFFF), mask=listed)


class TileLists(NamedTuple):
    """Open blocks of each tile: `entries` [B, K, tiles, capacity], `counts` [B, K, tiles]."""

    entries: Tensor
    counts: Tensor


class Readers(NamedTuple):
    """Tiles that read each block: `readers` [B K, tiles capacity], `ends` [B K, slots GROUPS].

    `ends` is the end index of a slot's readers, one number per group of tiles.
    """

    readers: Tensor
    ends: Tensor


def tile_lists(routed: Routed) -> TileLists:
    """The union of each tile's open blocks, with one bit per token."""
    batch, num_tokens, key_heads, width = routed.choice.shape
    device, tiles = routed.choice.device, routed.tiles
    shape = (batch, key_heads, tiles)
    entries = torch.empty(*shape, routed.capacity, dtype=torch.int64, device=device)
    counts = torch.empty(shape, dtype=torch.int32, device=device)
    tokens = routed.capacity // width
    earlier = num_tokens - routed.q.shape[1]
    first_known = routed.first - earlier
    with torch.cuda.device_of(entries):
        tile_list_kernel[(tiles, key_heads, batch)](
            routed.choice, starts_of(routed.doc_start, first_known, num_tokens), entries, counts,
            num_tokens, tiles, earlier, first_known,
            K=key_heads, C=width, BLOCK=routed.block, OPEN=routed.open_tile, TILE=TILE,
            TOKENS=tokens, CAPACITY=routed.capacity,
            SORTED=triton.next_power_of_2(routed.capacity), num_warps=list_warps(routed),
        )  # fmt: skip
    return TileLists(entries, counts)


def readers_of_blocks(routed: Routed, lists: TileLists) -> Readers:
    """Invert the lists. This writes bits 16 to 31 of `lists.entries`."""
    batch, key_heads, tiles = lists.counts.shape
    rows, slots = batch * key_heads, routed.slots
    device = lists.counts.device
    groups = routed.tile_groups
    seen = torch.zeros(rows, slots, groups, dtype=torch.int32, device=device)
    per_group = triton.cdiv(tiles, groups)
    constants = {
        "BLOCK": routed.block, "CAPACITY": routed.capacity, "WIDTH": 128, "GROUPS": groups,
    }  # fmt: skip
    with torch.cuda.device_of(seen):
        rank_kernel[(groups, rows)](
            lists.entries, lists.counts, seen, tiles, slots, per_group, **constants,
            num_warps=4, num_stages=1,
        )  # fmt: skip
        ends = seen.view(rows, -1).cumsum(1, dtype=torch.int32)
        readers = torch.empty(rows, tiles * routed.capacity, dtype=torch.int64, device=device)
        reader_kernel[(tiles, rows)](
            lists.entries, lists.counts, ends - seen.view(rows, -1), readers, tiles, slots,
            per_group, **constants, num_warps=4,
        )  # fmt: skip
    return Readers(readers, ends)
