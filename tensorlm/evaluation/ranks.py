"""Sharing the work of an evaluation among ranks, and putting the results together."""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from tqdm import tqdm

from fold_parallel import Grid
from tensorlm.progress import progress_bar


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


def compute_and_sum(
    compute: Callable[[], NDArray[np.floating]], device: torch.device
) -> NDArray[np.float64]:
    """`compute` on every rank, and the sum of what they found.

    Raises:
        DoesNotFitError: some rank had too little memory.
    """
    values: NDArray[np.floating] = np.zeros(0)
    failed = False
    try:
        values = compute()
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        failed = True
    if failed and device.type == "cuda":
        torch.cuda.empty_cache()
    if sum_over_ranks(np.array([float(failed)]), device)[0]:
        raise DoesNotFitError
    return sum_over_ranks(values, device)


def _is_out_of_memory(error: BaseException) -> bool:
    """CUDA's own exception, or the message of torch's allocator for CPUs."""
    is_known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return is_known or "DefaultCPUAllocator: can't allocate memory" in str(error)
