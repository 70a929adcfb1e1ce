"""Costs of an evaluation, and the lengths that did not fit, with lengths that would."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from tensorlm.runtime.errors import UserError

from .ranks import AloneError, DoesNotFitError
from .results import Cost

_USABLE = 0.95  # usable share of the memory beside the weights; fragmentation takes the rest


class Limits:
    """Collects costs, lengths that need too much memory, and lengths too short for a prompt."""

    def __init__(self, device: torch.device) -> None:
        self.problems: list[str] = []
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._weights = torch.cuda.memory_allocated(device) if self._is_cuda else 0
        self._costs: dict[tuple[str, int], tuple[float, int]] = {}  # seconds, bytes at the peak
        self._without_room: dict[int, list[str]] = {}
        self._left_out: list[str] = []

    @contextmanager
    def trying(self, what: str, length: int) -> Iterator[None]:
        """Context for measuring `what` at `length`; records a problem if memory runs out.

        Raises:
            UserError: only this rank ran out of memory, in a pass that it shares with others.
        """
        started = time.perf_counter()
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        try:
            yield
        except AloneError:
            raise UserError(
                self._problem(what, length, f" of rank {dist.get_rank()} only")
            ) from None
        except DoesNotFitError:
            problem = self._problem(what, length)
            if problem not in self.problems:
                self.problems.append(problem)
        else:
            peak = torch.cuda.max_memory_allocated(self._device) if self._is_cuda else 0
            seconds, before = self._costs.get((what, length), (0.0, 0))
            seconds += time.perf_counter() - started
            self._costs[what, length] = (seconds, max(before, peak))

    def costs(self) -> list[Cost]:
        """Seconds and memory of all measurements."""
        return [
            Cost(
                what=what,
                length=length,
                seconds=round(seconds, 2),
                memory_gib=round(peak / 2**30, 2) if self._is_cuda else None,
            )
            for (what, length), (seconds, peak) in self._costs.items()
        ]

    def too_short(self, length: int, task: str) -> None:
        """Record that even the shortest prompt of `task` does not fit into `length` tokens."""
        self._without_room.setdefault(length, []).append(task)

    def left_out(self, length: int, task: str, count: int, total: int) -> None:
        """Record that `count` of the `total` prompts of `task` do not fit into `length` tokens."""
        if count:
            self._left_out.append(
                f"{task} at {length} tokens: {count} of {total} prompts were skipped, because they "
                "do not fit even without filler; the score is the mean of the others"
            )

    def notes(self) -> list[str]:
        """One line for each length at which some or all prompts do not fit."""
        without = [
            f"{length} tokens are too few for the prompts of: {', '.join(tasks)}"
            for length, tasks in self._without_room.items()
        ]
        return [*without, *self._left_out]

    def _problem(self, what: str, length: int, where: str = "") -> str:
        return (
            f"eval.lengths: {what} at {length} tokens does not fit into {self._memory()}{where} "
            f"({self._advice(what, length)})"
        )

    def _memory(self) -> str:
        if not self._is_cuda:
            return "memory"
        properties = torch.cuda.get_device_properties(self._device)
        return f"the {properties.total_memory / 2**30:.1f} GiB of {properties.name}"

    def _advice(self, what: str, length: int) -> str:
        measured = [(n, peak) for (name, n), (_, peak) in self._costs.items() if name == what]
        if not measured:
            return f"try {length // 2}"
        fitted, peak = max(measured)
        if peak <= self._weights:
            return f"{fitted} fits"
        total = torch.cuda.get_device_properties(self._device).total_memory
        room = (total - self._weights) * _USABLE / (peak - self._weights) * fitted
        return f"about {max(fitted, min(int(room), length - 1) // 1024 * 1024)} should fit"
