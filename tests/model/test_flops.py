"""Counted FLOPs against brute force and against what PyTorch counts on the blocked path."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tensor_attention import choose_blocks, fold_axes
from tensorlm.config import ModelConfig, Recompute
from tensorlm.model import Llama
from tensorlm.model.flops import (
    attention_flops,
    attention_pairs,
    choice_flops,
    layer_pairs,
    linear_flops_per_token,
    peak_flops,
    recomputed_flops,
    sheet_peak,
    train_flops,
)

TOKENS = 64


def small(fold: tuple[int, ...], full_every: int = 0, num_layers: int = 3) -> ModelConfig:
    return ModelConfig(
        vocab_size=96, hidden_size=32, intermediate_size=80, num_layers=num_layers, num_heads=4,
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


ROUTED = {"window": 8, "route": {"block": 4, "top_k": 2, "stretch": 1, "open_tile": 1}}


def of_kind(kind: str) -> ModelConfig:
    settings = small(()).model_dump() | ROUTED | {"layers": [kind] * 3}
    return ModelConfig.model_validate(settings if kind == "routed" else settings | {"route": None})


@pytest.mark.parametrize("lengths", [[64], [1, 30, 5, 28], [8, 9, 20, 27]])
def test_pairs_of_windows_and_routes_are_those_of_their_choices(lengths: list[int]) -> None:
    depth = torch.cat([torch.arange(n) for n in lengths])[None]
    start = torch.arange(TOKENS)[None] - depth
    q, k = torch.randn(1, TOKENS, 2, 8), torch.randn(1, TOKENS, 1, 8)
    choice = choose_blocks(q, k, window=8, block=4, top_k=2, doc_start=start.int())[0, :, 0]
    near = beyond = cut = scored = 0
    for before, chosen in zip(depth[0].tolist(), choice.tolist(), strict=True):
        near += min(before + 1, 8)
        far = [block for block in range(TOKENS) if 4 * block <= before - 8]
        scored += max(0, len(far) - 1)
        read = sum(min(4, before - 8 - 4 * block + 1) for block in chosen if block >= 0)
        beyond += read
        cut += 4 * 3 - read if len(far) > 3 else 0  # computed, and masked
    assert layer_pairs(of_kind("window"), "window", depth) == near
    assert layer_pairs(of_kind("routed"), "routed", depth) == near + beyond + cut
    assert choice_flops(of_kind("routed"), depth) == 3 * 2 * 2 * 8 * scored
    assert choice_flops(of_kind("window"), depth) == 0
    # The choice has no backward, and is not made again.
    config = of_kind("routed")
    forward = linear_flops_per_token(config) * TOKENS + attention_flops(config, depth)
    assert train_flops(config, depth) == 3 * forward + choice_flops(config, depth)
    kept = recomputed_flops(of_kind("window"), depth, "block") - attention_flops(
        of_kind("window"), depth
    )
    assert recomputed_flops(config, depth, "block") == kept + attention_flops(config, depth)


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
@pytest.mark.parametrize(("recompute", "interval"), [("none", 1), ("block", 1), ("block", 2)])
@pytest.mark.parametrize(("fold", "full_every"), [((), 0), ((8,), 0), ((16,), 2)])
def test_training_costs_what_pytorch_counts(
    fold: tuple[int, ...], full_every: int, recompute: Recompute, interval: int, mlp_chunk: int
) -> None:
    config = small(fold, full_every)
    model = Llama(
        config, recompute=recompute, recompute_interval=interval, loss_chunk=16,
        mlp_chunk=mlp_chunk,
    )  # fmt: skip
    model.init_weights(0)
    tokens = torch.randint(0, 96, (1, TOKENS))
    with FlopCounterMode(display=False) as counter:
        model(tokens, None, tokens).backward()
    depth = torch.arange(TOKENS)[None]
    ours = train_flops(config, depth) + recomputed_flops(
        config, depth, recompute, mlp_chunk, interval
    )
    # What the blocked path computes in vain, in each pass over the layers.
    passes = 4 if recompute == "block" else 3
    masked = blocked_flops(config) - attention_flops(config, depth)
    assert masked > 0
    once_more = 0
    if interval == 2:  # of three layers, the first one runs once more
        first = small(fold, full_every, num_layers=1)
        once_more = blocked_flops(first) - attention_flops(first, depth)
    assert counter.get_total_flops() == ours + passes * masked + once_more
    assert ours > 3 * linear_flops_per_token(config) * TOKENS


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        # As CUDA names them; dense bf16 of the data sheets.
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989), ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989), ("NVIDIA GH200 144G HBM3e", 989),
        ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165), ("AMD Instinct MI300X", 1307),
    ],
)  # fmt: skip
def test_peak_is_that_of_the_data_sheet_of_this_very_board(name: str, tflops: float) -> None:
    assert sheet_peak(name) == tflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A10", "NVIDIA L40", "NVIDIA H20", "NVIDIA H800", "NVIDIA B2000",
        "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "Tesla V100",
    ],
)  # fmt: skip
def test_other_gpus_are_measured_and_not_taken_for_a_known_one(name: str) -> None:
    assert sheet_peak(name) is None


@pytest.mark.gpu
def test_measured_peak_of_an_unknown_gpu_is_that_of_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    known = peak_flops(device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X1")
    assert 0.5 * known < peak_flops(device) < 1.05 * known
