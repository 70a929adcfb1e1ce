"""Guards around the steps of a run: against bad steps, corrupted memory and hangs."""

import math
import statistics
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from tensorlm.config import Config
from tensorlm.runtime.errors import UserError
from tensorlm.runtime.watchdog import Watchdog

from .engine import Engine
from .replicas import ParameterChecksums

_DEVIATION_OF_MAD = 1.4826  # standard deviation / MAD (median absolute deviation), if normal


class StepGuard:
    """Judges each step by its loss and gradient norm; its state is part of the checkpoint.

    Only losses of applied steps enter the window, so one bad value cannot mask the next.
    """

    def __init__(self, config: Config) -> None:
        self._config = config.guards
        self._max_skips = config.train.max_skips
        self._losses: deque[float] = deque(maxlen=config.guards.spike_window)
        self._num_skipped = 0  # in a row

    def state(self) -> dict[str, Any]:
        """The state as plain values, for the manifest."""
        return {"losses": list(self._losses), "num_skipped": self._num_skipped}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self._losses.extend(state["losses"])
        self._num_skipped = state["num_skipped"]

    def loss_limit(self) -> float:
        """The largest loss whose step may be applied; without a limit, the largest float."""
        if self._config.spike == "off" or len(self._losses) < self._config.spike_window // 2:
            return sys.float_info.max
        median, deviation = self._center()
        return median + self._config.spike_threshold * deviation

    def judge(
        self, step: int, loss: float, grad_norm: float, documents: Callable[[], list[str]]
    ) -> str | None:
        """Judge step `step` after it was done: None if it was applied, else why it was skipped.

        Raises:
            UserError: the loss is a spike and `guards.spike` is "stop", or `train.max_skips`
                consecutive steps were skipped.
        """
        limit = self.loss_limit()
        if math.isfinite(grad_norm):
            self._losses.append(loss)
            self._num_skipped = 0
            return None
        self._num_skipped += 1
        is_spike = math.isfinite(loss) and loss > limit
        if is_spike:
            median, deviation = self._center()
            reason = (
                f"loss {loss:.4f} is above {limit:.4f} (median {median:.4f}, deviation "
                f"{deviation:.4f})"
            )
        else:
            reason = f"{'loss' if not math.isfinite(loss) else 'gradient'} is not finite"
        reason = f"step {step}: {reason}; documents {', '.join(documents())}"
        if is_spike and self._config.spike == "stop":
            raise UserError(f'{reason} (inspect them, or set guards.spike = "skip")')
        if self._num_skipped >= self._max_skips:
            raise UserError(
                f"{reason}; {self._num_skipped} consecutive steps were skipped "
                "(lower optim.lr, inspect the data, or raise train.max_skips)"
            )
        return reason

    def _center(self) -> tuple[float, float]:
        """Median of the losses, and a robust estimate of their standard deviation."""
        median = statistics.median(self._losses)
        mad = statistics.median(abs(loss - median) for loss in self._losses)
        # If losses hardly vary, any change would be a spike without this minimum.
        return median, max(_DEVIATION_OF_MAD * mad, 1e-3 * abs(median))


class Guards:
    """All checks around the steps: the judge of their losses, checksums and the watchdog."""

    def __init__(self, config: Config, watchdog: Watchdog) -> None:
        self.watchdog = watchdog
        self.step_guard = StepGuard(config)
        self._config = config
        self._checksums = ParameterChecksums(config.guards.replica_every)
        self._step = 0  # the current step, from 1

    def begin_step(self, done: int) -> None:
        """Begin the step after `done` completed steps, with its data."""
        self._step = done + 1
        self.enter("data")
        if done and self._config.phase_at(done - 1) != self._config.phase_at(done):
            self.watchdog.expect_other_steps()

    def enter(self, phase: str) -> None:
        """Record that the step enters `phase`."""
        self.watchdog.enter(phase, self._step)

    def loss_limit(self) -> float:
        """The largest loss whose step may be applied."""
        return self.step_guard.loss_limit()

    def apply_step(self, engine: Engine, lr: float) -> float:
        """Call `engine.step(lr)` after checking that memory is unchanged since the last step.

        Raises:
            MachineError: memory has changed; raised on all ranks, names the ranks concerned.
        """
        self.enter("step")
        self._checksums.check(self._step, engine.kept)
        grad_norm = engine.step(lr)
        self._checksums.remember(self._step, engine.kept)
        return grad_norm

    def judge(self, loss: float, grad_norm: float, documents: Callable[[], list[str]]) -> bool:
        """Return whether the step was skipped; rank 0 prints why.

        Raises:
            UserError: the run must end (`StepGuard.judge`).
        """
        reason = self.step_guard.judge(self._step, loss, grad_norm, documents)
        if reason and dist.get_rank() == 0:
            print(f"skipped {reason}", flush=True)
        return reason is not None
