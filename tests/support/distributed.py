"""Run a function on several ranks of this machine, over a file store: no ports, no launcher."""

import gc
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import wait as wait_for_end
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # torch.utils.checkpoint would import it in every forked rank: seconds
import torch.distributed as dist


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    backend: str = "gloo",
    time_limit: float = 60.0,
) -> list[Any]:
    """Call `fn(*args)` on `world_size` ranks of a new default group; their results in rank order.

    On gloo, ranks are forked, with one thread each; `fn` may be a closure. On nccl they are forked
    from a server that has imported torch and has never used a GPU, rank r on device r (modulo their
    number), `fn` must be importable, and the time limit is five times as long: kernels are
    compiled. Results travel through torch.save.

    Raises:
        RuntimeError: with rank and traceback, if any rank raised or died.
        TimeoutError: naming the ranks that had not ended, after `time_limit` seconds.
    """
    time_limit *= 5 if backend == "nccl" else 1
    context: Any = multiprocessing.get_context("fork" if backend == "gloo" else "forkserver")
    if backend != "gloo":
        # Asking a GPU whether it is there would make CUDA unusable in the server's children.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        context.set_forkserver_preload([__name__, "triton"])
        # Other tests of this process may have told DeepSpeed to use the CPU.
        with patch.dict(os.environ, DS_ACCELERATOR="cuda"):
            forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks: list[BaseProcess] = [
            context.Process(target=_run_rank, args=(fn, args, rank, world_size, backend, folder))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, folder, time.monotonic() + time_limit)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        return [
            torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(world_size)
        ]


def _wait(ranks: list[BaseProcess], folder: Path, deadline: float) -> None:
    """Return when all ranks have ended well; raise as soon as one has not, or at the deadline."""
    while alive := [process for process in ranks if process.is_alive()]:
        # Ranks that wait for one that has failed would wait for ever.
        if any(process.exitcode not in (None, 0) for process in ranks):
            break
        if time.monotonic() > deadline:
            numbers = [ranks.index(process) for process in alive]
            raise TimeoutError(f"ranks {numbers} of {len(ranks)} did not end in time")
        # A process that a rank has started may keep its sentinel open: look again now and then.
        wait_for_end([process.sentinel for process in alive], 0.2)
    problems = []
    for rank, process in enumerate(ranks):
        report = folder / f"{rank}.error"
        if report.exists():
            problems.append(f"rank {rank} of {len(ranks)}:\n{report.read_text()}")
        elif process.exitcode not in (None, 0):
            problems.append(f"rank {rank} of {len(ranks)} died with exit code {process.exitcode}")
    if problems:
        raise RuntimeError("\n".join(problems))


def _run_rank(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    backend: str,
    folder: Path,
) -> None:
    if backend == "gloo":
        gc.freeze()  # a collection would copy all that the parent has imported
    try:
        torch.set_num_threads(1)
        if backend == "nccl":
            torch.cuda.set_device(rank % torch.cuda.device_count())
        store = dist.FileStore(str(folder / "store"), world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        torch.save(fn(*args), folder / f"{rank}.result")
        # A rank that leaves while another still works can abort it.
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        partial = folder / f"{rank}.partial"
        partial.write_text(traceback.format_exc())
        partial.rename(folder / f"{rank}.error")
        os._exit(1)
    # Forked: leave without the parent's exit handlers.
    os._exit(0)
