"""Sharing the work of an evaluation among ranks, and combining the results."""

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

# Time for partners to finish the pass in which this rank failed.
_PARTNERS_SECONDS = 60.0


def progress(total: int, unit: str, title: str, grid: Grid) -> tqdm:
    """A progress bar with the remaining time, on rank 0."""
    return progress_bar(total, unit, title, is_shown=grid.rank == 0)


def _sum_arrays(values: NDArray[np.floating], device: torch.device) -> NDArray[np.float64]:
    """Sum the arrays of all ranks, on every rank; with one rank, the array itself."""
    if not (dist.is_available() and dist.is_initialized()):
        return values.astype(np.float64)
    total = torch.from_numpy(values.astype(np.float64)).to(device)
    dist.all_reduce(total)
    return total.cpu().numpy()


class DoesNotFitError(Exception):
    """A rank ran out of memory; raised on every rank."""


class AloneError(DoesNotFitError):
    """Only this rank ran out of memory, and others are blocked in a pass with it: the run ends."""


class LeftError(Exception):
    """The evaluation was asked to end between two passes; raised on every rank."""


def compute_and_sum(
    compute: Callable[[], NDArray[np.floating]], device: torch.device, partners: range
) -> NDArray[np.float64]:
    """Run `compute` on every rank, and sum the results.

    Args:
        compute: the work of this rank.
        device: device for exchanging the results.
        partners: the ranks with which `compute` communicates, including this one.

    Raises:
        DoesNotFitError: some rank ran out of memory.
        AloneError: this rank ran out of memory, and its partners are blocked.
        LeftError: some rank was asked to end the evaluation.
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
    num_failed, num_left = _sum_arrays(np.array([float(failed), float(left)]), device)
    if num_left:
        raise LeftError
    if num_failed:
        raise DoesNotFitError
    return _sum_arrays(values, device)


class LeaveRequest:
    """Checks after each pass of an evaluation in training whether the run must end.

    Ranks make different numbers of passes, so a request on one rank reaches the others through the
    store. Ranks that share a pass also agree, so that none begins the next pass alone.
    """

    def __init__(self, is_asked: Callable[[], bool], device: torch.device, step: int) -> None:
        """`is_asked`: whether this rank has a request; `step`: step of the run."""
        self._is_asked, self._device = is_asked, device
        self._store, self._key = _get_default_store(), f"leave evaluation/{step}"
        self._is_told = False

    def check(self, num_partners: int, group: dist.ProcessGroup | None) -> None:
        """Check after a pass shared by the `num_partners` ranks of `group`; collective among them.

        Raises:
            LeftError: on all of them, if any has a request.
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
    """Counts the partners that have finished computing, through the store.

    Ranks that are still inside an exchange cannot take part in another one.
    """

    def __init__(self, partners: range) -> None:
        """Record that this rank has finished."""
        self._store, self._key = _get_default_store(), f"computed/{partners.start}"
        count = self._store.add(self._key, 1)
        # No rank can be a measurement ahead, since each measurement ends with a sum over all ranks.
        self._expected = -(-count // len(partners)) * len(partners)

    def all_within(self, seconds: float) -> bool:
        """Wait for all partners for at most `seconds`; returns whether they have finished."""
        deadline = time.monotonic() + seconds
        while self._store.add(self._key, 0) < self._expected:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether it is CUDA's exception, or has the message of torch's CPU allocator."""
    is_known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return is_known or "DefaultCPUAllocator: can't allocate memory" in str(error)
