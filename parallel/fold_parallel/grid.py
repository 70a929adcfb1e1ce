"""The rank grid: the ranks that share one row of tokens, and the sizes that can be shared.

Ranks form a dp x sp grid: `sp` consecutive ranks form one sequence group and hold the same row, one
contiguous slice each. Groups are created here once and passed as arguments; none is global.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from tensor_attention import validate_fold


@dataclass(frozen=True)
class Grid:
    """This rank's place in the dp x sp grid, and the process groups of its row.

    `sp_group` and `swap_group` have the same ranks. They are two communicators, so that a swap and
    a halo exchange can run at the same time. Both are None if sp is 1.
    """

    world_size: int = 1
    rank: int = 0
    sp: int = 1
    sp_group: dist.ProcessGroup | None = None
    swap_group: dist.ProcessGroup | None = None

    @property
    def dp(self) -> int:
        """Number of rows that are processed at the same time."""
        return self.world_size // self.sp

    @property
    def dp_rank(self) -> int:
        """Index of this rank's row among them."""
        return self.rank // self.sp

    @property
    def sp_rank(self) -> int:
        """Index of this rank's slice within its row."""
        return self.rank % self.sp

    def tokens(self, seq_len: int) -> slice:
        """The slice of a row of `seq_len` tokens that this rank holds."""
        shard = seq_len // self.sp
        return slice(self.sp_rank * shard, (self.sp_rank + 1) * shard)


def create_grid(sp: int, timeout: timedelta | None = None) -> Grid:
    """Create the grid on the default process group (on this process alone if there is none).

    Collective: every rank calls it once with the same `sp`. An exchange that takes longer than
    `timeout` fails (None: torch's default).

    Raises:
        ValueError: if `sp` does not divide the number of ranks.
    """
    initialized = dist.is_available() and dist.is_initialized()
    world_size = dist.get_world_size() if initialized else 1
    rank = dist.get_rank() if initialized else 0
    check_world(world_size, sp)
    if sp == 1:
        return Grid(world_size, rank)
    options = None
    if dist.get_backend() == "nccl":
        # Exchanges that overlap with hop 1 must not queue behind its blocks for a multiprocessor.
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    own: dict[str, dist.ProcessGroup] = {}
    for first in range(0, world_size, sp):
        members = list(range(first, first + sp))
        for name in ("sp", "swap"):
            group = dist.new_group(members, timeout=timeout, pg_options=options, group_desc=name)
            if rank in members:
                own[name] = group
    return Grid(world_size, rank, sp, own["sp"], own["swap"])


def check_world(world_size: int, sp: int) -> None:
    """Raise ValueError with the legal degrees unless `sp` divides `world_size`."""
    if sp < 1 or world_size % sp:
        legal = ", ".join(str(p) for p in _divisors(world_size))
        raise ValueError(f"sp = {sp} does not divide {world_size} ranks (legal sp: {legal})")


def legal_degrees(seq_len: int, fold: Sequence[int]) -> list[int]:
    """All degrees sp that can share rows of `seq_len` tokens with `fold`; they include 1."""
    if not fold:
        return _divisors(seq_len)
    return [p for p in _divisors(fold[0]) if p == 1 or seq_len % (p * fold[0]) == 0]


def check_sizes(
    seq_len: int, sp: int, fold: Sequence[int], full_attention_heads: int | None = None
) -> None:
    """Raise ValueError, with legal sizes on one line, if ranks cannot share such rows.

    Each of the `sp` ranks must hold whole inner rows, seq_len / sp % n_1 == 0, and whole columns
    after the swap, n_1 % sp == 0. No process group is needed.

    Args:
        seq_len: tokens per row.
        sp: number of ranks that share a row.
        fold: lengths of the inner axes, innermost first; [] if no layer is strided. Window and
            routed layers only need sp to divide seq_len.
        full_attention_heads: number of query heads if some layers are full attention, which shares
            heads; else None.
    """
    validate_fold(fold)
    degrees = legal_degrees(seq_len, fold)
    if full_attention_heads is not None:
        degrees = [p for p in degrees if full_attention_heads % p == 0]
    if sp in degrees:
        return
    legal = [f"sp in {degrees}"]
    unit = sp * fold[0] if fold else sp
    # If ranks cannot share the heads, no other row and no other fold would help.
    shares_heads = sp > 1 and (full_attention_heads is None or full_attention_heads % sp == 0)
    if shares_heads and fold and fold[0] % sp:
        row = "" if seq_len % sp**2 == 0 else f", and seq_len one of {sp} x fold[0]"
        legal.append(f"fold[0] a multiple of {sp}{row}")
    elif shares_heads and seq_len % unit:
        below = seq_len // unit * unit
        nearest = f"{below} or {below + unit}" if below else f"{unit}"
        legal.append(f"seq_len a multiple of {unit}, such as {nearest}")
    numbers = [f"seq_len = {seq_len}"]
    if fold:
        numbers.append(f"fold = {list(fold)}")
    if full_attention_heads is not None:
        numbers.append(f"heads = {full_attention_heads}")
    raise ValueError(
        f"sp = {sp} cannot share rows with {', '.join(numbers)} (legal: {'; or '.join(legal)})"
    )


def _divisors(number: int) -> list[int]:
    return [p for p in range(1, number + 1) if number % p == 0]
