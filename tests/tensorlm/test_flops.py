"""Counted FLOPs against brute force and against what PyTorch counts on the blocked path."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tensor_attention import fold_axes
from tensorlm.config import ModelConfig
from tensorlm.flops import (
    attention_flops,
    attention_pairs,
    linear_flops_per_token,
    recomputed_flops,
    train_flops,
)
from tensorlm.model import Llama

TOKENS = 64


def small(fold: tuple[int, ...], full_every: int = 0) -> ModelConfig:
    return ModelConfig(
        vocab_size=96, hidden_size=32, intermediate_size=80, num_layers=3, num_heads=4,
        num_kv_heads=2, head_dim=8, fold=fold, full_every=full_every,
    )  # fmt: skip


@pytest.mark.parametrize("fold", [(), (8,), (4, 3), (16,)])
@pytest.mark.parametrize("lengths", [[64], [1, 30, 5, 28]])
def test_pairs_are_those_that_the_definition_visits(
    fold: tuple[int, ...], lengths: list[int]
) -> None:
    depth = torch.cat([torch.arange(n) for n in lengths])[None]
    visited = 0
    for i, axis in enumerate(fold_axes(fold, TOKENS)):
        for before in depth[0].tolist():  # tokens of the document before this one
            steps = range(0 if i == 0 else 1, axis.length)
            visited += sum(step * axis.stride <= before for step in steps)
    assert attention_pairs(fold, depth) == visited


def blocked_flops(config: ModelConfig) -> int:
    """Forward FLOPs of attention on the blocked path, which also computes what it masks."""
    total = 0
    for layer in range(config.num_layers):
        for axis in fold_axes(config.layer_fold(layer), TOKENS):
            line = TOKENS // axis.stride
            slots = line if axis.length >= line else axis.length // 4 * 5  # of each query
            total += 4 * config.num_heads * config.head_size * TOKENS * slots
    return total


@pytest.mark.parametrize("mlp_chunk", [0, 24])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("fold", "full_every"), [((), 0), ((8,), 0), ((16,), 2)])
def test_training_costs_what_pytorch_counts(
    fold: tuple[int, ...], full_every: int, checkpointing: bool, mlp_chunk: int
) -> None:
    config = small(fold, full_every)
    model = Llama(
        config, activation_checkpointing=checkpointing, loss_chunk=16, mlp_chunk=mlp_chunk
    )
    model.init_weights(0)
    tokens = torch.randint(0, 96, (1, TOKENS))
    with FlopCounterMode(display=False) as counter:
        model(tokens, None, tokens).backward()
    depth = torch.arange(TOKENS)[None]
    ours = train_flops(config, depth) + recomputed_flops(config, depth, checkpointing, mlp_chunk)
    # What the blocked path computes in vain, in each pass over the layers.
    passes = 4 if checkpointing else 3
    masked = blocked_flops(config) - attention_flops(config, depth)
    assert masked > 0
    assert counter.get_total_flops() == ours + passes * masked
    assert ours > 3 * linear_flops_per_token(config) * TOKENS
