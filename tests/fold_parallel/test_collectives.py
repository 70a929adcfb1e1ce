"""Exchanges carry exact integers, forward and backward, whatever the dtypes of one message."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fold_parallel.collectives import start_all_to_all, start_halo
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
@pytest.mark.parametrize("halo", [1, 4, 5])
def test_halo_brings_the_tokens_before_and_takes_their_gradient_back(
    world_size: int, backend: str, halo: int
) -> None:
    results = run_distributed(exchange_halo, world_size, 5, halo, backend=backend)
    for rank, r in enumerate(results):
        for name in ("x", "y"):
            if rank == 0:
                assert (r[f"halo_{name}"] == 0).all()
            else:
                assert torch.equal(r[f"halo_{name}"][0], results[rank - 1][name][:, -halo:])
        dx, dy = torch.full_like(r["x"], 1000), torch.zeros_like(r["y"])
        if rank + 1 < world_size:
            place = torch.arange(2 * halo * 3).reshape(2, halo, 3) + 3
            dx[:, -halo:] += place % 50 + 50 * (rank + 1)
            dy[:, -halo:] += 1
        assert torch.equal(r["dx"], dx)
        assert torch.equal(r["dy"], dy)


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
