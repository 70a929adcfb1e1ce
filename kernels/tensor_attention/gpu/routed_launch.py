"""Shared by the launchers of the routed kernels: inputs of a hop, tiles of tokens, tile shapes."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..routing import KERNEL_TILE
from .launch import LOG2E, is_interpreted, padded, precision_of

# Tokens per tile. Its queries read the union of their blocks, masked by one bit per token.
TILE = KERNEL_TILE
# Shared memory of a program on Hopper, in bytes.
SHARED_MEMORY = 227 * 1024
# Maximum number of groups in which tiles are counted, in order, to list the tiles of each block.
_MOST_GROUPS = 128


class Routed(NamedTuple):
    """The inputs of a routed hop as the kernels take them; all contiguous.

    q [B, Q, H, D] holds the tokens from `first` on; k [B, T, K, D]; values [B, T, K, E]; choice
    [B, P + Q, K, C] and doc_start [B, T] int32; cos and sin [positions, D / 2] float32 or None.
    """

    q: Tensor
    k: Tensor
    values: Tensor
    choice: Tensor
    doc_start: Tensor
    cos: Tensor | None
    sin: Tensor | None
    window: int
    block: int
    stretch: int
    open_tile: int
    scale: float
    first: int

    @property
    def query_starts(self) -> Tensor:
        """doc_start [B, Q] for the queries."""
        return starts_of(self.doc_start, self.first, self.q.shape[1])

    @property
    def tiles(self) -> int:
        return triton.cdiv(self.q.shape[1], TILE)

    @property
    def tile_groups(self) -> int:
        """Number of groups of tiles in which the readers of blocks are counted in parallel."""
        return min(_MOST_GROUPS, triton.next_power_of_2(self.tiles))

    @property
    def slots(self) -> int:
        return triton.cdiv(self.k.shape[1], self.block)

    @property
    def group(self) -> int:
        """Number of query heads per key head."""
        return self.q.shape[2] // self.k.shape[2]

    @property
    def padded_group(self) -> int:
        return triton.next_power_of_2(self.group)

    @property
    def capacity(self) -> int:
        """Maximum number of open blocks of a tile."""
        tokens = TILE if self.open_tile == 1 else 2 * TILE
        return tokens * self.choice.shape[3]

    @property
    def rows_of_block(self) -> int:
        """Number of keys of a block per product."""
        return rows_of_block(self.q, self.values, self.block)

    @property
    def allows_tma(self) -> bool:
        """Whether TMA can load whole tiles of these inputs."""
        return can_tma(self.q) and can_tma(self.values)

    def constants(self) -> dict[str, int | str | bool]:
        """The compile-time constants of the kernels that attend."""
        size, value_size = self.q.shape[3], self.values.shape[3]
        return {
            "H": self.q.shape[2], "K": self.k.shape[2], "D": size, "E": value_size,
            "BLOCK_D": padded(size), "BLOCK_E": padded(value_size), "TILE": TILE,
            "GROUP": self.padded_group, "BLOCK": self.block, "BLOCK_N": self.rows_of_block,
            "PRECISION": precision_of(self.q.dtype),
        }  # fmt: skip

    @property
    def score_scale(self) -> float:
        """The factor on scores in base 2."""
        return self.scale * LOG2E


def starts_of(doc_start: Tensor, first: int, count: int) -> Tensor:
    """doc_start [B, count] for the tokens first, first + 1, ...; contiguous."""
    return doc_start[:, first : first + count].contiguous()


def rows_of_block(q: Tensor, values: Tensor, block: int) -> int:
    """Number of keys of a block per product: 64, or 32 for large heads (see `operand_bytes`)."""
    longest = max(padded(q.shape[3]), padded(values.shape[3])) * q.dtype.itemsize
    return min(block, 64 if longest <= 512 else 32)


def operand_bytes(q: Tensor, k: Tensor, values: Tensor, block: int) -> int:
    """Shared memory of the backward kernels: a tile of q and dz, a block of keys and values."""
    columns = padded(q.shape[3]) + padded(values.shape[3])
    queries = TILE * triton.next_power_of_2(q.shape[2] // k.shape[2])
    return (queries + rows_of_block(q, values, block)) * columns * q.dtype.itemsize


def can_tma(x: Tensor) -> bool:
    """Whether TMA (Hopper and later) can load tiles of the heads of `x`: without padding."""
    return padded(x.shape[3]) == x.shape[3] and (
        is_interpreted() or torch.cuda.get_device_capability(x.device) >= (9, 0)
    )
