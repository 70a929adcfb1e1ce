"""The watchdog: a run that no longer moves says where, and ends, instead of burning its hours.

Every rank watches itself: one thread, and the time of its last progress. When one rank stands still
the others soon wait for it. The first that reaches its limit leaves a report in RUN/hang/, the
others follow as soon as they see it, and the lowest rank that still can says which is the odd one.

Time in which the whole process was stopped (`scontrol suspend`, Ctrl-Z, a paused machine) is not
counted: the watching thread counts its own ticks, which do not come while nothing runs.
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
# In the order in which a rank passes them, within one step.
PHASES = ("start", "resume", "data", "forward", "step", "log", "save", "agree", "eval")
_SLOW_PHASES = ("start", "resume", "save", "eval")
_FEWEST_STEPS = 3  # the first ones, of a stage too, compile kernels, open connections
_MEDIANS = 5
_GRACE_SECONDS = 5.0  # a report of another rank takes so long to be written, and to be seen
_LEAD_SECONDS = 1.0  # launchers end all ranks when the first has left
_LATE = 2.0  # a tick that took longer than so many periods counts as one: the process was stopped
_COLLECTIVES = os.path.join("torch", "distributed")


class Watchdog:
    """Ends this process with EXIT_INTERNAL after too long a time without `enter` or `progress`."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        *,
        hang_seconds: float,
        slow_phase_seconds: float,
    ) -> None:
        """`folder` is where the ranks leave their reports.

        A step may take `hang_seconds`, or five medians of the steps before it where that is more;
        start, resume, saves and evaluations may stand still for `slow_phase_seconds`.
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
        if rank == 0:  # reports of an earlier start, perhaps of more ranks, are none of this one
            for path in folder.glob("rank-*.json"):
                path.unlink(missing_ok=True)
        # Two threads, since it is perhaps the disk that does not answer.
        for target in (self._watch, self._look_for_reports):
            threading.Thread(target=target, name="watchdog", daemon=True).start()

    def enter(self, phase: str, step: int) -> None:
        """This rank begins `phase` (one of PHASES) of step `step`."""
        assert phase in PHASES
        self._progress_at = now = self._now()
        if phase == "data":
            if self._phase not in _SLOW_PHASES:
                self._step_seconds.append(now - self._step_began_at)
            self._step_began_at = now
        self._phase, self._step = phase, step

    def expect_other_steps(self) -> None:
        """The steps from now on are not like those before: nothing is known of their time."""
        self._step_seconds.clear()

    def progress(self, part_of_save: str = "save") -> None:
        """A slow phase is no hang: bytes moved, a prompt was answered, a part of a save is done."""
        self._part_of_save = part_of_save
        if self._phase in _SLOW_PHASES:
            self._progress_at = self._now()

    def stop(self) -> None:
        """No more watching."""
        self._is_done.set()

    def limit(self) -> float:
        """Seconds without progress that are too many now."""
        slow = self._phase in _SLOW_PHASES or len(self._step_seconds) < _FEWEST_STEPS
        if slow:
            return max(self._slow_phase_seconds, self._hang_seconds)
        return max(self._hang_seconds, _MEDIANS * statistics.median(self._step_seconds))

    def _now(self) -> float:
        """Seconds on a clock that stands still while this process is stopped."""
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
        """The process was stopped for so long."""
        self._seconds_stopped += seconds
        # The main thread may have been faster, and have read the clock before it was set back.
        now = self._now()
        self._progress_at = min(self._progress_at, now)
        self._step_began_at = min(self._step_began_at, now)

    def _look_for_reports(self) -> None:
        while not self._is_done.wait(self._period) and not self._is_reported.is_set():
            # Before the ranks have met, what is there may be what rank 0 is to remove.
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
        """Those of all ranks that have left one."""
        reports = []
        for path in self._folder.glob("rank-*.json"):
            with contextlib.suppress(OSError):  # removed, but NFS shows it for a while
                reports.append(json.loads(path.read_text()))
        return reports


def _is_waiting() -> bool:
    """The main thread is inside a collective: it waits for another rank (not seen on NCCL, whose
    collectives return at once)."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return _COLLECTIVES in frame.f_code.co_filename


def describe_hang(reports: list[dict[str, Any]], world_size: int, seconds: float) -> str:
    """Which rank stands still, in which phase, and where those are that wait for it.

    It is one that left no report; else one outside a collective while others are inside; else one
    of the fewest that are in the same place; else the last of all.
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
