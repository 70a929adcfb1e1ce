"""Guards of a run: bad steps, replicas, data and disk, and two jobs in one folder."""

import math
import shutil
import statistics
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tensorlm.checkpoint import gather_json
from tensorlm.config import Config
from tensorlm.data.loader import PackedRows
from tensorlm.runtime import disk
from tensorlm.runtime.errors import MachineError, UserError
from tensorlm.runtime.lock import PATIENCE_SECONDS, take_lock
from tensorlm.runtime.progress import byte_bar

_DEVIATION_OF_MAD = 1.4826  # standard deviation of a normal distribution, in its MADs
_LOCK = "lock"
_LOCK_PATIENCE_SECONDS = PATIENCE_SECONDS


class StepGuard:
    """Judges each step by its loss and gradient norm; its state is part of the checkpoint.

    Only losses of applied steps enter the window, so that one bad value cannot hide the next.
    """

    def __init__(self, config: Config) -> None:
        self._config = config.guards
        self._max_skips = config.train.max_skips
        self._losses: deque[float] = deque(maxlen=config.guards.spike_window)
        self._num_skipped = 0  # in a row

    def state(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return {"losses": list(self._losses), "num_skipped": self._num_skipped}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self._losses.extend(state["losses"])
        self._num_skipped = state["num_skipped"]

    def loss_limit(self) -> float:
        """The largest loss whose step may be applied; any finite one where there is no other."""
        if self._config.spike == "off" or len(self._losses) < self._config.spike_window // 2:
            return sys.float_info.max
        median, deviation = self._centre()
        return median + self._config.spike_threshold * deviation

    def judge(
        self, step: int, loss: float, grad_norm: float, documents: Callable[[], list[str]]
    ) -> str | None:
        """After step `step`: None where it was applied, else why it was skipped.

        Raises:
            UserError: `guards.spike` is "stop" and the loss jumped, or too many skips in a row.
        """
        limit = self.loss_limit()
        if math.isfinite(grad_norm):
            self._losses.append(loss)
            self._num_skipped = 0
            return None
        self._num_skipped += 1
        is_spike = math.isfinite(loss) and loss > limit
        if is_spike:
            median, deviation = self._centre()
            reason = f"loss {loss:.4f} is above {limit:.4f} (median {median:.4f}, {deviation:.4f})"
        else:
            reason = f"{'loss' if not math.isfinite(loss) else 'gradient'} is not finite"
        reason = f"step {step}: {reason}; documents {', '.join(documents())}"
        if is_spike and self._config.spike == "stop":
            raise UserError(f'{reason} (look at them, or set guards.spike = "skip")')
        if self._num_skipped >= self._max_skips:
            raise UserError(
                f"{reason}; {self._num_skipped} steps in a row were skipped "
                "(lower optim.lr, or look at the data; train.max_skips)"
            )
        return reason

    def _centre(self) -> tuple[float, float]:
        """Median, and a deviation that outliers do not move."""
        median = statistics.median(self._losses)
        mad = statistics.median(abs(loss - median) for loss in self._losses)
        # Of losses that hardly move, any change would be a spike.
        return median, max(_DEVIATION_OF_MAD * mad, 1e-3 * abs(median))


def check_replicas(replicas: dict[str, Tensor], step: int) -> None:
    """All ranks hold the same bits of `replicas`; costs one pass over them and one small gather.

    Raises:
        MachineError: on all ranks, naming those that differ from the majority.
    """
    if not replicas or dist.get_world_size() == 1:
        return
    sums = _bit_sums(replicas)
    gathered = [torch.empty_like(sums) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, sums)
    table = torch.stack(gathered).cpu()
    is_odd = table != table.mode(dim=0).values
    if not is_odd.any():
        return
    name = list(replicas)[int(is_odd.any(dim=0).nonzero()[0])]
    odd = is_odd.any(dim=1).nonzero().flatten().tolist()
    if len(odd) * 2 >= len(table):  # no majority says which of them is right
        odd = list(range(len(table)))
    raise MachineError(
        f"rank {', '.join(map(str, odd))}: step {step}: weights differ between ranks, first in "
        f"{name} (suspect that device)"
    )


class MemoryGuard:
    """What a rank keeps from one step to the next must not change in between.

    That is all that can be compared where no other rank holds the same, as at ZeRO stages 1 to 3.
    """

    def __init__(self, every: int) -> None:
        """`every`: steps between two that are guarded; 0: none is."""
        self._every = every
        self._sums: Tensor | None = None

    def remember(self, step: int, kept: Callable[[], dict[str, Tensor]]) -> None:
        """Right after step `step`, if the next one is to be guarded; costs a pass over `kept`."""
        is_next_guarded = self._every and (step + 1) % self._every == 0
        self._sums = _bit_sums(kept()) if is_next_guarded else None

    def check(self, step: int, kept: Callable[[], dict[str, Tensor]]) -> None:
        """Just before step `step` is applied: nothing has changed since `remember`; collective.

        Raises:
            MachineError: on all ranks, naming those on which something has.
        """
        if self._sums is None:
            return
        tensors = kept()
        changed = (_bit_sums(tensors) != self._sums).nonzero().flatten().tolist()
        found = gather_json([list(tensors)[index] for index in changed[:1]])
        odd = [rank for rank, names in enumerate(found) if names]
        if odd:
            raise MachineError(
                f"rank {', '.join(map(str, odd))}: step {step}: {found[odd[0]][0]} changed in "
                f"memory since step {step - 1} (suspect that device; if there is a checkpoint of "
                f"step {step - 1}, it may hold the change)"
            )


def _bit_sums(tensors: dict[str, Tensor]) -> Tensor:
    """[N] int64, where the first tensor is: the sum of each one's bit patterns, as integers.

    Any one flipped bit changes it.
    """
    sums = []
    for tensor in tensors.values():
        flat = tensor.detach().reshape(-1)
        words = 8 // flat.element_size()
        if flat.numel() % words or flat.storage_offset() % words:
            bits = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[flat.element_size()])
        else:
            bits = flat.view(torch.int64)  # many times faster on a CPU
        sums.append(bits.sum(dtype=torch.int64))
    return torch.stack([total.to(sums[0].device) for total in sums])


def check_data(rows: PackedRows, rank: int, world_size: int, progress: Callable[[], None]) -> None:
    """Every byte of the data is as it was written; each rank reads its share of the files.

    Raises:
        UserError: on all ranks, a line for each file that differs.
    """
    entries = [
        (entry, corpus.folder / name)
        for corpus in rows.corpora
        for shard in corpus.shards
        for name, entry in shard.header.files.items()
    ]
    entries.sort(key=lambda item: item[0].bytes)  # equal shares
    share, bad = entries[rank::world_size], []
    total = sum(entry.bytes for entry, _ in share)
    with byte_bar(total, "verify data", is_shown=rank == 0) as show:

        def moved(num_bytes: int) -> None:
            show(num_bytes)
            progress()

        for entry, path in share:
            try:
                _, sha256 = disk.file_sha256(path.resolve(), moved)
                problem = "" if sha256 == entry.sha256 else "checksum differs"
            except OSError as error:
                problem = f"cannot be read: {error.strerror}"
            if problem:
                bad.append(f"{path}: {problem} (restore the file, or prepare the data again)")
    bad = [line for part in gather_json(bad) for line in part]
    if bad:
        raise UserError(*bad)


def lock_run(run_dir: Path) -> int:
    """Make this process the one that writes to a run; ends with the process, however it ends.

    Returns:
        The descriptor that holds the lock.

    Raises:
        UserError: another job, or another process of this one, holds it, or the folder cannot be
            written.
    """
    try:
        disk.make_folder(run_dir)
        return take_lock(run_dir / _LOCK, f"run.dir: {run_dir}", _LOCK_PATIENCE_SECONDS)
    except OSError as error:
        raise UserError(f"run.dir: {error.filename or run_dir}: {error.strerror}") from None


def check_disk_space(run_dir: Path, num_bytes: int, num_kept: int) -> None:
    """A checkpoint of `num_bytes` fits; a warning where not all that will be kept do.

    Raises:
        UserError: it does not fit.
    """
    free = shutil.disk_usage(run_dir).free
    if free < num_bytes:
        raise UserError(
            f"run.dir: {free / 2**30:.2f} GiB are free, one checkpoint takes "
            f"{num_bytes / 2**30:.2f} GiB (free some, or choose another run.dir)"
        )
    if free < num_bytes * (num_kept + 1):
        print(
            f"warning: {run_dir}: {free / 2**30:.2f} GiB are free, {num_kept} checkpoints and one "
            f"in the making take {num_bytes * (num_kept + 1) / 2**30:.2f} GiB",
            flush=True,
        )
