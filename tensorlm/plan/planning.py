"""The plan: whether a configuration fits these GPUs, with what margin, and the longest row."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from tensorlm.config import Config, parse_config
from tensorlm.runtime.errors import UserError

from .gpus import Gpu
from .host import HostMemory, host_memory
from .job import Job, plan_jobs
from .memory import GpuMemory, evaluation_memory, gpu_memory, prompt_memory
from .recompute import resolve_recompute
from .speed import StepTime, step_time

_LONGEST = 1 << 30  # tokens: longest row to try
_UNIT = 1024  # tokens: row lengths are reported in multiples of this


@dataclass(frozen=True)
class Plan:
    """A configuration on `gpus` GPUs of one kind.

    Memory is that of the phase that needs the most, time that of the last phase.
    """

    config: Config
    gpus: int
    gpu: Gpu
    jobs: tuple[Job, ...]
    memories: tuple[GpuMemory, ...]  # of each phase

    @property
    def largest(self) -> int:
        """Index of the phase that needs the most memory."""
        return max(range(len(self.memories)), key=lambda i: self.memories[i].needed)

    @property
    def memory(self) -> GpuMemory:
        return self.memories[self.largest]

    @property
    def margin(self) -> float:
        """Bytes of the GPU's memory that stay free; negative if the run does not fit."""
        return self.gpu.memory - self.memory.needed

    @property
    def fits(self) -> bool:
        return self.margin >= 0

    @property
    def can_start(self) -> bool:
        """Whether the whole model, which exists before it is divided, fits on one GPU."""
        job = self.jobs[self.largest]
        return job.itemsize * job.parameters <= self.gpu.memory

    @cached_property
    def host(self) -> HostMemory:
        return max((host_memory(job) for job in self.jobs), key=lambda host: host.needed)

    @cached_property
    def evaluations(self) -> dict[int, GpuMemory]:
        """Memory of perplexity during training, by length; the run skips one that does not fit."""
        return evaluation_memory(self.jobs[-1])

    @cached_property
    def prompts(self) -> dict[int, GpuMemory]:
        """Memory of prompts (passkey, needles, RULER) during training, by length."""
        return prompt_memory(self.jobs[-1])

    @cached_property
    def time(self) -> StepTime:
        """Time of one step of the last phase."""
        return step_time(self.jobs[-1], self.gpu)

    @property
    def cost(self) -> float:
        """GPU seconds of one step of the last phase."""
        return self.time.seconds * self.gpus


def make_plan(config: Config, gpus: int, gpu: Gpu) -> Plan:
    """Plan a configuration, with `train.recompute` = "auto" resolved for this GPU.

    Raises:
        UserError: `gpus` ranks cannot share its work; the message lists legal sizes.
    """
    config = resolve_recompute(config, gpus, gpu.memory)
    jobs = tuple(plan_jobs(config, gpus))
    return Plan(config, gpus, gpu, jobs, tuple(gpu_memory(job) for job in jobs))


def longest_row(plan: Plan) -> int:
    """The longest row in tokens that fits in the last phase, all other settings unchanged; 0: none.

    It is a multiple of 1,024 that the ranks can share.
    """
    model, sp = plan.config.model, plan.config.parallel.sp
    unit = math.lcm(_UNIT, sp * (model.window_size or 1))

    def fits(length: int) -> bool:
        data = plan.config.data.model_copy(update={"seq_len": length})
        config = plan.config.model_copy(update={"data": data})
        needed = gpu_memory(plan_jobs(config, plan.gpus)[-1]).needed
        return length <= _LONGEST and needed <= plan.gpu.memory

    return longest(fits, unit)


def longest(fits: Callable[[int], bool], unit: int, precision: int = _LONGEST) -> int:
    """The largest multiple of `unit` that fits, exact to 1 / `precision`: double, then bisect."""
    too_long = unit
    while fits(too_long):
        too_long *= 2
    found = too_long // 2 if too_long > unit else 0
    while too_long - found > max(unit, found // precision):
        middle = (found + too_long) // 2 // unit * unit
        found, too_long = (middle, too_long) if fits(middle) else (found, middle)
    return found


def is_legal(config: Config, gpus: int) -> bool:
    """Whether `config` is valid and `gpus` ranks can share its work."""
    try:
        parse_config(config.model_dump(), "").check_world(gpus)
    except UserError:
        return False
    return True
