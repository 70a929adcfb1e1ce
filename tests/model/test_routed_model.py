"""Models with window and routed layers: closed documents, what saves memory, kept choices."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tensor_attention import routed
from tensorlm.config import ModelConfig, Recompute
from tensorlm.model import Llama

ROUTE = {"block": 4, "top_k": 2, "stretch": 2, "open_tile": 4}
KINDS: dict[str, dict[str, Any]] = {
    "window": {"window": 8},
    "routed": {"window": 8, "route": ROUTE},
    "random": {"window": 8, "route": ROUTE | {"open_tile": 1, "choice": "random"}},
    "all four": {"fold": [8], "route": ROUTE, "layers": ["window", "routed", "strided", "full"]},
}
kinds = pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)


def small(**changes: Any) -> ModelConfig:
    shape: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_layers": 4,
        "num_heads": 4, "num_kv_heads": 2, "hop_bias_init": 0.0,
    }  # fmt: skip
    return ModelConfig.model_validate({**shape, **changes})


def build(settings: dict[str, Any], **options: Any) -> Llama:
    model = Llama(small(**settings), **options).double()
    model.init_weights(seed=2)
    return model


@kinds
def test_packed_documents_give_what_they_give_alone(settings: dict[str, Any]) -> None:
    model = build(settings)
    first, second = torch.randint(97, (1, 37)), torch.randint(97, (1, 60))
    doc_start = torch.tensor([[0] * 37 + [37] * 60], dtype=torch.int32)
    packed = model(torch.cat((first, second), dim=1), doc_start)
    # The rotary table is float32, so relative positions agree to its rounding.
    torch.testing.assert_close(packed[:, :37], model(first), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(packed[:, 37:], model(second), rtol=1e-6, atol=1e-6)


@kinds
def test_tokens_after_one_and_other_documents_change_nothing_at_it(
    settings: dict[str, Any],
) -> None:
    model = build(settings)
    tokens = torch.randint(97, (1, 97))
    doc_start = torch.tensor([[0] * 37 + [37] * 50 + [87] * 10], dtype=torch.int32)  # padding
    logits = model(tokens, doc_start)
    for changed, same in (
        (slice(0, 37), slice(37, 97)),
        (slice(70, 87), slice(0, 70)),
        (slice(87, 97), slice(0, 87)),
    ):
        other = tokens.clone()
        other[:, changed] = (tokens[:, changed] + 1) % 97
        # A tile reads the union of its tokens' blocks: what is masked may change how sums round.
        found = model(other, doc_start)
        torch.testing.assert_close(found[:, same], logits[:, same], rtol=1e-12, atol=1e-13)
        assert (found[:, changed] - logits[:, changed]).abs().max() > 1e-3


def test_routing_and_windows_add_no_weights_and_change_none() -> None:
    full = dict(build({}).named_parameters())
    for name in ("window", "routed"):
        own = dict(build(KINDS[name]).named_parameters())
        assert own.keys() == full.keys()
        assert all(torch.equal(own[key], full[key]) for key in full)
    mixed = dict(build(KINDS["all four"]).named_parameters())
    assert mixed.keys() - full.keys() == {"layers.2.self_attn.hop_bias"}


def test_a_window_or_choice_of_everything_is_full_attention() -> None:
    tokens = torch.randint(97, (1, 60))
    expected = build({})(tokens)
    everything = {**ROUTE, "top_k": 15, "stretch": 1}
    for settings in ({"window": 60}, {"window": 8, "route": everything}):
        torch.testing.assert_close(build(settings)(tokens), expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(build(KINDS["routed"])(tokens), expected)


def train_once(model: Llama, length: int = 64) -> tuple[float, list[Tensor]]:
    tokens, labels = torch.randint(97, (2, 2, length), generator=torch.Generator().manual_seed(1))
    doc_start = torch.tensor([[0] * length, [0] * 23 + [23] * (length - 23)], dtype=torch.int32)
    loss = model(tokens, doc_start, labels)
    (loss * 0.3).backward()
    return loss.item(), [p.grad for p in model.parameters() if p.grad is not None]


@kinds
@pytest.mark.parametrize(
    "options",
    [
        {"recompute": "block"},
        {"recompute": "selective"},
        {"recompute": "block", "activation_offload": True},
        {"recompute": "block", "mlp_chunk": 24, "loss_chunk": 40},
        {"recompute": "block", "recompute_interval": 3},
        {"recompute": "selective", "mlp_chunk": 24, "activation_offload": True},
    ],
    ids=lambda options: " ".join(options),
)
def test_saving_memory_changes_no_gradient(
    settings: dict[str, Any], options: dict[str, Any]
) -> None:
    expected, gradients = train_once(build(settings))
    loss, found = train_once(build(settings, **options))
    assert loss == pytest.approx(expected, rel=1e-13)
    for ours, plain in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("recompute", "interval"),
    [("none", 1), ("block", 1), ("block", 4), ("attention", 1), ("selective", 1)],
)
def test_a_layer_chooses_once_in_forward_and_backward(recompute: Recompute, interval: int) -> None:
    model = build(KINDS["all four"], recompute=recompute, recompute_interval=interval)
    with patch.object(routed, "_choice", wraps=routed._choice) as choose:
        for step in (1, 2):
            train_once(model)
            assert choose.call_count == step
    with torch.no_grad(), patch.object(routed, "_choice", wraps=routed._choice) as choose:
        model(torch.randint(97, (1, 20)))
        assert choose.call_count == 1
