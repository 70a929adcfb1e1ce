"""Exchanges carry exact integers, forward and backward, whatever the dtypes of one message."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fold_parallel.collectives import start_all_to_all, start_gather, start_halo
from tests.fold_parallel.backends import device, ranks_and_backends, result
from tests.support.distributed import run_distributed


def numbers(shape: tuple[int, ...], rank: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
    """Integers that tell rank and place apart; below 256, so exact in bfloat16."""
    count = torch.Size(shape).numel()
    values = (torch.arange(count) + offset) % 50 + 50 * rank
    return values.reshape(shape).to(device=device(), dtype=dtype)


def exchange_all(dtypes: list[torch.dtype]) -> list[tuple[Tensor, Tensor | None]]:
    """Received chunks and the gradients of sent ones; cotangents are `numbers` plus 7."""
    rank, world = dist.get_rank(), dist.get_world_size()
    # An odd trailing size, so that sections do not align by chance.
    sent = [numbers((world, 3, i + 1), rank, dtype) for i, dtype in enumerate(dtypes)]
    for x in sent:
        x.requires_grad_(x.is_floating_point())
    received = start_all_to_all([x.movedim(1, 2).movedim(2, 1) for x in sent], group()).wait()
    floating = [x for x in received if x.requires_grad]
    cotangents = [numbers(tuple(x.shape), rank, x.dtype, offset=7) for x in floating]
    torch.autograd.backward(floating, cotangents)
    return [(result(r), None if s.grad is None else result(s.grad))
            for r, s in zip(received, sent, strict=True)]  # fmt: skip


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


DTYPES = [
    [torch.float32],
    [torch.bfloat16, torch.float32, torch.int32],
    [torch.int32, torch.float64, torch.bfloat16, torch.float64],
]


@ranks_and_backends(2, 4)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_all_to_all_moves_chunk_r_to_rank_r_and_its_gradient_back(
    world_size: int, backend: str, dtypes: list[torch.dtype]
) -> None:
    results = run_distributed(exchange_all, world_size, dtypes, backend=backend)
    for rank, tensors in enumerate(results):
        for i, (received, gradient) in enumerate(tensors):
            chunk = 3 * (i + 1)
            assert received.dtype == dtypes[i]
            assert (gradient is not None) == dtypes[i].is_floating_point
            for other in range(world_size):
                place = torch.arange(chunk) + rank * chunk
                assert received[other].flatten().tolist() == (place % 50 + 50 * other).tolist()
                if gradient is not None:
                    expected = (place + 7) % 50 + 50 * other
                    assert gradient[other].flatten().tolist() == expected.tolist()


def exchange_halo(tokens: int, halo: int) -> dict[str, Tensor]:
    rank = dist.get_rank()
    x = numbers((2, tokens, 3), rank, torch.float64).requires_grad_()
    y = numbers((2, tokens), rank, torch.bfloat16, offset=9).requires_grad_()
    halo_x, halo_y = start_halo((x, y), halo, group()).wait()
    # The tensors are also used where they are: both gradients must arrive.
    loss = (halo_x * numbers(tuple(halo_x.shape), rank, x.dtype, offset=3)).sum()
    loss = loss + halo_y.sum() + 1000 * x.sum()
    loss.backward()
    results = {"x": x, "y": y, "halo_x": halo_x, "halo_y": halo_y, "dx": x.grad, "dy": y.grad}
    return {name: result(z) for name, z in results.items() if z is not None}


@ranks_and_backends(2, 4)
@pytest.mark.parametrize("halo", [1, 4, 5, 7, 13, 20])
def test_halo_brings_the_tokens_before_and_takes_their_gradient_back(
    world_size: int, backend: str, halo: int
) -> None:
    tokens = 5
    results = run_distributed(exchange_halo, world_size, tokens, halo, backend=backend)
    halo = min(halo, tokens * (world_size - 1))  # of all other ranks
    rows = {name: torch.cat([r[name] for r in results], dim=1) for name in ("x", "y")}
    gradients = {"x": torch.full_like(rows["x"], 1000), "y": torch.zeros_like(rows["y"])}
    for rank, r in enumerate(results):
        known = min(halo, rank * tokens)
        before = slice(rank * tokens - known, rank * tokens)
        for name, row in rows.items():
            assert torch.equal(r[f"halo_{name}"][:, halo - known :], row[:, before])
            assert (r[f"halo_{name}"][:, : halo - known] == 0).all()
        place = torch.arange(2 * halo * 3).reshape(2, halo, 3) + 3
        gradients["x"][:, before] += (place % 50 + 50 * rank)[:, halo - known :]
        gradients["y"][:, before] += 1
    for name, expected in gradients.items():
        assert torch.equal(torch.cat([r[f"d{name}"] for r in results], dim=1), expected)


def gather_row(tokens: int, dtype: torch.dtype) -> dict[str, Tensor]:
    rank = dist.get_rank()
    x = numbers((2, tokens, 3), rank, dtype).requires_grad_()
    places = numbers((2, tokens), rank, torch.int32)
    row, row_of_places = start_gather((x, places), group()).wait()
    # Gradients that bf16 cannot add up one by one: 256 + 1 = 256.
    (row * torch.where(torch.tensor(rank == 0), 256, 1)).sum().backward()
    assert x.grad is not None
    results = {"x": x, "places": places, "row": row, "row_of_places": row_of_places, "dx": x.grad}
    return {name: result(z) for name, z in results.items()}


@ranks_and_backends(2, 4)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_gather_brings_the_row_and_adds_up_what_all_ranks_give_back(
    world_size: int, backend: str, dtype: torch.dtype
) -> None:
    results = run_distributed(gather_row, world_size, 5, dtype, backend=backend)
    for name in ("x", "places"):
        row = torch.cat([r[name] for r in results], dim=1)
        for r in results:
            assert torch.equal(r["row" if name == "x" else "row_of_places"], row)
    # Added in float32 and rounded once.
    total = torch.tensor(256.0 + world_size - 1).to(dtype)
    for r in results:
        assert (r["dx"] == total).all()


def two_under_way() -> tuple[Tensor, Tensor, Tensor]:
    rank, world = dist.get_rank(), dist.get_world_size()
    x = numbers((world, 4), rank, torch.float32).requires_grad_()
    first = start_all_to_all([x], group())
    second = start_all_to_all([x + 1], group())
    (b,) = second.wait()
    (a,) = first.wait()
    (gradient,) = torch.autograd.grad((a * 2 + b * 3).sum(), x)
    return result(a), result(b), result(gradient)


@ranks_and_backends(2)
def test_exchanges_may_be_under_way_together_and_end_in_any_order(
    world_size: int, backend: str
) -> None:
    for a, b, gradient in run_distributed(two_under_way, world_size, backend=backend):
        assert torch.equal(a + 1, b)
        assert torch.equal(gradient, torch.full_like(gradient, 5))


def unused_output() -> list[Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    x, y = (numbers((world, 4), rank, torch.float32).requires_grad_() for _ in range(2))
    used, _ = start_all_to_all([x, y], group()).wait()
    used.sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    return [result(x.grad), result(y.grad)]


@ranks_and_backends(2)
def test_a_tensor_that_nobody_used_gets_a_zero_gradient(world_size: int, backend: str) -> None:
    for used, unused in run_distributed(unused_output, world_size, backend=backend):
        assert (used == 1).all()
        assert (unused == 0).all()
