"""The share of full attention that a routed layer's choice contains, from its queries and keys.

Full attention is what the layer would compute if every block were chosen: one softmax over the
window's exact scores and the scores at stretched positions beyond it. Shape letters: B batch, T
tokens, H query heads, K key heads, G = H / K, D head size, N slots (`tensor_attention.routing`), C
queries of a tile, U keys up to its last query.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from tensor_attention import Rotary, apply_rotary, choose_blocks
from tensor_attention.routed_dense import opened_blocks
from tensor_attention.routing import block_starts, rotate_stretched
from tensorlm.config import RouteConfig

# Columns of a table of masses.
COLUMNS = ("all", "chosen", "best", "random")
_TILE = 64  # maximum number of queries per tile; fewer in long rows,
_TILE_SCORES = 1 << 24  # to limit the number of scores that exist at a time


class Masses(NamedTuple):
    """Sums of attention weights over queries and heads; those of one query and head add up to 1.

    table: [1 + bins, 4] float64, columns as `COLUMNS`. The first line is the document's first
    block, which every query reads. The other lines are the other blocks, by distance of their keys.
    opened: [] float64, number of open blocks, summed over queries and key heads.
    """

    table: Tensor
    opened: Tensor


@torch.no_grad()
def choice_masses(
    q: Tensor,
    k: Tensor,
    *,
    window: int,
    route: RouteConfig,
    queries: range,
    edges: list[int],
    doc_start: Tensor,
    rotary: Rotary | None,
) -> Masses:
    """Measure the attention beyond the window, and the part of it in open blocks.

    For comparison with the layer's choice, it also measures the same number of blocks with the
    largest mass, and the expected mass of the first block and random others of the same number.

    Scores are float32 or wider. Memory grows with T, not with T x T.

    Args:
        q: [B, T, H, D], not rotated.
        k: [B, T, K, D], not rotated.
        window, route: settings of the layer.
        queries: the tokens whose attention is measured.
        edges: ascending distances t - u that divide the bins: edges[i] <= t - u < edges[i + 1].
        doc_start: [B, T], first token of each token's document, within 0 ... t.
        rotary: table of at least T positions.
    """
    known, stop = max(0, queries.start - route.open_tile + 1), queries.stop
    k, doc_start = k[:, :stop], doc_start[:, :stop]
    choice = choose_blocks(
        q[:, known:stop], k, window=window, block=route.block, top_k=route.top_k, pool=route.pool,
        doc_start=doc_start, first=known,
    )  # fmt: skip
    work = torch.promote_types(q.dtype, torch.float32)
    q, k = q[:, queries.start : stop].to(work) * q.shape[-1] ** -0.5, k.to(work)
    far_q = rotate_stretched(q, rotary, doc_start, route.stretch, queries.start)
    far_k = rotate_stretched(k, rotary, doc_start, route.stretch)
    table = q.new_zeros(len(edges), len(COLUMNS), dtype=torch.float64)
    number = q.new_zeros((), dtype=torch.float64)
    group = q.shape[2] // k.shape[2]
    size = max(1, min(_TILE, _TILE_SCORES // (group * stop)))
    for at in range(queries.start, stop, size):
        tile = range(at, min(at + size, stop))
        before = max(known, at - route.open_tile + 1)
        opened = opened_blocks(
            choice[:, before - known : tile.stop - known], doc_start[:, : tile.stop], route.block,
            route.open_tile, at, len(tile),
        )  # fmt: skip
        number += opened.sum()
        near = range(max(0, at - window + 1), tile.stop)
        rows = slice(at - queries.start, tile.stop - queries.start)
        near_q = _rotate(q[:, rows], rotary, tile)
        near_k = _rotate(k[:, near.start : near.stop], rotary, near)
        for row in range(q.shape[0]):
            blocks = _Blocks(doc_start[row, : tile.stop], tile, window, route.block)
            for head in range(k.shape[2]):
                heads = slice(head * group, (head + 1) * group)
                mass = _mass_beyond(
                    (near_q[row, :, heads], far_q[row, rows, heads]),
                    (near_k[row, :, head], far_k[row, : tile.stop, head]), blocks,
                )  # fmt: skip
                table += blocks.divide(mass, opened[row, head], edges)
    return Masses(table, number)


def _rotate(x: Tensor, rotary: Rotary | None, tokens: range) -> Tensor:
    """Rotate `x` [B, n, H, D] of these tokens to their positions in the row."""
    if rotary is None:
        return x
    return apply_rotary(x, rotary, torch.arange(tokens.start, tokens.stop, device=x.device))


class _Blocks:
    """The blocks of the past for the queries of one tile."""

    def __init__(self, doc_start: Tensor, tile: range, window: int, block: int) -> None:
        """`doc_start`: [U], of one row."""
        key, document = torch.arange(tile.stop, device=doc_start.device), doc_start.long()
        token, own = key[tile.start :, None], document[tile.start :, None]
        self.seen = (key <= token) & (key >= own)  # [C, U]
        self.beyond = key <= token - window  # [C, U]; if also seen, the key is in a far block
        self.slot = document // block + (key - document) // block  # [U], slot of each key
        starts = block_starts(doc_start[None], block)[0]
        self.far = (starts <= token - window) & (starts >= own)  # [C, N]
        self.first = starts == own  # [C, N]
        inside = starts[:, None] + torch.arange(block, device=doc_start.device)
        self._keys = inside.clamp(max=tile.stop - 1)  # [N, block]; incomplete blocks are not far
        self._tile = tile

    def divide(self, mass: Tensor, opened: Tensor, edges: list[int]) -> Tensor:
        """`Masses.table` for the mass [C, U] of one key head and its open blocks [C, N]."""
        far, first, opened = (x.to(mass.dtype) for x in (self.far, self.first, opened))
        held = (far, opened, self._best(mass, opened), self._random(far, opened))
        shares = torch.stack(held)  # [4, C, N]
        lines = [self._held(mass, shares * first, range(mass.shape[1]))]
        for start, stop in pairwise(edges):
            # Keys at this distance from any query of the tile.
            lowest = max(0, self._tile.start - stop + 1)
            keys = range(lowest, max(lowest, self._tile.stop - start))
            distance = self._distances(keys)
            inside = mass[:, keys.start : keys.stop] * ((distance >= start) & (distance < stop))
            lines.append(self._held(inside, shares * (1 - first), keys))
        return torch.stack(lines)

    def _held(self, mass: Tensor, shares: Tensor, keys: range) -> Tensor:
        """[4] float64: sum of the mass [C, n] of these keys x the share of each block [4, C, N]."""
        slots = self.slot[keys.start : keys.stop]
        parts = [(mass * share[:, slots]).sum(dtype=torch.float64) for share in shares]
        return torch.stack(parts)

    def _distances(self, keys: range) -> Tensor:
        token, key = (
            torch.arange(r.start, r.stop, device=self.slot.device) for r in (self._tile, keys)
        )
        return token[:, None] - key

    def _best(self, mass: Tensor, opened: Tensor) -> Tensor:
        """[C, N]: 1 for the blocks with the largest mass, as many as there are open blocks."""
        by_block = mass[:, self._keys].sum(-1).masked_fill(~self.far, -1)
        order = by_block.sort(dim=-1, descending=True, stable=True).indices
        rank = torch.arange(order.shape[1], device=order.device)
        taken = (rank < opened.sum(-1, keepdim=True)).to(mass.dtype)
        return torch.zeros_like(taken).scatter(-1, order, taken)

    def _random(self, far: Tensor, opened: Tensor) -> Tensor:
        """[C, N]: probability of each block if all blocks except the first are equally likely."""
        chosen, others = opened.sum(-1, keepdim=True) - 1, far.sum(-1, keepdim=True) - 1
        return torch.where(self.first, 1, chosen / others.clamp(min=1)) * far


def _mass_beyond(
    queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], blocks: _Blocks
) -> Tensor:
    """[C, U]: weights of the keys beyond the window, summed over the heads of a group.

    Args:
        queries: [C, G, D] each, scaled: rotated to their positions, and to stretched positions.
        keys: [n, D], the last n of U keys, rotated to their positions; and [U, D], stretched.
        blocks: the blocks that each query sees.
    """
    near, far = (
        (q.flatten(0, 1) @ k.T).unflatten(0, q.shape[:2])
        for q, k in zip(queries, keys, strict=True)
    )
    last = slice(far.shape[-1] - near.shape[-1], None)
    far[..., last] = torch.where(blocks.beyond[:, None, last], far[..., last], near)
    weights = far.masked_fill_(~blocks.seen[:, None], float("-inf")).softmax(-1)
    return weights.sum(1) * blocks.beyond
