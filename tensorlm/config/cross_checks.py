"""Checks of settings against one another: one line for each contradiction, with a fix."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .evaluation import GENERATION_TASKS, WINDOW_TASKS
from .layer_words import why_slow

if TYPE_CHECKING:
    from .schema import Config


def cross_problems(config: "Config") -> Iterator[str]:
    """The contradictions between sections, and between the settings of a section."""
    yield from _memory_problems(config)
    yield from _float8_problems(config)
    yield from _schedule_problems(config)
    yield from _evaluation_problems(config)
    yield from _phase_problems(config)


def _memory_problems(config: "Config") -> Iterator[str]:
    train, zero = config.train, config.zero
    if zero.stage == 0 and train.dtype == "bf16":
        yield (
            "zero.stage: must be 1, 2 or 3 if train.dtype = bf16, got 0 (stage 0 keeps no fp32 "
            "weights)"
        )
    if zero.stage == 0 and zero.offload_optimizer:
        yield "zero.offload_optimizer: needs zero.stage = 1, 2 or 3"
    if train.activation_offload and train.recompute == "none":
        yield (
            "train.activation_offload: needs train.recompute = block, attention or selective, got "
            "none"
        )
    if train.recompute_interval > 1 and train.recompute != "block":
        yield (
            "train.recompute_interval: must be 1 unless train.recompute = block, got "
            f"{train.recompute_interval} (set train.recompute = block)"
        )
    if train.attention == "triton" and (reason := why_slow(config.model)):
        yield f"model.route: {reason} (or set train.attention = auto, which is slow)"


def _float8_problems(config: "Config") -> Iterator[str]:
    """What keeps `train.linear` from running in float8: cuBLAS needs multiples of 16."""
    model, train = config.model, config.train
    if train.linear == "bf16":
        return
    if train.dtype != "bf16":
        yield f"train.linear: must be bf16 if train.dtype = fp32, got {train.linear}"
    heads = " if multiplied by the head size"
    sizes = {
        "model.hidden_size": (model.hidden_size, ""),
        "model.intermediate_size": (model.intermediate_size, ""),
        "model.num_heads": (model.num_heads * model.head_size, heads),
        "model.num_kv_heads": (model.num_kv_heads * model.head_size, heads),
        "train.mlp_chunk": (train.mlp_chunk, ""),
    }
    for number, phase in enumerate(config.phases):
        is_last = number == len(train.earlier_stages)
        where = "data.seq_len" if is_last else f"train.earlier_stages.{number}.seq_len"
        tokens = phase.seq_len * phase.micro_batch // config.parallel.sp
        sizes[where] = (tokens, " if multiplied by micro_batch and divided by sp")
    for key, (size, how) in sizes.items():
        if size % 16:
            yield (
                f"{key}: must be a multiple of 16{how} for train.linear = {train.linear}, got "
                f"{size} (or set train.linear = bf16)"
            )


def _schedule_problems(config: "Config") -> Iterator[str]:
    optim, train = config.optim, config.train
    warmup, decay = optim.warmup_steps, optim.decay_steps
    if warmup + decay > train.steps:
        yield (
            f"optim: warmup_steps + decay_steps must be at most train.steps = {train.steps}, "
            f"got {warmup} + {decay} (lower them or train longer)"
        )
    if optim.min_lr > optim.lr:
        yield f"optim.min_lr: must be at most optim.lr = {optim.lr}, got {optim.min_lr}"
    if optim.schedule == "wsd" and not decay:
        yield (
            "optim.decay_steps: must be at least 1 for schedule wsd, got 0 (try a tenth of "
            "train.steps)"
        )
    if train.profile and not 0 <= train.profile[0] < train.profile[1]:
        first, stop = train.profile
        yield (
            f"train.profile: must be [start, stop] with 0 <= start < stop, got [{first}, {stop}] "
            "(like [10, 13])"
        )
    if train.stop_at > train.steps:
        yield f"train.stop_at: must be at most train.steps = {train.steps}, got {train.stop_at}"


def _evaluation_problems(config: "Config") -> Iterator[str]:
    settings, route = config.eval, config.model.route
    others = sorted(set(settings.tasks) - {"ppl"})
    if others and route and route.choice == "random":
        yield (
            'eval.tasks: must be ["ppl"] with model.route.choice = random, got '
            f"{others[0]} (remove it)"
        )
    if not settings.every:
        return
    generates = sorted(set(settings.tasks) & set(GENERATION_TASKS))
    if generates and config.zero.stage == 3:
        yield (
            f"eval.tasks: {generates[0]} in training needs zero.stage 0, 1 or 2 (or evaluate "
            "checkpoints with launcher/evaluate.py)"
        )
    if set(settings.tasks) & set(WINDOW_TASKS):
        for length in settings.lengths:
            yield from _sharing_problems(config, "eval.lengths", length)


def _phase_problems(config: "Config") -> Iterator[str]:
    earlier, steps = config.train.earlier_stages, config.train.steps
    earlier_steps = sum(phase.steps for phase in earlier)
    if earlier_steps >= steps:
        yield (
            f"train.earlier_stages: must have fewer steps than train.steps = {steps}, got "
            f"{earlier_steps} (leave some for the rows of [data])"
        )
        return  # the last phase has no steps
    for number, phase in enumerate(config.phases):
        where = f"train.earlier_stages.{number}" if number < len(earlier) else "parallel.sp"
        yield from _sharing_problems(config, where, phase.seq_len)


def _sharing_problems(config: "Config", where: str, length: int) -> Iterator[str]:
    try:
        config.model.check_sharing(length, config.parallel.sp)
    except ValueError as error:
        yield f"{where}: {error}"
