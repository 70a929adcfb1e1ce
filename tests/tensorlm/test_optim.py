"""AdamW with rounded moments against torch's, and the learning-rate schedules."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tensorlm import adamw
from tensorlm.config import OptimConfig
from tensorlm.optim import learning_rate


def updates(optimizer: torch.optim.Optimizer, weight: Tensor, round_state: bool) -> Tensor:
    """`weight` after ten steps on fixed gradients; `round_state` rounds moments after each."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
        for key in ("exp_avg", "exp_avg_sq") if round_state else ():
            moment = optimizer.state[weight][key]
            moment.copy_(moment.bfloat16())
    return weight.detach()


def test_low_memory_adamw_is_adamw_with_rounded_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "_CHUNK", 7)  # several chunks, the last one shorter
    start = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    settings: Any = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8}
    low, reference, exact = (start.clone().requires_grad_() for _ in range(3))
    groups = [{"params": [low], "weight_decay": 0.1}]
    own = updates(adamw.LowMemoryAdamW(groups, **settings), low, False)
    torchs = torch.optim.AdamW([reference], weight_decay=0.1, **settings)
    rounded = updates(torchs, reference, True)
    torch.testing.assert_close(own, rounded, rtol=1e-5, atol=1e-6)
    unrounded = updates(torch.optim.AdamW([exact], weight_decay=0.1, **settings), exact, False)
    assert 1e-5 < (own - unrounded).abs().max() < 0.01 * (start - unrounded).abs().max()


def test_schedules_warm_up_stay_and_fall() -> None:
    cosine = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=10)
    assert [learning_rate(s, 110, cosine) for s in (0, 9, 59)] == pytest.approx([0.1, 1.0, 0.55])
    wsd = cosine.model_copy(update={"schedule": "wsd", "decay_steps": 50})
    assert [learning_rate(s, 110, wsd) for s in (10, 59, 84)] == pytest.approx([1.0, 1.0, 0.55])


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("num_steps", [4, 5, 1000])
@pytest.mark.parametrize("decay_steps", [0, 1, 2])
def test_schedules_begin_at_lr_and_end_at_min_lr(
    warmup: int, num_steps: int, decay_steps: int
) -> None:
    name: Any = "wsd" if decay_steps else "cosine"
    config = OptimConfig(
        lr=0.01, min_lr=0.001, warmup_steps=warmup, decay_steps=decay_steps, schedule=name
    )
    rates = [learning_rate(step, num_steps, config) for step in range(num_steps)]
    peak = max(warmup - 1, 0)
    assert rates[peak] == 0.01
    assert rates[-1] == pytest.approx(0.001, rel=1e-12)
    if decay_steps:
        assert rates[peak : num_steps - decay_steps] == [0.01] * (num_steps - decay_steps - peak)
        assert rates[-2] == (0.01 if decay_steps == 1 else pytest.approx(0.0055))
    else:
        assert all(a > b for a, b in itertools.pairwise(rates[peak:]))
    assert min(rates) > 0


def test_a_run_of_one_step_trains_at_lr() -> None:
    assert learning_rate(0, 1, OptimConfig(lr=0.01)) == 0.01
    assert learning_rate(0, 1, OptimConfig(lr=0.01, warmup_steps=1)) == 0.01
