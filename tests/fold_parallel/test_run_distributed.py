"""The runner of distributed tests returns results, and reports what went wrong."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.support.distributed import run_distributed


def test_results_come_in_rank_order_and_ranks_talk() -> None:
    def body(offset: int) -> tuple[int, float]:
        total = torch.tensor([float(dist.get_rank() + offset)])
        dist.all_reduce(total)
        return dist.get_rank(), total.item()

    assert run_distributed(body, 3, 10) == [(0, 33.0), (1, 33.0), (2, 33.0)]


def test_an_error_names_its_rank_and_shows_its_traceback_while_others_wait() -> None:
    def body() -> None:
        if dist.get_rank() == 1:
            raise KeyError("lost")
        dist.barrier()

    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2:.*in body.*KeyError: 'lost'"):
        run_distributed(body, 2)
    assert time.monotonic() - start < 20


def test_ranks_that_hang_are_named_and_ended() -> None:
    def body() -> None:
        if dist.get_rank() == 0:
            time.sleep(100)

    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2"):
        run_distributed(body, 2, time_limit=1.5)


def test_a_rank_that_dies_is_reported_with_its_exit_code() -> None:
    def body() -> None:
        if dist.get_rank() == 0:
            import os

            os._exit(7)

    with pytest.raises(RuntimeError, match="rank 0 of 2 died with exit code 7"):
        run_distributed(body, 2)


def test_gradients_work_in_forked_ranks_after_the_parent_has_computed_some() -> None:
    x = torch.ones(3, requires_grad=True)
    (x * x).sum().backward()

    def body() -> list[float]:
        y = torch.full((2,), 3.0, requires_grad=True)
        (y * y).sum().backward()
        assert y.grad is not None
        return list(y.grad.tolist())

    assert run_distributed(body, 2) == [[6.0, 6.0]] * 2
