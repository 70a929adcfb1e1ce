"""What a shared layer sends, when it sends it, and what a rank computes and keeps."""

from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from fold_parallel import (
    Grid,
    attention,
    collectives,
    create_grid,
    layer_traffic,
    sharded_tensor_attention,
    window,
)
from tensor_attention import fold_axes, hop
from tests.fold_parallel.accounting import Log
from tests.fold_parallel.backends import device, ranks_and_backends, result
from tests.fold_parallel.cases import Case, Row, make_row
from tests.support.distributed import run_distributed

HEAD_DIM = 4


def layer(case: Case, row: Row, grid: Grid, overlap: bool = True) -> tuple[Tensor, Tensor]:
    """The output of this rank and the cotangent for it."""
    tokens, on = grid.tokens(case.seq_len), device() if grid.sp > 1 else torch.device("cpu")
    q, k, v = (x[:, tokens].to(on).requires_grad_() for x in (row.q, row.k, row.v))
    doc_start = row.doc_start[:, tokens].to(on)
    # This backend's products are visible to `Log` on every device.
    out = sharded_tensor_attention(
        q, k, v, case.fold, grid=grid, doc_start=doc_start, backend="blocked", overlap=overlap
    )
    return out, row.cotangent[:, tokens].to(on)


@dataclass(frozen=True)
class Cost:
    """Of one layer, on one rank."""

    forward_sent: list[str]
    backward_sent: list[str]
    forward_messages: list[int]
    backward_messages: list[int]
    flops: int
    kept_bytes: int


def measure(case: Case, sp: int) -> Cost:
    row, grid = make_row(case, HEAD_DIM), create_grid(sp)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with Log() as forward, saved_tensors_hooks(keep, lambda x: x):
        out, cotangent = layer(case, row, grid)
    with Log() as backward:
        out.backward(cotangent)
    with FlopCounterMode(display=False) as flops:
        out, cotangent = layer(case, row, grid)
        out.backward(cotangent)
    return Cost(
        forward.sent, backward.sent, forward.messages, backward.messages,
        flops.get_total_flops(), sum(kept.values()),
    )  # fmt: skip


COST_CASES = [
    Case((8, 2), (256,), heads=4, key_heads=2),
    Case((16,), (100, 156), heads=4, key_heads=1, batch=2, dtype=torch.float32),
    Case((8,), (256,), heads=2, key_heads=2, dtype=torch.bfloat16),
    Case((), (256,), heads=4, key_heads=2),
]


def measure_all(cases: list[Case], sp: int) -> list[Cost]:
    return [measure(case, sp) for case in cases]


@cache
def costs(world_size: int, backend: str) -> dict[Case, list[Cost]]:
    """For each case, the cost on each rank."""
    ranks = run_distributed(measure_all, world_size, COST_CASES, world_size, backend=backend)
    return {case: [rank[i] for rank in ranks] for i, case in enumerate(COST_CASES)}


every_cost = pytest.mark.parametrize("case", COST_CASES, ids=str)


@ranks_and_backends(2, 4)
@every_cost
def test_bytes_sent_are_those_of_the_formula(world_size: int, backend: str, case: Case) -> None:
    ranks = costs(world_size, backend)[case]
    tokens = case.batch * case.seq_len
    for backward in (False, True):
        expected = layer_traffic(
            case.seq_len, world_size, case.fold, heads=case.heads, key_heads=case.key_heads,
            head_dim=HEAD_DIM, itemsize=case.dtype.itemsize, backward=backward,
        )  # fmt: skip
        messages = [rank.backward_messages if backward else rank.forward_messages for rank in ranks]
        assert sum(sum(sizes) for sizes in messages) == sum(expected) * tokens
        sent = [sum(sizes) / tokens for sizes in zip(*messages, strict=True)]
        order = expected[::-1] if backward else expected
        assert sent == [size for size in order if size]


def test_the_formula_for_one_layer_of_eight_billion_parameters() -> None:
    # 32 query and 8 key heads of 128 in bfloat16; 32,768 tokens on 8 ranks; fold [512].
    shape: dict[str, Any] = {"heads": 32, "key_heads": 8, "head_dim": 128, "itemsize": 2}
    sent = layer_traffic(32768, 8, [512], **shape)
    assert sent.queries_keys == 7 / 8 * (2 * (32 + 8) * 128 + 4)
    assert sent.values == 7 / 8 * (2 * 32 * 128 + 4 * 32)
    assert sent.back == 7 / 8 * 2 * 32 * 128
    assert sent.halo == 7 * 511 * (8 * 128 * 2) * 2 / 32768
    assert sum(layer_traffic(32768, 1, [512], **shape)) == 0


@ranks_and_backends(2, 4)
@every_cost
def test_only_neighbour_exchanges_and_all_to_alls_are_used(
    world_size: int, backend: str, case: Case
) -> None:
    for rank in costs(world_size, backend)[case]:
        for sent in (rank.forward_sent, rank.backward_sent):
            assert sent.count("neighbour") == (1 if case.fold else 0)
            assert sent.count("alltoall_base_") == (3 if case.fold else 2)
            assert len(sent) == (4 if case.fold else 2)


def sent_in_messages_of_their_own(case: Case, sp: int) -> list[tuple[list[str], int]]:
    """Exchanges, forward and backward, and their bytes."""
    with patch.object(collectives, "OWN_MESSAGE", 1):
        with Log() as forward:
            out, cotangent = layer(case, make_row(case, HEAD_DIM), create_grid(sp))
        with Log() as backward:
            out.backward(cotangent)
    return [(log.sent, sum(log.messages)) for log in (forward, backward)]


@ranks_and_backends(2)
def test_large_tensors_have_messages_of_their_own(world_size: int, backend: str) -> None:
    case, halo, swap = COST_CASES[0], "neighbour", "alltoall_base_"
    ranks = run_distributed(
        sent_in_messages_of_their_own, world_size, case, world_size, backend=backend
    )
    for (forward, backward), together in zip(ranks, costs(world_size, backend)[case], strict=True):
        # k, v; q, k, depth; z, lse; z. Backward the same, without depth.
        assert forward == ([halo] * 2 + [swap] * 6, sum(together.forward_messages))
        assert backward == ([swap] * 5 + [halo] * 2, sum(together.backward_messages))


def events_of_a_layer(case: Case, sp: int) -> list[tuple[list[str], list[str], Tensor]]:
    """Events of forward and backward, and output: with the swap overlapping hop 1, and without."""
    row, grid = make_row(case, HEAD_DIM), create_grid(sp)
    results = []
    for overlap in (True, False):
        with Log() as forward:
            out, cotangent = layer(case, row, grid, overlap)
        with Log() as backward:
            out.backward(cotangent)
        results.append((forward.events, backward.events, result(out)))
    return results


@ranks_and_backends(2)
@pytest.mark.parametrize("case", [case for case in COST_CASES if case.fold], ids=str)
def test_the_swap_of_q_and_k_is_under_way_during_hop_1_forward_and_backward(
    world_size: int, backend: str, case: Case
) -> None:
    swap, wait = "alltoall_base_", "wait"
    forward_hop, backward_hop = ["multiply"] * 2, ["multiply"] * 4
    outer_forward, outer_backward = forward_hop * len(case.fold), backward_hop * len(case.fold)
    for overlapped, serial in run_distributed(
        events_of_a_layer, world_size, case, world_size, backend=backend
    ):
        assert overlapped[0] == [
            "neighbour", swap, wait, *forward_hop,  # halo; q, k begin; halo is there; hop 1
            wait, swap, wait, *outer_forward, swap, wait,  # q, k are there; z there; z back
        ]  # fmt: skip
        assert overlapped[1] == [
            swap, wait, *outer_backward, swap, wait,  # z there and back
            swap, *backward_hop, "neighbour", wait, wait,  # q, k begin; hop 1; halo; both are there
        ]  # fmt: skip
        # Otherwise, nothing is under way while hop 1 computes.
        assert serial[0] == [
            "neighbour", swap, wait, wait, *forward_hop, swap, wait, *outer_forward, swap, wait,
        ]  # fmt: skip
        assert serial[1] == [
            swap, wait, *outer_backward, swap, wait, *backward_hop, "neighbour", swap, wait, wait,
        ]  # fmt: skip
        assert torch.equal(overlapped[2], serial[2])


def rows_in_front(case: Case, sp: int) -> float:
    """One inner row per shard, as a share of the row."""
    return sp * case.fold[0] / case.seq_len if case.fold else 0.0


@ranks_and_backends(2, 4)
@every_cost
def test_every_rank_computes_the_same_share(world_size: int, backend: str, case: Case) -> None:
    share = measure(case, 1).flops / world_size
    (flops,) = {rank.flops for rank in costs(world_size, backend)[case]}
    # Hop 1 also computes the inner row in front of each shard, and drops it.
    assert share <= flops <= share * (1 + rows_in_front(case, world_size))


ONE_LONG_DOCUMENT = Case((64, 8), (32768,), heads=1, dtype=torch.float32)


def visited_pairs(case: Case, sp: int) -> int:
    """(query, key) pairs that this rank's hops visit: what kernels compute that skip the rest."""
    total = 0

    def counted(q: Tensor, k: Tensor, values: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        nonlocal total
        reach, state = options["reach"], options.get("state")
        total += int(reach.clamp(max=options["length"] - 1).sum())
        total += reach.numel() if state is None else 0  # the token itself
        return hop(q, k, values, **options)

    patches = (patch.object(module, "hop", counted) for module in (attention, window))
    with next(patches), next(patches), torch.no_grad():
        layer(case, make_row(case, HEAD_DIM), create_grid(sp))
    return total


@ranks_and_backends(2, 4, 8)
def test_ranks_visit_equally_many_pairs_of_one_long_document(world_size: int, backend: str) -> None:
    case = ONE_LONG_DOCUMENT
    ranks = run_distributed(visited_pairs, world_size, case, world_size, backend=backend)
    depth = torch.arange(case.seq_len)
    expected = case.seq_len + sum(
        int((depth // axis.stride).clamp(max=axis.length - 1).sum())
        for axis in fold_axes(case.fold, case.seq_len)
    )
    # The queries in the row in front of each shard see themselves.
    assert sum(ranks) == expected + world_size * case.fold[0]
    assert max(ranks) <= 1.01 * min(ranks)


@ranks_and_backends(2, 4)
@pytest.mark.parametrize("case", [case for case in COST_CASES if case.fold], ids=str)
def test_kept_activations_fall_with_the_number_of_ranks(
    world_size: int, backend: str, case: Case
) -> None:
    share = measure(case, 1).kept_bytes / world_size
    for rank in costs(world_size, backend)[case]:
        assert rank.kept_bytes <= share * (1 + rows_in_front(case, world_size))


def dense_flops(case: Case, sp: int) -> int:
    grid, row = create_grid(sp), make_row(case, HEAD_DIM)
    q, k, v = (x[:, grid.tokens(case.seq_len)].to(device()) for x in (row.q, row.k, row.v))
    with FlopCounterMode(display=False) as counter:
        sharded_tensor_attention(q, k, v, case.fold, grid=grid, backend="dense")
    return counter.get_total_flops()


@ranks_and_backends(2)
@pytest.mark.parametrize("fold", [(8, 2), ()], ids=str)
def test_every_hop_uses_the_chosen_backend(
    world_size: int, backend: str, fold: tuple[int, ...]
) -> None:
    case = Case(fold, (64,), heads=2)
    per_product = 4 * case.heads * HEAD_DIM
    if fold:
        expected = per_product * ((32 + 8) ** 2 + 2 * 32**2)
    else:
        expected = per_product * 64**2 // world_size
    ranks = run_distributed(dense_flops, world_size, case, world_size, backend=backend)
    assert ranks == [expected] * world_size
