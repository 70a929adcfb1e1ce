"""Random initial weights: what they depend on, and their distribution."""

import os

import pytest
import torch
from torch import Tensor

from tensorlm.config import ModelConfig
from tensorlm.model import WeightInit, initial_weights

CONFIG = ModelConfig(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_layers=8, num_heads=4, num_kv_heads=2,
    fold=[], init_std=0.02,
)  # fmt: skip
SIZES = {"first.weight": (40, 30), "o_proj.weight": (100, 72), "last.weight": (40, 30)}


def filled(seed: int = 5, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    weights = {name: torch.empty(size, dtype=dtype) for name, size in SIZES.items()}
    init = WeightInit(CONFIG, seed)
    for name, weight in weights.items():
        init.fill(name, weight)
    return weights


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only "o_proj.weight" has pieces: seven, the last one shorter."""
    monkeypatch.setattr(initial_weights, "_SMALL", 1200)
    monkeypatch.setattr(initial_weights, "_PIECE", 1024)


@pytest.mark.usefixtures("pieces")
def test_weights_depend_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = filled()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    for name, weight in filled().items():
        assert torch.equal(weight, weights[name])
    for name, weight in filled(dtype=torch.bfloat16).items():
        assert torch.equal(weight, weights[name].bfloat16())
    for name, weight in filled(seed=6).items():
        assert (weight != weights[name]).all()


@pytest.mark.usefixtures("pieces")
def test_pieces_differ_and_have_the_same_deviation() -> None:
    weights = filled()
    large = weights["o_proj.weight"].view(-1)
    assert len(large.unique()) > 0.99 * len(large)
    for piece in large.split(1024):
        deviation = 0.02 / 16**0.5
        assert piece.std().item() == pytest.approx(deviation, rel=0.2)
        assert abs(piece.mean().item()) < 5 * deviation / len(piece) ** 0.5


def test_small_tensors_come_from_one_generator() -> None:
    generator = torch.Generator().manual_seed(5)
    for name, weight in filled().items():
        std = 0.02 / (4 if name == "o_proj.weight" else 1)
        drawn = torch.empty(weight.numel()).normal_(generator=generator) * std
        assert torch.equal(weight.view(-1), drawn)
