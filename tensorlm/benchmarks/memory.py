"""Predicted and measured memory and time of real training steps, with one process per point.

A point is a configuration. Its steps are those of `train.py`: the model, DeepSpeed and AdamW, on
random tokens with one document per row. On a GPU, the peak is that of PyTorch's allocator. On a
CPU, every tensor is counted. There the attention operator is counted separately, since the CPU path
has other temporary tensors than the Triton kernels that the formulas describe.
"""

import gc
import resource
import statistics
import time
from contextlib import nullcontext
from typing import NamedTuple

import torch

from fold_parallel import Grid, create_grid
from tensorlm.config import Config, LayerKind
from tensorlm.model.attention import Attention
from tensorlm.model.flops import find_board
from tensorlm.model.layers import rotary_table
from tensorlm.plan.gpus import GPUS, Gpu
from tensorlm.plan.host import host_memory
from tensorlm.plan.job import CUDA, Job, Platform, plan_jobs
from tensorlm.plan.memory import gpu_memory
from tensorlm.plan.operator import OperatorMemory, kept_choice
from tensorlm.plan.speed import step_time
from tensorlm.runtime.launch_env import LaunchEnv
from tensorlm.train.engine import Engine, create_model, init_distributed
from tensorlm.train.recompute import choose_recompute

from .accounting import PeakMemory

CPU = Platform(is_gpu=False, fused_adam=False, library_workspace=0)
_LEARNING_RATE = 1e-5


class Measurement(NamedTuple):
    """Bytes and seconds of one point; predictions are of `allocated` and `seconds`."""

    device: str
    predicted: int
    predicted_phases: dict[str, int]  # by name, as in plan/memory.py
    allocated: int
    reserved: int  # 0 on a CPU
    start: int  # peak before the first step,
    passes: int  # peak of forward and backward passes,
    update: int  # and peak of updates
    predicted_seconds: float | None  # None on a device that is not in plan/gpus.py
    seconds: float
    predicted_host: int
    host: int  # peak resident memory of the process


class _Meter:
    """Peak memory of tensors on this device since the last `restart`."""

    def __init__(self, device: torch.device) -> None:
        self.counter = PeakMemory() if device.type == "cpu" else None

    def restart(self) -> None:
        if self.counter is None:
            torch.cuda.reset_peak_memory_stats()
        else:
            self.counter.restart()

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.counter is None else self.counter.peak


def measure(config: Config, launch: LaunchEnv, steps: int) -> Measurement:
    """Train `steps` optimizer steps of the last phase (at least 2; the first is not timed).

    Raises:
        RuntimeError: a step was not applied.
        torch.OutOfMemoryError: memory ran out.
    """
    device = init_distributed(launch)
    config = choose_recompute(config, launch, device)
    job = plan_jobs(config, launch.world_size, CUDA if device.type == "cuda" else CPU)[-1]
    operators = None
    if device.type == "cpu":
        operators = {kind: count_operator(job, kind) for kind in set(job.kinds)}
    predicted = gpu_memory(job, operators)
    meter = _Meter(device)
    with meter.counter or nullcontext():
        grid = create_grid(config.parallel.sp)
        # Use PyTorch's initial weights: `init_weights` of 8 B parameters takes many seconds.
        engine = Engine(create_model(config, grid, device, None), config)
        gc.collect()
        list(engine.parameter_slices())  # creates AdamW's state, like a resumed run
        start = meter.peak
        done = [_step(engine, job, grid, device, meter) for _ in range(steps)]
    seconds, passes, updates = zip(*done, strict=True)
    is_gpu = device.type == "cuda"
    gpu = find_sheet(torch.cuda.get_device_name(device)) if is_gpu else None
    return Measurement(
        device=torch.cuda.get_device_name(device) if is_gpu else "CPU",
        predicted=predicted.allocated,
        predicted_phases={snapshot.name: snapshot.total for snapshot in predicted.snapshots},
        allocated=max(start, *passes, *updates),
        reserved=torch.cuda.max_memory_reserved() if is_gpu else 0,
        start=start,
        passes=max(passes),
        update=max(updates),
        predicted_seconds=step_time(job, gpu).seconds if gpu else None,
        seconds=statistics.median(seconds[1:]),
        predicted_host=host_memory(job).needed,
        host=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def find_sheet(device_name: str) -> Gpu | None:
    """The data sheet of the device that PyTorch calls `device_name`, or None."""
    board = find_board(device_name)
    return next((gpu for gpu in GPUS.values() if gpu.name == board), None)


def _step(
    engine: Engine, job: Job, grid: Grid, device: torch.device, meter: _Meter
) -> tuple[float, int, int]:
    """Do one optimizer step; returns its seconds, and the peaks of its passes and its update."""
    meter.restart()
    rows, length = job.phase.micro_batch, job.phase.seq_len // job.sp
    vocab_size = job.config.model.vocab_size
    started = time.perf_counter()
    for _ in range(job.micro_batches):
        tokens = torch.randint(vocab_size, (rows, length), device=device)
        doc_start = torch.zeros_like(tokens, dtype=torch.int32)
        loss = engine.forward(tokens, doc_start, tokens)
        engine.backward(loss * (grid.world_size / (tokens.numel() * job.micro_batches)))
        del loss
    passes = meter.peak
    meter.restart()
    norm = engine.step(_LEARNING_RATE)  # waits for the device
    if norm != norm:
        raise RuntimeError("the step was not applied: its gradients are not finite")
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, passes, meter.peak


def count_operator(job: Job, kind: LayerKind) -> OperatorMemory:
    """Count `plan.operator.operator_memory` for the operator that runs on this machine."""
    model, phase = job.config.model, job.phase
    dtype = torch.bfloat16 if job.itemsize == 2 else torch.float32
    shape = (phase.micro_batch, phase.seq_len)
    rotary = rotary_table(model, phase.seq_len, torch.device("cpu"))
    layer = Attention(model, job.kinds.index(kind), Grid(), job.config.train.attention).to(dtype)
    with PeakMemory() as memory:
        q, k, v = (
            torch.zeros(*shape, heads, model.head_size, dtype=dtype, requires_grad=True)
            for heads in (model.num_heads, model.num_kv_heads, model.num_kv_heads)
        )
        doc_start = torch.zeros(shape, dtype=torch.int32)
        given = doc_start.nbytes
        out = layer.attend(q, k, v, doc_start, rotary)
        saved, forward = memory.live - given, memory.peak - given
        gradient = torch.zeros_like(out)
        memory.restart()
        out.backward(gradient)
        kept = kept_choice(job) if kind == "routed" else 0
        return OperatorMemory(saved, memory.peak - given - saved, forward, kept)
