"""Memory of the attention operator, from the tensors that its Triton kernels need.

`chain` follows `kernels/tensor_attention/gpu/chain.py` for whole rows. `shared` follows
`parallel/fold_parallel/attention.py` for rows that `sp` ranks share, with one operator per hop and
exchanges. All sizes are bytes per rank and layer, in the letters of `job.py`; m is the number of
hops.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from tensor_attention import Axis, fold_axes
from tensor_attention.routing import KERNEL_TILE, num_parts
from tensorlm.config import LayerKind, RouteConfig

from .job import Job

STATE = 4  # bytes of a log-sum-exp, a row sum, or a token's reach: float32, int32


class OperatorMemory(NamedTuple):
    """Bytes of the operator of one layer.

    Attributes:
        saved: kept from forward to backward, including q, k, v and the output.
        backward: what backward adds at its peak, including the incoming gradient.
        forward: peak of a forward pass that saves nothing, including q, k, v.
        kept: the part of `saved` that recomputation keeps too: the choice of a routed layer.
        results: what the operator's kernels return, which "selective" keeps.
        last_result: the part of `results` that "attention" keeps; None: all.
    """

    saved: int
    backward: int
    forward: int
    kept: int = 0
    results: int = 0
    last_result: int | None = None


def operator_memory(job: Job, kind: LayerKind) -> OperatorMemory:
    """Memory of one layer of this kind."""
    fold = job.config.model.fold if kind == "strided" else ()
    if kind == "routed":
        return routed(job) if job.sp == 1 else shared_routed(job)
    if kind == "window":
        axis = Axis(1, job.config.model.window_size)
        return chain(job, [axis]) if job.sp == 1 else shared_window(job)
    if job.sp == 1:
        return chain(job, fold_axes(fold, job.phase.seq_len))
    return shared(job, fold) if fold else shared_heads(job)


def chain(job: Job, axes: Sequence[Axis]) -> OperatorMemory:
    """Memory of hops on whole rows.

    Saved: q, k, v, and z, log-sum-exp and reach of every hop. Backward: dq, dk, two dz, and rotated
    q and k if windows are long.
    """
    q, k, lse, token = sizes(job)
    hops = len(axes)
    saved = q + 2 * k + hops * (q + lse + token)
    peaks = []
    for i, axis in enumerate(axes):
        is_last = i == hops - 1
        # dq, dk, dvalues, and dz from the next hop
        gradients = q + k + (q if i else k) + (0 if is_last else q)
        # <dz, z>; dlse from the next hop; dbias, dlse and <dz, z> for the previous hop
        rows = 1 + (not is_last) + (3 if i else 0)
        peaks.append(gradients + sum(_rotated(job, axis.stride, axis.length)) + rows * lse)
    keys = max(_rotated(job, axis.stride, axis.length)[1] for axis in axes)
    return OperatorMemory(saved, q + max(peaks), saved + keys, results=hops * (q + lse))


def routed(job: Job) -> OperatorMemory:
    """Memory of a routed layer on whole rows.

    Saved: q, k, v, and z, log-sum-exp and reach of the window; z and log-sum-exp of the routed hop,
    document starts and the choice. Lists of blocks are computed in each direction
    (gpu/routed_lists.py).
    """
    q, k, lse, token = sizes(job)
    model, route = job.config.model, job.config.model.route
    assert route is not None
    choice, parts = kept_choice(job), num_parts(route.block, route.pool)
    saved = q + 2 * k + 2 * (q + lse + token) + choice
    window_q, window_k = _rotated(job, 1, model.window_size)
    lists = _lists(job, route)
    forward = q + 2 * k + token + q + lse + max(
        token + window_k,
        choice + k + k * parts // route.block,  # queries summed, mean keys
        choice + q + lse + token + lists.entries + k,  # keys rotated; starts once more
    )  # fmt: skip
    backward = max(
        # dz; dq, dk, dvalues, dz of the window; its dlse, <dz, z>; keys and queries rotated
        q + 2 * lists.entries + lists.ends + (2 * q + 2 * k + 2 * lse) + k + q,
        # The same for the window, with the gradients of the routed hop, whose results are freed.
        2 * (q + 2 * k) + lse + window_q + window_k - choice - token,
    )
    return OperatorMemory(saved, backward, forward, choice, 2 * (q + lse), q + lse)


class _FirstHop(NamedTuple):
    """Memory of hop 1 of a shared row: q, k, v and z include the window of tokens before them."""

    longer: float  # ratio of its tokens to those of the rank
    saved: float
    backward: float
    forward: float  # includes rotated keys and the received halo


def _first_hop(job: Job, length: int) -> _FirstHop:
    """Bytes of hop 1, whose axis has `length` steps, on this rank (`fold_parallel/window.py`)."""
    q, k, lse, token = sizes(job)
    longer = 1 + job.phase.micro_batch * length / job.tokens
    # Rank 0 has a separate rotary table, since there are no positions before the row.
    table = 4 * job.config.model.head_size * (job.phase.seq_len // job.sp + length)
    saved = longer * (2 * q + 2 * k + lse + token) + table
    rotated_q, rotated_k = _rotated(job, 1, length)
    halo = 2 * k * job.phase.micro_batch * (length - 1) / job.tokens
    return _FirstHop(
        longer, saved, longer * (2 * q + 2 * k + lse + rotated_q + rotated_k),
        saved + longer * rotated_k + halo,
    )  # fmt: skip


def shared_window(job: Job) -> OperatorMemory:
    """Memory of a window layer on a shared row."""
    q, k, lse, token = sizes(job)
    hop = _first_hop(job, min(job.config.model.window_size, job.phase.seq_len))
    forward = q + 2 * k + hop.forward + token  # the depth of each token in its document
    results = round(hop.longer * (q + lse))
    return OperatorMemory(round(hop.saved), round(hop.backward), round(forward), results=results)


def shared_routed(job: Job) -> OperatorMemory:
    """Memory of a routed layer on a shared row: each rank has the keys and values of the whole row.

    Saved: hop 1, the row's keys, values and document starts; q, z and two log-sum-exps of the
    routed hop, and the choice.
    """
    q, k, lse, token = sizes(job)
    model, route = job.config.model, job.config.model.route
    assert route is not None
    hop = _first_hop(job, min(model.window_size, job.phase.seq_len))
    row_k, choice, lists = job.sp * k, kept_choice(job), _lists(job, route)
    parts = num_parts(route.block, route.pool)
    row = 2 * row_k + job.sp * token
    z = q if job.phase.micro_batch > 1 else 0  # a copy if rows of z are not contiguous
    saved = hop.saved + row + 2 * (q + lse) + choice + z
    earlier = choice * job.phase.micro_batch * (route.open_tile - 1) // job.tokens
    state = row + hop.longer * (q + lse)
    forward = q + 2 * k + max(
        # Hop 1 during the exchange of keys, values and document starts: sent and received.
        row + 2 * k + token + hop.forward + 2 * token,
        # Queries summed, mean keys.
        state + choice + k + row_k * parts // route.block,
        # Keys rotated; document starts and log-sum-exps once more.
        state + z + choice + earlier + q + 2 * lse + token + lists.entries + row_k + job.sp * token,
    )  # fmt: skip
    backward = max(
        # dz, dq, dz of the window, queries rotated; dk and dvalues of the row, its keys rotated
        4 * q + 2 * lists.entries + lists.ends + 2 * lse + 3 * row_k,
        # Hop 1 during the exchange of the row's gradients: sent and received. The tensors saved by
        # the routed hop are freed.
        4 * row_k + hop.backward - (2 * lse + choice + row + z),
    )
    results = round((hop.longer + 1) * (q + lse))
    return OperatorMemory(round(saved), round(backward), round(forward), choice, results, q + lse)


def kept_choice(job: Job) -> int:
    """t K (top_k + 1) int32: the choice of a routed layer, which recomputation keeps."""
    model = job.config.model
    assert model.route is not None
    return job.tokens * model.num_kv_heads * (model.route.top_k + 1) * STATE


class _Lists(NamedTuple):
    """Bytes of the lists of blocks.

    `entries`: the blocks that each tile reads, and the tiles that read each block. `ends`: where
    the list of each block ends.
    """

    entries: int
    ends: int


def _lists(job: Job, route: RouteConfig) -> _Lists:
    """Of this rank's tiles, and of all blocks of the row."""
    rows, length = job.phase.micro_batch, job.phase.seq_len
    tiles = -(-(length // job.sp) // KERNEL_TILE)
    per_tile = KERNEL_TILE * (1 if route.open_tile == 1 else 2) * (route.top_k + 1)
    heads = rows * job.config.model.num_kv_heads
    groups = min(128, 1 << (tiles - 1).bit_length())
    return _Lists(
        heads * tiles * (8 * per_tile + STATE), heads * -(-length // route.block) * groups * STATE
    )


def shared(job: Job, fold: Sequence[int]) -> OperatorMemory:
    """Memory of hops on a shared row.

    Hop 1 keeps one more inner row (the halo); q, k, z are kept in rows and in columns.
    """
    q, k, lse, token = sizes(job)
    axes = fold_axes(fold, job.phase.seq_len)
    outer = len(axes) - 1
    hop = _first_hop(job, fold[0])
    longer, in_rows = hop.longer, hop.saved
    in_columns = 2 * q + k + lse + outer * (q + lse + token)

    peaks: list[float] = []
    for done, axis in enumerate(reversed(axes[1:])):  # number of hops whose backward is done
        summed = q + k if done else 0  # dq, dk of those hops, until these are added
        rows = 5 if done else 4
        rotated = sum(_rotated(job, axis.stride // job.sp, axis.length))
        work: float = 3 * q + k + rows * lse + rotated
        peaks.append(in_rows + in_columns - done * (q + lse + token) + summed + work)
    # Hop 1, while the gradients of q and k are exchanged: sent and received.
    work = longer * (2 * q + 2 * k + 3 * lse + sum(_rotated(job, 1, fold[0])))
    peaks.append(in_rows + 2 * (q + k) + work)
    saved = in_rows + in_columns + q  # and the output in rows, which is freed earlier
    forward = q + 2 * k + max(
        # Hop 1 with the halo, while q, k and depths are exchanged: sent and received.
        2 * (q + k + token) + in_rows + token
        + (longer - 1) * 2 * k + longer * _rotated(job, 1, fold[0])[1],
        # The results of hop 1, while they are exchanged.
        q + k + token + longer * (q + lse) + 2 * (q + lse),
    )  # fmt: skip
    results = round((longer + outer) * (q + lse))
    return OperatorMemory(round(saved), round(max(peaks) - saved), round(forward), results=results)


def shared_heads(job: Job) -> OperatorMemory:
    """Memory of full attention on H / sp heads of the whole row.

    Key heads are repeated until sp divides their number.
    """
    q, k, lse, token = sizes(job)
    m = job.config.model
    # q, k, v, and the documents' starts within the row
    given = q + 2 * k + token
    repeats = math.lcm(m.num_kv_heads, job.sp) // m.num_kv_heads
    k *= repeats
    saved = 3 * q + 2 * k + lse + job.sp * token  # the output by heads and by tokens
    backward = q + 2 * k + lse  # dz and dq, without the output by tokens
    by_heads, rotates = q + 2 * k + job.sp * token, job.phase.seq_len > job.platform.rotates_above
    if rotates:
        backward += q + k
    forward = given + max(
        2 * by_heads + (2 * k if repeats > 1 else 0),  # sent and received
        by_heads + q + lse + job.sp * token + (k if rotates else 0),
        by_heads + 3 * q,  # the output by heads, sent and received
    )
    return OperatorMemory(saved, backward, forward, results=q + lse)


def sizes(job: Job) -> tuple[int, int, int, int]:
    """Bytes of t tokens of q (or z), of k (or v), of a log-sum-exp, and of a reach."""
    m = job.config.model
    q = job.tokens * m.num_heads * m.head_size * job.itemsize
    k, lse = q * m.num_kv_heads // m.num_heads, job.tokens * m.num_heads * STATE
    return q, k, lse, job.tokens * STATE


def _rotated(job: Job, stride: int, length: int) -> tuple[int, int]:
    """Rotated copies of q and k if queries see many keys, else 0; forward copies only k."""
    q, k, _, _ = sizes(job)
    steps = -(-(job.tokens // job.phase.micro_batch) // stride)
    return (q, k) if min(length, steps) > job.platform.rotates_above else (0, 0)
