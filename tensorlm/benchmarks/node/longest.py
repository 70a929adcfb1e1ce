"""Part `longest`: one step on the longest row that fits, with activations in host memory.

Every second layer keeps its input: all of them would take more host memory than these hosts have,
and more time to pin than to find again.
"""

from collections.abc import Iterator

from tensorlm.plan.gpus import GIB
from tensorlm.plan.host import host_memory, offloaded_activations
from tensorlm.plan.job import CUDA, plan_jobs
from tensorlm.plan.memory import gpu_memory
from tensorlm.plan.speed import step_time

from .host import Host
from .training import START_SECONDS, Case, Row, run_case

LENGTHS = (1_048_576, 917_504, 786_432, 524_288, 262_144)
# Measured on two H200 (docs/performance.md): bytes/s of each of two ranks that pin memory at once;
# and the seconds of a step with fresh weights and shared rows, by those that the plan predicts.
_PINNING = 0.9e9
_FRESH = 1.65


def measure(host: Host) -> Iterator[Row]:
    """Train one step on the first of `LENGTHS` that fits by the plan; say why others do not."""
    for tokens in LENGTHS:
        stretch = f"model.route.stretch={max(16, 128 * tokens // LENGTHS[0])}"
        settings = ("train.activation_offload=true", "train.recompute_interval=2", stretch)
        case = Case(host.ranks, 3, host.ranks, (host.length(tokens),), settings)
        problem = why_not(host, case)
        if problem is None:
            yield from run_case(host, case, [1], "torchrun")  # starts faster than deepspeed
            return
        yield {"run": case.words(case.lengths[0]), "exit": problem}


def why_not(host: Host, case: Case) -> str | None:
    """Why the plan rejects a case, or None if it fits into memory and into the time left."""
    config = host.config(host.settings(case.name, *case.settings([1])))
    job = plan_jobs(config, case.ranks, CUDA)[-1]
    needed, available = host_memory(job).needed * case.ranks, host.host_memory
    if needed > available:
        return f"needs {needed / GIB:.0f} GiB of host memory, of {available / GIB:.0f}"
    needed, sheet = gpu_memory(job).needed, host.sheet
    if sheet and needed > sheet.memory:
        return f"needs {needed / GIB:.0f} GiB on each GPU, of {sheet.memory / GIB:.0f}"
    if sheet:
        pinning = offloaded_activations(job) / _PINNING
        seconds = START_SECONDS + pinning + _FRESH * step_time(job, sheet).seconds
        if seconds > host.seconds_left:
            return f"needs {seconds:.0f} s, of {host.seconds_left:.0f} left"
    return None
