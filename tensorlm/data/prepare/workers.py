"""Running independent tasks on all processes: cores of this machine, MPI ranks.

Each task is done by any free worker, so its result must not depend on the worker. Ranks of `mpirun`
or `srun` are detected and share the tasks.
"""

import ctypes
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_end
from typing import Any, TypeVar

from tensorlm.runtime.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, UserError
from tensorlm.runtime.launch_env import launched_world_size

ValueT = TypeVar("ValueT")
_TICK = 0.5  # seconds between two checks of the progress


class CancelledError(Exception):
    """Ends a task early, because another task has failed."""


class Progress:
    """Counters that all workers of one machine add to."""

    def __init__(self, context: Any) -> None:
        self._counts = context.Array(ctypes.c_int64, 3)
        self._stop = context.Event()

    def add(self, documents: int, tokens: int, num_bytes: int) -> None:
        """Count finished work.

        Raises:
            CancelledError: the work was cancelled.
        """
        if self._stop.is_set():
            raise CancelledError
        with self._counts.get_lock():
            for i, amount in enumerate((documents, tokens, num_bytes)):
                self._counts[i] += amount

    def read(self) -> list[int]:
        """Documents, tokens and bytes so far."""
        return list(self._counts)

    def stop(self) -> None:
        """Make every task end at its next `add`."""
        self._stop.set()


class Ranks:
    """The ranks of `mpirun` or `srun`; one rank without them."""

    def __init__(self) -> None:
        self.rank, self.size, self._world = 0, 1, None
        started = launched_world_size()
        if started == 1:
            return
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise UserError(
                f"ranks: mpi4py is needed for {started} ranks, but cannot be imported: {error} "
                "(apt-get install libopenmpi-dev, pip install mpi4py)"
            ) from None
        self._world = MPI.COMM_WORLD
        self.rank, self.size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
        if self.size != started:
            raise UserError(
                f"ranks: MPI must see all {started} ranks, got {self.size} (use mpirun, or srun "
                "--mpi=pmix)"
            )

    def from_first(self, make: Callable[[], ValueT]) -> ValueT:
        """Call `make` on rank 0; return its result, or raise its error, on every rank."""
        value: Any = None
        error: UserError | None = None
        if self.rank == 0:
            try:
                value = make()
            except UserError as raised:
                error = raised
        if self._world is not None:
            value, problems = self._world.bcast((value, error.problems if error else None))
            error = UserError(*problems) if problems else None
        if error:
            raise error
        return value

    def sum(self, numbers: list[int]) -> list[int]:
        """Sum each number over all ranks."""
        if self._world is None:
            return numbers
        gathered = self._world.allgather(numbers)
        return [sum(column) for column in zip(*gathered, strict=True)]

    def all_problems(self, problems: list[str]) -> list[str]:
        """The problems of all ranks, without repetition."""
        if self._world is not None:
            problems = [problem for part in self._world.allgather(problems) for problem in part]
        return list(dict.fromkeys(problems))

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: Any
    ) -> None:
        """End all ranks on an error of this rank alone: the others would wait for it."""
        if self._world is None or error is None or isinstance(error, UserError):
            return
        if isinstance(error, KeyboardInterrupt):
            self._world.Abort(EXIT_INTERRUPTED)
        traceback.print_exception(error)
        self._world.Abort(EXIT_INTERNAL)


def run_tasks(
    tasks: list[Any],
    work: Callable[[Any, Progress], None],
    ranks: Ranks,
    num_workers: int,
    report: Callable[[list[int]], None],
) -> None:
    """Run every task once, on `num_workers` processes of each rank.

    Args:
        tasks: all tasks, the same list on each rank; rank i % ranks.size runs task i.
        work: module-level function, called with a task and the counters to add to.
        ranks: the ranks that share the tasks.
        num_workers: number of processes of this rank; 1 uses a thread of this process.
        report: called with (documents, tokens, bytes) summed over all ranks, about twice a second.

    Raises:
        UserError: problems of failed tasks; all other tasks are cancelled.
    """
    own = tasks[ranks.rank :: ranks.size]
    if ranks.size > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # other ranks use the other cores
    # A fork server starts clean processes, which inherit no threads or MPI state.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__, "transformers.models.auto"])
    progress = Progress(context)
    executor: Executor
    if num_workers == 1 or len(own) == 1:
        executor = ThreadPoolExecutor(1, initializer=_begin, initargs=(work, progress))
    else:
        executor = ProcessPoolExecutor(
            min(num_workers, max(1, len(own))),
            mp_context=context,
            initializer=_begin_process,
            initargs=(work, progress),
        )
    try:
        futures = [executor.submit(_do, task) for task in own]
        while True:
            started = time.monotonic()
            wait(futures, timeout=_TICK)
            if ranks.size > 1:  # ranks that are done wait without using a core
                time.sleep(max(0.0, _TICK - (time.monotonic() - started)))
            pending = sum(not future.done() for future in futures)
            failed = sum(_has_failed(future) for future in futures)
            *counts, pending, failed = ranks.sum([*progress.read(), pending, failed])
            report(counts)
            if failed or not pending:
                break
    finally:
        progress.stop()
        executor.shutdown(cancel_futures=True)
    problems = ranks.all_problems([line for future in futures for line in _problems(future)])
    if problems:
        raise UserError(*problems)


_worker: tuple[Callable[[Any, Progress], None], Progress] | None = None


def _begin(work: Callable[[Any, Progress], None], progress: Progress) -> None:
    """Set up a worker: shared counters cannot be sent with a task."""
    global _worker
    _worker = (work, progress)


def _begin_process(work: Callable[[Any, Progress], None], progress: Progress) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends the others
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait_for_end([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _begin(work, progress)


def _do(task: Any) -> None:
    assert _worker is not None
    work, progress = _worker
    work(task, progress)


def _has_failed(future: "Future[None]") -> bool:
    return future.done() and not future.cancelled() and future.exception() is not None


def _problems(future: "Future[None]") -> list[str]:
    if not _has_failed(future):
        return []
    error = future.exception()
    if isinstance(error, UserError):
        return list(error.problems)
    if isinstance(error, BrokenProcessPool):
        return [
            "workers: one was killed, possibly because memory ran out (use fewer --workers and run "
            "the same command again; finished shards are kept)"
        ]
    if isinstance(error, CancelledError):
        return []
    assert error is not None
    raise error
