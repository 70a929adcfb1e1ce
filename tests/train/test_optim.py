"""AdamW with rounded moments against torch's, and the learning-rate schedules."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tensorlm.config import OptimConfig
from tensorlm.runtime.stochastic_rounding import random_words, round_into
from tensorlm.train import adamw
from tensorlm.train.optim import learning_rate

SETTINGS: Any = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8}


def rounded(exact: Tensor, key: str, shift: int) -> Tensor:
    words = random_words(key, 0, exact.numel(), exact.device)
    kept = torch.empty(exact.numel(), dtype=torch.bfloat16)
    round_into(kept, exact.flatten(), words >> shift & 0xFFFF)
    return kept.view(exact.shape).float()


def updates(optimizer: torch.optim.Optimizer, weight: Tensor, seed: int | None) -> Tensor:
    """`weight` after ten steps on fixed gradients; with `seed`, moments are rounded after each."""
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 11):
        weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
        for key, shift in (("exp_avg", 0), ("exp_avg_sq", 16)) if seed is not None else ():
            moment = optimizer.state[weight][key]
            moment.copy_(rounded(moment, f"{seed} {step} 0.0", shift))
    return weight.detach()


def test_low_memory_adamw_is_adamw_with_rounded_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "CHUNK", 7)  # several chunks, the last one shorter
    start = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    low, reference, exact = (start.clone().requires_grad_() for _ in range(3))
    groups = [{"params": [low], "weight_decay": 0.1}]
    own = updates(adamw.LowMemoryAdamW(groups, **SETTINGS, seed=3), low, None)
    torchs = torch.optim.AdamW([reference], weight_decay=0.1, **SETTINGS)
    rounded_too = updates(torchs, reference, 3)
    torch.testing.assert_close(own, rounded_too, rtol=1e-5, atol=1e-6)
    unrounded = updates(torch.optim.AdamW([exact], weight_decay=0.1, **SETTINGS), exact, None)
    assert 1e-5 < (own - unrounded).abs().max() < 0.01 * (start - unrounded).abs().max()


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # else interpreted


@pytest.mark.parametrize("betas", [(0.5, 0.75), (0.9, 0.999)])
def test_kernel_updates_as_pytorch_does(betas: tuple[float, float]) -> None:
    """Except where a sum of float32 differs in its last bit, even the rounding is the same."""
    from tensorlm.train.adamw_kernel import update

    generator = torch.Generator().manual_seed(0)
    weight, grad, mean = torch.randn(3, 5000, generator=generator)
    grad, mean = (grad * 8).round() / 8, (mean * 8).round() / 8
    square = (torch.rand(5000, generator=generator) * 64).round() / 64
    group: Any = {**SETTINGS, "betas": betas, "weight_decay": 0.1}
    states = []
    for apply, device in ((adamw._update, torch.device("cpu")), (update, DEVICE)):
        tensors = (weight, grad, mean.bfloat16(), square.bfloat16())
        w, g, m, s = (tensor.clone().to(device) for tensor in tensors)
        for step, first in ((1, 0), (7, 2**32 - 5)):  # the second one after moments were rounded
            apply(w, g, m, s, "0 1 layer", first, adamw._factors(group, step))
        states.append([tensor.cpu() for tensor in (w, g, m, s)])
    expected, found = states
    torch.testing.assert_close(found[0], expected[0], rtol=3e-6, atol=1e-7)
    for own, theirs in zip(found[2:], expected[2:], strict=True):
        assert (own != theirs).float().mean() < 1e-3
        torch.testing.assert_close(own, theirs, rtol=2**-7, atol=0)


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_low_memory_adamw_follows_gradients_that_become_small(beta2: float) -> None:
    """Rounded to the nearest, a second moment of beta2 0.999 would stay where it was."""
    generator = torch.Generator().manual_seed(0)
    settings: Any = {**SETTINGS, "betas": (0.9, beta2)}
    low, exact = (torch.zeros(2000, requires_grad=True) for _ in range(2))
    groups = [{"params": [low], "weight_decay": 0.0}]
    optimizers = [
        adamw.LowMemoryAdamW(groups, **settings),
        torch.optim.AdamW([exact], weight_decay=0.0, fused=True, **settings),
    ]
    for step in range(400):
        gradient = torch.randn(2000, generator=generator) * (1.0 if step < 50 else 0.01)
        before = [weight.detach().clone() for weight in (low, exact)]
        for weight, optimizer in zip((low, exact), optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    own, theirs = (o.state[w] for o, w in zip(optimizers, (low, exact), strict=True))
    mean = own["exp_avg_sq"].float().mean() / theirs["exp_avg_sq"].mean()
    assert float(mean) == pytest.approx(1, abs=0.01)
    steps = [(w.detach() - b).abs().mean() for w, b in zip((low, exact), before, strict=True)]
    assert float(steps[0] / steps[1]) == pytest.approx(1, abs=0.03)


def test_noise_is_the_same_however_elements_are_divided() -> None:
    def words(first: int, count: int, key: str = "0 1 layer") -> NDArray[np.uint32]:
        found = random_words(key, first, count, torch.device("cpu"))
        return found.numpy().view(np.uint32)

    far = 2**32 - 5  # of a parameter with more elements than 32 bits count
    for first in (0, 17, 2**31 - 5, far):
        np.testing.assert_array_equal(words(first, 30)[11:], words(first + 11, 19))
    many = words(0, 1 << 16)
    for half in (many & 0xFFFF, many >> 16):
        assert half.mean() == pytest.approx(0x7FFF, rel=0.01)
        assert np.bincount(half >> 12).min() > 0.9 * (1 << 12)
    for other in ("1 1 layer", "0 2 layer", "0 1 other"):  # seed, step, parameter
        assert (words(0, 1000, other) == words(0, 1000)).mean() < 0.01


@pytest.mark.parametrize("value", [1 + 2**-9, -3.14159, 1e-38, 1e-41, 6.1e4, 1.0, 0.0, -0.0])
def test_rounding_is_to_a_neighbour_and_right_in_the_mean(value: float) -> None:
    exact = torch.full((1 << 16,), value)
    kept = torch.empty(1 << 16, dtype=torch.bfloat16)
    round_into(kept, exact, torch.arange(1 << 16, dtype=torch.int32))  # each noise once
    assert kept.double().mean().item() == pytest.approx(exact[0].item(), rel=1e-6)
    near = exact[:1].bfloat16().float().item()
    unit = 2.0 ** (max(math.frexp(value)[1] - 1, -126) - 7)
    assert {abs(k - near) for k in set(kept.float().tolist())} <= {0.0, unit}
    assert (len(set(kept.tolist())) == 1) == (near == exact[0].item())


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
