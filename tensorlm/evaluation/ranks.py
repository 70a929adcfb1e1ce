"""Sharing the work of an evaluation among ranks, and putting the results together."""

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.distributed_c10d import _get_default_store
from tqdm import tqdm

from fold_parallel import Grid
from tensorlm.runtime.progress import progress_bar

# They met this rank in an exchange of the pass that failed, and need at most the rest of it.
_PARTNERS_SECONDS = 60.0


def progress(total: int, unit: str, title: str, grid: Grid) -> tqdm:
    """A bar with the time left, on rank 0."""
    return progress_bar(total, unit, title, is_shown=grid.rank == 0)


def sum_over_ranks(values: NDArray[np.floating], device: torch.device) -> NDArray[np.float64]:
    """The sum of all ranks' arrays, on every rank; the array itself where there is one rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return values.astype(np.float64)
    total = torch.from_numpy(values.astype(np.float64)).to(device)
    dist.all_reduce(total)
    return total.cpu().numpy()


class DoesNotFitError(Exception):
    """A rank ran out of memory; every rank raises it."""


class AloneError(DoesNotFitError):
    """This rank alone ran out of memory, and others wait for it inside a pass: that is the end."""


class LeftError(Exception):
    """The evaluation was asked to end between two passes; every rank raises it."""


def compute_and_sum(
    compute: Callable[[], NDArray[np.floating]], device: torch.device, partners: range
) -> NDArray[np.float64]:
    """`compute` on every rank, and the sum of what they found.

    Args:
        compute: what this rank does.
        device: for the exchange of the results.
        partners: the ranks that it meets in exchanges within `compute`, itself among them.

    Raises:
        DoesNotFitError: some rank had too little memory.
        AloneError: it was this one, and its partners cannot be told.
        LeftError: some rank was asked to leave.
    """
    values: NDArray[np.floating] = np.zeros(0)
    failed = left = False
    try:
        values = compute()
    except LeftError:
        left = True
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        failed = True
    if failed and device.type == "cuda":
        torch.cuda.empty_cache()
    if len(partners) > 1:
        arrived = _Arrivals(partners)
        if failed and not arrived.all_within(_PARTNERS_SECONDS):
            raise AloneError
    num_failed, num_left = sum_over_ranks(np.array([float(failed), float(left)]), device)
    if num_left:
        raise LeftError
    if num_failed:
        raise DoesNotFitError
    return sum_over_ranks(values, device)


class LeaveRequest:
    """Asked after each pass of an evaluation in training: is the run to end?

    A request that reached one rank reaches all by way of the store, since ranks make different
    numbers of passes. Those that share a pass also agree on it, so that none begins the next alone.
    """

    def __init__(self, is_asked: Callable[[], bool], device: torch.device, step: int) -> None:
        """`is_asked` is what this rank knows; `step` that of the run."""
        self._is_asked, self._device = is_asked, device
        self._store, self._key = _get_default_store(), f"leave evaluation/{step}"
        self._is_told = False

    def check(self, num_partners: int, group: dist.ProcessGroup | None) -> None:
        """After a pass that `num_partners` ranks shared, those of `group`; collective among them.

        Raises:
            LeftError: on all of them, if any knows of a request.
        """
        if not self._is_told and self._is_asked():
            self._store.set(self._key, "1")
            self._is_told = True
        leaves = self._is_told or self._store.check([self._key])
        if num_partners > 1:
            votes = torch.tensor([float(leaves)], device=self._device)
            dist.all_reduce(votes, dist.ReduceOp.MAX, group=group)
            leaves = bool(votes.item())
        if leaves:
            raise LeftError


class _Arrivals:
    """Which of the partners have computed, told by way of the store: ranks that are still inside an
    exchange cannot take part in another one.
    """

    def __init__(self, partners: range) -> None:
        """This rank has."""
        self._store, self._key = _get_default_store(), f"computed/{partners.start}"
        count = self._store.add(self._key, 1)
        # Nobody is a measurement ahead: each ends with a sum over all ranks.
        self._expected = -(-count // len(partners)) * len(partners)

    def all_within(self, seconds: float) -> bool:
        """Wait for all partners, so long at most."""
        deadline = time.monotonic() + seconds
        while self._store.add(self._key, 0) < self._expected:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True


def _is_out_of_memory(error: BaseException) -> bool:
    """CUDA's own exception, or the message of torch's allocator for CPUs."""
    is_known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return is_known or "DefaultCPUAllocator: can't allocate memory" in str(error)
