"""The watchdog: ends a run that hangs, and reports where, so that it wastes no machine time.

Each rank watches itself with a thread and the time of its last progress. When one rank hangs, the
others soon block, waiting for it. The first rank to reach its limit leaves a report in RUN/hang/,
the others add theirs as soon as they see it, and the lowest rank that still runs prints which rank
hangs.

Time during which the whole process was stopped (`scontrol suspend`, Ctrl-Z, a paused machine) does
not count: the watching thread counts its own ticks, and there are none while the process is
stopped.
"""

import contextlib
import faulthandler
import json
import os
import statistics
import sys
import threading
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

from .errors import EXIT_INTERNAL
from .strict_json import json_text

FOLDER = "hang"
# In the order in which a rank passes through them within one step.
PHASES = ("start", "resume", "data", "forward", "step", "log", "save", "agree", "eval")
_SLOW_PHASES = ("start", "resume", "save", "eval")
_FEWEST_STEPS = 3  # the first steps, also of a phase of the run, compile and open connections
_MEDIANS = 5
_GRACE_SECONDS = 5.0  # time for another rank's report to be written and seen
_LEAD_SECONDS = 1.0  # launchers end all ranks when the first has left: let the report come first
_LATE = 2.0  # a tick of more than this many periods counts as one: the process was stopped
_COLLECTIVES = os.path.join("torch", "distributed")


class Watchdog:
    """Ends this process with EXIT_INTERNAL after too long without `enter` or `progress`."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        *,
        hang_seconds: float,
        slow_phase_seconds: float,
    ) -> None:
        """Start watching.

        Args:
            folder: where the ranks leave their reports.
            rank: this rank.
            world_size: number of ranks.
            hang_seconds: limit of a step in seconds, or five times the median of recent steps if
                that is more.
            slow_phase_seconds: limit in seconds without progress in the start, a resume, a save or
                an evaluation.
        """
        self._hang_seconds, self._slow_phase_seconds = hang_seconds, slow_phase_seconds
        self._folder = folder
        self._rank = rank
        self._world_size = world_size
        self._phase, self._step = PHASES[0], 0
        self._part_of_save = "save"
        self._seconds_stopped = 0.0
        self._progress_at = self._step_began_at = self._now()
        self._step_seconds: deque[float] = deque(maxlen=64)
        self._is_done, self._is_reported = threading.Event(), threading.Event()
        self._period = min(1.0, hang_seconds / 10)
        if rank == 0:  # reports of an earlier start, perhaps of more ranks, do not belong to this
            for path in folder.glob("rank-*.json"):
                path.unlink(missing_ok=True)
        # Two threads, since the disk may be what hangs.
        for target in (self._watch, self._look_for_reports):
            threading.Thread(target=target, name="watchdog", daemon=True).start()

    def enter(self, phase: str, step: int) -> None:
        """Record that this rank begins `phase` (one of PHASES) of step `step`."""
        assert phase in PHASES
        self._progress_at = now = self._now()
        if phase == "data":
            if self._phase not in _SLOW_PHASES:
                self._step_seconds.append(now - self._step_began_at)
            self._step_began_at = now
        self._phase, self._step = phase, step

    def expect_other_steps(self) -> None:
        """Forget the times of earlier steps: steps from now on take a different time."""
        self._step_seconds.clear()

    def progress(self, part_of_save: str = "save") -> None:
        """Record progress in a slow phase: bytes moved, a prompt answered, part of a save done."""
        self._part_of_save = part_of_save
        if self._phase in _SLOW_PHASES:
            self._progress_at = self._now()

    def stop(self) -> None:
        """Stop watching."""
        self._is_done.set()

    def limit(self) -> float:
        """Seconds without progress after which the current phase counts as hung."""
        slow = self._phase in _SLOW_PHASES or len(self._step_seconds) < _FEWEST_STEPS
        if slow:
            return max(self._slow_phase_seconds, self._hang_seconds)
        return max(self._hang_seconds, _MEDIANS * statistics.median(self._step_seconds))

    def _now(self) -> float:
        """Seconds on a clock that does not run while this process is stopped."""
        return time.monotonic() - self._seconds_stopped

    def _watch(self) -> None:
        ticked_at = time.monotonic()
        while not self._is_done.wait(self._period):
            tick = time.monotonic() - ticked_at
            ticked_at += tick
            if tick > _LATE * self._period:
                self._set_back(tick - self._period)
            seconds = self._now() - self._progress_at
            if seconds > self.limit() or self._is_reported.is_set():
                self._end(seconds)

    def _set_back(self, seconds: float) -> None:
        """Set the clock back by the time for which the process was stopped."""
        self._seconds_stopped += seconds
        # The main thread may have read the clock before it was set back.
        now = self._now()
        self._progress_at = min(self._progress_at, now)
        self._step_began_at = min(self._step_began_at, now)

    def _look_for_reports(self) -> None:
        while not self._is_done.wait(self._period) and not self._is_reported.is_set():
            # Until the ranks have connected, reports of an earlier start may still be there.
            if self._phase != PHASES[0] and self._reports():
                self._is_reported.set()

    def _end(self, seconds: float) -> None:
        report = threading.Thread(target=self._report, args=(seconds,), daemon=True)
        report.start()
        report.join(2 * _GRACE_SECONDS)
        os._exit(EXIT_INTERNAL)

    def _report(self, seconds: float) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"rank-{self._rank:05d}"
        with open(self._folder / f"{name}.stacks", "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        phase = self._part_of_save if self._phase == "save" else self._phase
        report = {
            "rank": self._rank,
            "phase": phase,
            "step": self._step,
            "waits": _is_waiting(),
            "seconds": seconds,
        }
        # Not with `disk.replace_file`, which waits for the disk: the disk may be what hangs.
        temporary = self._folder / f".{name}"
        temporary.write_text(json_text(report))
        temporary.rename(self._folder / f"{name}.json")
        deadline = time.monotonic() + _GRACE_SECONDS
        while len(reports := self._reports()) < self._world_size and time.monotonic() < deadline:
            time.sleep(self._period)
        if min(r["rank"] for r in reports) == self._rank:
            longest = max(r["seconds"] for r in reports)
            line = describe_hang(reports, self._world_size, longest)
            print(f"error: {line} (stacks: {self._folder})", file=sys.stderr, flush=True)
        else:
            time.sleep(_LEAD_SECONDS)

    def _reports(self) -> list[dict[str, Any]]:
        """The reports that ranks have left."""
        reports = []
        for path in self._folder.glob("rank-*.json"):
            with contextlib.suppress(OSError):  # NFS lists a removed file for a while
                reports.append(json.loads(path.read_text()))
        return reports


def _is_waiting() -> bool:
    """Whether the main thread is blocked in a collective, waiting for another rank.

    Always False with NCCL, whose collectives return at once.
    """
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return _COLLECTIVES in frame.f_code.co_filename


def describe_hang(reports: list[dict[str, Any]], world_size: int, seconds: float) -> str:
    """Describe which rank hangs, in which phase, and where the ranks are that wait for it.

    The hanging rank is one without a report; else one outside a collective while others are in
    one; else one of the smallest group at the same place; else the one furthest behind.
    """
    places = {r["rank"]: (r["step"], PHASES.index(r["phase"])) for r in reports}
    silent = [rank for rank in range(world_size) if rank not in places]
    idle = {r["rank"] for r in reports if r["waits"]}
    suspects = {rank: place for rank, place in places.items() if rank not in idle} or places
    counts = Counter(suspects.values())
    step, phase = min(counts, key=lambda place: (counts[place], place))
    if silent:
        odd, where = silent, "stopped, or stuck in native code"
    else:
        odd = sorted(rank for rank, place in suspects.items() if place == (step, phase))
        where = f'in phase "{PHASES[phase]}" of step {step}'
    text = f"rank {_join(odd)}: no progress for {seconds:.0f} s, {where}"
    others = sorted(places.keys() - set(odd))
    if not others:
        return text
    step, phase = Counter(places[rank] for rank in others).most_common(1)[0][0]
    return f'{text}; rank {_join(others)} in phase "{PHASES[phase]}" of step {step}'


def _join(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"
