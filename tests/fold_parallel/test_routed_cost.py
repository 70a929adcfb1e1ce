"""What a shared window or routed layer sends and when, and what a rank computes and keeps."""

from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fold_parallel import Grid, create_grid, routed_traffic
from fold_parallel import routed as routed_module
from tensor_attention import routed_hop
from tests.fold_parallel.accounting import Log
from tests.fold_parallel.backends import device, ranks_and_backends
from tests.fold_parallel.cases import Case, make_row
from tests.fold_parallel.test_sharded_routed import Shared, attend, routed
from tests.support.distributed import run_distributed

HEAD_DIM = 4
COST_CASES = [
    routed(Case((), (256,), heads=4, key_heads=2), 16, 8, 3, 2, 8),
    routed(Case((), (200, 56), heads=6, batch=2, dtype=torch.float32), 24, 8, 1, 1, 4),
    routed(Case((), (256,), heads=2, key_heads=2, dtype=torch.bfloat16), 160, 16, 1, 4, 2),
    Shared(Case((), (256,), heads=4, key_heads=2), 32),
    Shared(Case((), (100, 156), heads=4, dtype=torch.float32), 200),
]
GATHER, NEIGHBOUR, BACK = "_allgather_base_", "neighbour", "alltoall_base_"


def layer(case: Shared, grid: Grid) -> tuple[Tensor, Tensor]:
    """The output of this rank and the cotangent for it."""
    row, tokens = make_row(case.row, HEAD_DIM), grid.tokens(case.row.seq_len)
    on = device() if grid.sp > 1 else torch.device("cpu")
    q, k, v = (x[:, tokens].to(on).requires_grad_() for x in (row.q, row.k, row.v))
    # This backend's products are visible to `Log` on every device.
    out = attend(case, q, k, v, grid, doc_start=row.doc_start[:, tokens].to(on), backend="blocked")
    return out, row.cotangent[:, tokens].to(on)


def measure(case: Shared, sp: int) -> dict[str, Any]:
    grid = create_grid(sp)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with Log() as forward, saved_tensors_hooks(keep, lambda x: x):
        out, cotangent = layer(case, grid)
    with Log() as backward:
        out.backward(cotangent)
    return {
        "forward": (forward.sent, forward.messages, forward.events),
        "backward": (backward.sent, backward.messages, backward.events),
        "kept": sum(kept.values()),
    }


def measure_all(cases: list[Shared], sp: int) -> list[dict[str, Any]]:
    return [measure(case, sp) for case in cases]


@cache
def costs(world_size: int, backend: str) -> dict[Shared, list[dict[str, Any]]]:
    """For each case, the cost on each rank."""
    ranks = run_distributed(measure_all, world_size, COST_CASES, world_size, backend=backend)
    return {case: [rank[i] for rank in ranks] for i, case in enumerate(COST_CASES)}


every_cost = pytest.mark.parametrize("case", COST_CASES, ids=str)


@ranks_and_backends(2, 4)
@every_cost
def test_bytes_sent_are_those_of_the_formula(world_size: int, backend: str, case: Shared) -> None:
    width: Any = {"key_heads": case.row.key_heads, "head_dim": HEAD_DIM}
    if case.route is not None:
        width |= {"top_k": case.route.top_k, "open_tile": case.route.open_tile}
    for way in ("forward", "backward"):
        expected = routed_traffic(
            case.row.seq_len, world_size, window=case.window, itemsize=case.row.dtype.itemsize,
            backward=way == "backward", **width,
        )  # fmt: skip
        sent = {NEIGHBOUR: 0, GATHER: 0, BACK: 0}
        for rank in costs(world_size, backend)[case]:
            events, messages, _ = rank[way]
            for event, size in zip(events, messages, strict=True):
                sent[event] += size
        gathered = sent[GATHER] + sent[BACK]
        tokens = case.row.batch * case.row.seq_len
        assert sent[NEIGHBOUR] == pytest.approx((expected.halo + expected.choice) * tokens)
        assert gathered == expected.gather * tokens


def test_the_formula_for_one_layer_of_eight_billion_parameters() -> None:
    # 8 key heads of 128 in bfloat16; 131,072 tokens on 8 ranks; a window of 1,024, 16 blocks of 64.
    shape: dict[str, Any] = {"window": 1024, "key_heads": 8, "head_dim": 128, "itemsize": 2}
    sent = routed_traffic(131072, 8, **shape, top_k=16, open_tile=16)
    assert sent.halo == 7 * 1023 * 4096 / 131072
    assert sent.gather == 7 * (4096 + 4)
    assert sent.choice == 7 * 15 * 8 * 17 * 4 / 131072
    assert routed_traffic(131072, 8, **shape)[1:] == (0, 0)
    assert sum(routed_traffic(131072, 1, **shape, top_k=16, open_tile=16)) == 0
    # Windows longer than a slice: rank 1 lacks 16 of its 20 tokens before, rank 2 none.
    assert routed_traffic(48, 3, **(shape | {"window": 21})).halo == (16 + 20) * 4096 / 48


@ranks_and_backends(2)
def test_keys_and_values_travel_during_hop_1_forward_and_backward(
    world_size: int, backend: str
) -> None:
    for rank in costs(world_size, backend)[COST_CASES[0]]:
        forward, backward = (rank[way][2] for way in ("forward", "backward"))
        # k, v begin to travel; the halo is there; hop 1; k, v are there. An open tile's choice.
        assert forward[:6] == [NEIGHBOUR, GATHER, "wait", "multiply", "multiply", "wait"]
        assert [e for e in forward if e != "multiply"][3:] == ["wait", NEIGHBOUR, "wait"]
        # Their gradients begin to travel; hop 1; the halo's gradient; all are there.
        assert backward[-8:] == [BACK, *["multiply"] * 4, NEIGHBOUR, "wait", "wait"]


@ranks_and_backends(2, 4)
def test_window_layers_exchange_with_neighbors_alone(world_size: int, backend: str) -> None:
    for case in COST_CASES[3:]:
        exchanges = min(world_size - 1, -(-(case.window - 1) // (case.row.seq_len // world_size)))
        for rank in costs(world_size, backend)[case]:
            assert rank["forward"][0] == rank["backward"][0] == [NEIGHBOUR] * exchanges


LONG = routed(Case((), (4096,), heads=4, dtype=torch.float32), 64, 16, 2, 4, 16)


@cache
def long_costs(world_size: int, backend: str) -> list[dict[str, Any]]:
    return run_distributed(measure, world_size, LONG, world_size, backend=backend)


def blocks_read(case: Shared, sp: int) -> int:
    """Blocks that the tokens of this rank have chosen: each costs the same."""
    total = 0

    def counted(q: Tensor, k: Tensor, v: Tensor, choice: Tensor, **options: Any) -> Any:
        nonlocal total
        total += int((choice[:, -q.shape[1] :] >= 0).sum())
        return routed_hop(q, k, v, choice, **options)

    with patch.object(routed_module, "routed_hop", counted), torch.no_grad():
        layer(case, create_grid(sp))
    return total


@ranks_and_backends(2, 4)
def test_ranks_read_equally_many_blocks_of_one_long_document(world_size: int, backend: str) -> None:
    assert LONG.route is not None
    ranks = run_distributed(blocks_read, world_size, LONG, world_size, backend=backend)
    far = (torch.arange(LONG.row.seq_len) - LONG.window) // LONG.route.block + 1
    assert sum(ranks) == int(far.clamp(0, LONG.route.top_k + 1).sum())
    # The first tokens of the row have less past.
    assert min(ranks) >= 0.9 * max(ranks)


@ranks_and_backends(2, 4)
def test_kept_activations_fall_with_the_number_of_ranks_but_for_keys_and_values(
    world_size: int, backend: str
) -> None:
    case, (alone,) = LONG.row, long_costs(1, backend)
    # Keys and values of the row, and a copy of both, rotated and in the dtype of products.
    gathered = 4 * case.key_heads * HEAD_DIM * case.dtype.itemsize * case.seq_len
    share = (alone["kept"] - gathered) / world_size
    for rank in long_costs(world_size, backend):
        assert rank["kept"] <= gathered + 1.1 * share
