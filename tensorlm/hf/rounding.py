"""Rounding exported weights to bf16, and its effect on short training.

Rounding to nearest resets a weight that moved less than half a unit in the last place. After a few
steps from bf16 weights, that is most of them, and the training is lost. Stochastic rounding keeps
the mean change over the weights. Weights that are exact in bf16 do not change.
"""

import re
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from tensorlm.checkpoint import Checkpoint, open_checkpoint, step_folder
from tensorlm.checkpoint.publish import was_imported
from tensorlm.runtime.errors import UserError
from tensorlm.runtime.progress import byte_bar
from tensorlm.runtime.stochastic_rounding import random_words, round_into

Rounding = Literal["nearest", "stochastic"]
_LOST_SHARE = 0.1  # share of the trained weights from which stochastic rounding is the default
_PART = 1 << 24  # elements of a parameter compared at one time


def round_part(
    part: Tensor, dtype: torch.dtype, rounding: Rounding, name: str, first: int
) -> Tensor:
    """Round elements of a parameter to `dtype`; the bits do not depend on the division into parts.

    Args:
        part: [n] float32.
        dtype: bfloat16 or float32.
        rounding: rounding to bfloat16.
        name: name of the parameter.
        first: index of the part's first element in the flattened parameter.

    Raises:
        UserError: an element is not finite.
    """
    if part.numel() and not torch.isfinite(torch.stack(part.aminmax())).all():
        raise UserError(f"{name}: must be finite, got nan or inf (export an earlier checkpoint)")
    if dtype is not torch.bfloat16 or rounding == "nearest":
        return part.to(dtype)
    rounded = torch.empty_like(part, dtype=dtype)
    noise = random_words(name, first, part.numel(), part.device).bitwise_and_(0xFFFF)
    round_into(rounded, part, noise)
    return rounded


def imported_start(checkpoint: Checkpoint) -> Checkpoint | None:
    """The imported weights that a run started from; None if it has none (or none any more)."""
    run_dir = checkpoint.folder.parent
    if not checkpoint.step or not was_imported(run_dir):
        return None
    try:
        return open_checkpoint(step_folder(run_dir, 0))
    except UserError:
        return None


def share_put_back(checkpoint: Checkpoint, start: Checkpoint) -> float:
    """Share of the weights changed by training that rounding to nearest bf16 resets.

    Raises:
        UserError: a file of either checkpoint cannot be read.
    """
    num_moved = num_lost = 0
    total = sum(checkpoint.num_elements(name) for name in checkpoint.shapes)
    with byte_bar(8 * total, "compare with the imported weights") as bar:
        for name, begin, end in _parts(checkpoint):
            now, then = (c.read(name, "master", begin, end) for c in (checkpoint, start))
            has_moved = now != then
            num_moved += int(has_moved.sum())
            num_lost += int((has_moved & (now.bfloat16() == then.bfloat16())).sum())
            bar(8 * len(now))
    return num_lost / max(1, num_moved)


def _parts(checkpoint: Checkpoint) -> Iterator[tuple[str, int, int]]:
    for name in checkpoint.shapes:
        numel = checkpoint.num_elements(name)
        for begin in range(0, numel, _PART):
            yield name, begin, min(begin + _PART, numel)


def choose_rounding(put_back: float | None) -> Rounding:
    """Stochastic if rounding to nearest would undo much of the training."""
    return "stochastic" if put_back is not None and put_back >= _LOST_SHARE else "nearest"


def describe_rounding(put_back: float | None, rounding: Rounding, is_asked: bool) -> str:
    """Describe the effect of rounding on one line; `put_back` None: checkpoint 0 was removed."""
    lost = "its effect is not known, since checkpoint 0 was removed"
    if put_back is not None:
        lost = (
            f"rounding to nearest resets {put_back:.1%} of the weights changed by training to "
            "their imported values"
        )
    fix = "--rounding stochastic or --dtype fp32 preserves short training"
    if rounding == "stochastic":
        fix = "--dtype fp32 preserves the exact weights"
    why = " (as requested)" if is_asked else ""
    return f"rounding: {rounding}{why}; {re.sub('%', ' %', lost)} ({fix})"
