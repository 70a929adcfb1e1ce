"""Proposals of settings that fit, or cost less: plans all combinations of a few changes."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tensorlm.config import Config

from .planning import Plan, is_legal, make_plan
from .recompute import ORDER

MAX_PROPOSALS = 5
GAIN = 0.03  # minimum share of the cost that a proposal must save
SPARE = 0.03  # share of the GPU's memory that a proposal leaves free: predictions are not exact
# Maximum number of changes at a time. More than usual only if the run does not fit otherwise.
_CHANGES_TO_SAVE, _USUAL_CHANGES, _CHANGES_TO_FIT = 2, 3, 4
GPUS = "gpus"
# Settings that change the results of training, not only its memory and speed.
CHANGES_TRAINING = ("optim.state_dtype", "model.fold")

Change = tuple[str, Any]  # a setting as `section.key`, or "gpus", and its new value


@dataclass(frozen=True)
class Proposal:
    """Changes to a plan, and the plan with them."""

    changes: tuple[Change, ...]
    plan: Plan

    @property
    def settings(self) -> tuple[str, ...]:
        return tuple(key for key, _ in self.changes)

    def __str__(self) -> str:
        return " ".join(
            f"--gpus {value}" if key == GPUS else f"{key}={_toml(value)}"
            for key, value in self.changes
        )


def propose(plan: Plan) -> list[Proposal]:
    """At most 5 proposals that fit, cheapest (in GPU seconds per step) first.

    If the plan itself fits, only proposals that cost noticeably less.
    """
    if not plan.can_start:
        return []
    limit = plan.cost * (1 - GAIN) if plan.fits else float("inf")
    kept: list[Proposal] = []
    for count in range(1, (_CHANGES_TO_SAVE if plan.fits else _CHANGES_TO_FIT) + 1):
        if count > _USUAL_CHANGES and kept:
            break
        found = (p for p in _all(plan, count) if _has_room(p.plan) and p.plan.cost < limit)
        for proposal in sorted(found, key=lambda p: p.plan.cost):
            if not any(_serves_as_well(known, proposal) for known in kept):
                kept.append(proposal)
    return sorted(kept, key=lambda p: p.plan.cost)[:MAX_PROPOSALS]


def _has_room(plan: Plan) -> bool:
    return plan.margin >= SPARE * plan.gpu.memory


def _serves_as_well(known: Proposal, other: Proposal) -> bool:
    """Whether `known` changes a subset of the settings of `other`, at about the same cost."""
    is_smaller = set(known.settings) <= set(other.settings)
    return is_smaller and known.plan.cost * (1 - GAIN) <= other.plan.cost


def _all(plan: Plan, count: int) -> Iterator[Proposal]:
    """Every legal plan with `count` settings changed."""
    options = _options(plan)
    for keys in itertools.combinations(options, count):
        for values in itertools.product(*(options[key] for key in keys)):
            changes = tuple(zip(keys, values, strict=True))
            config, gpus = apply(plan, changes)
            if is_legal(config, gpus):
                yield Proposal(changes, make_plan(config, gpus, plan.gpu))


def _options(plan: Plan) -> dict[str, list[Any]]:
    """Other values of each setting; fewer GPUs if the plan fits, more if it does not."""
    config, tokens = plan.config, plan.jobs[plan.largest].tokens
    train, zero, fold = config.train, config.zero, config.model.fold
    kinds = config.model.layer_kinds
    if plan.fits:
        gpus = [plan.gpus // n for n in (2, 4, 8) if plan.gpus % n == 0]
    else:
        gpus = [plan.gpus * n for n in (2, 4, 8)]
    options: dict[str, list[Any]] = {
        "train.recompute": [r for r in ORDER if r != train.recompute],
        "train.mlp_chunk": sorted({0, tokens // 8, tokens // 4} - {train.mlp_chunk}),
        "train.activation_offload": [not train.activation_offload],
        "optim.state_dtype": ["bf16"] if config.optim.state_dtype == "fp32" else [],
        "zero.stage": [stage for stage in (1, 2, 3) if stage != zero.stage],
        "parallel.sp": [2**i for i in range(7) if 2**i != config.parallel.sp],
        "zero.offload_optimizer": [not zero.offload_optimizer],
        "train.micro_batch": [n for n in (1, 2, 4, 8) if n != train.micro_batch],
        GPUS: gpus,
        "model.fold": [fold[:1]] if len(fold) > 1 and "strided" in kinds else [],
    }
    return {key: values for key, values in options.items() if values}


def apply(plan: Plan, changes: tuple[Change, ...]) -> tuple[Config, int]:
    """The configuration and the number of GPUs with these changes."""
    gpus, sections = plan.gpus, dict[str, dict[str, Any]]()
    for key, value in changes:
        if key == GPUS:
            gpus = value
        else:
            section, name = key.split(".")
            sections.setdefault(section, {})[name] = value
    update = {
        name: getattr(plan.config, name).model_copy(update=values)
        for name, values in sections.items()
    }
    return plan.config.model_copy(update=update), gpus


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
