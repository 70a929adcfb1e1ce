"""AdamW with rounded moments against torch's, and the learning-rate schedules."""

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
    assert [learning_rate(s, 110, cosine) for s in (0, 9, 60)] == pytest.approx([0.1, 1.0, 0.55])
    assert learning_rate(109, 110, cosine) == pytest.approx(0.1, abs=1e-3)
    wsd = cosine.model_copy(update={"schedule": "wsd", "decay_steps": 50})
    assert [learning_rate(s, 110, wsd) for s in (10, 60, 85)] == pytest.approx([1.0, 1.0, 0.55])
