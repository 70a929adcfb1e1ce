"""The model: Hugging Face's logits for the same weights, and what packing must not change."""

from typing import Any, get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from tensorlm.batch import IGNORED
from tensorlm.config import ModelConfig, Recompute, RopeScaling
from tensorlm.model import Llama
from tensorlm.model.output_head import OutputHead
from tensorlm.model.recompute import ATTENTION, BLOCKS, PRODUCT


def small(**changes: object) -> ModelConfig:
    shape: dict[str, object] = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
    }
    return ModelConfig.model_validate({**shape, **changes})


LLAMA3 = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=64)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaling", [None, LLAMA3], ids=["plain", "llama3"])
def test_full_attention_gives_the_logits_of_hugging_face(
    tied: bool, scaling: RopeScaling | None
) -> None:
    config = small(tie_embeddings=tied, rope_scaling=scaling)
    model = Llama(config)
    model.init_weights(seed=1)
    reference = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=tied,
            max_position_embeddings=512,
            rope_parameters={
                "rope_theta": config.rope_theta,
                **({"rope_type": "default"} if scaling is None else scaling.model_dump()),
            },
        )
    )
    weights = {
        name if name.startswith("lm_head") else f"model.{name}": value
        for name, value in model.state_dict().items()
    }
    reference.load_state_dict(weights, strict=True)
    tokens = torch.randint(97, (2, 130))
    torch.testing.assert_close(model(tokens), reference(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fold", [(), (8,), (4, 4)])
def test_packed_documents_give_what_they_give_alone(fold: tuple[int, ...]) -> None:
    model = Llama(small(fold=fold, hop_bias_init=0.0)).double()
    model.init_weights(seed=2)
    first, second = torch.randint(97, (1, 37)), torch.randint(97, (1, 30))
    doc_start = torch.tensor([[0] * 37 + [37] * 30], dtype=torch.int32)
    packed = model(torch.cat((first, second), dim=1), doc_start)
    # The rotary table is float32, so relative positions agree to its rounding.
    torch.testing.assert_close(packed[:, :37], model(first), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(packed[:, 37:], model(second), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("recompute", ["block", "attention", "selective"])
@pytest.mark.parametrize("mlp_chunk", [0, 24])
def test_recomputation_changes_no_bit_of_a_gradient(recompute: Recompute, mlp_chunk: int) -> None:
    tokens, labels = torch.randint(97, (1, 64)), torch.randint(97, (1, 64))
    gradients = []
    for mode in ("none", recompute):
        model = Llama(small(fold=(8,)), recompute=mode, loss_chunk=24, mlp_chunk=mlp_chunk)
        model.init_weights(seed=3)
        model(tokens, None, labels).backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("layers", ["window", "strided", "routed", "full"])
def test_selective_recomputation_runs_no_product_and_no_kernel_of_attention_again(
    layers: str,
) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "window": {"window": 16}, "strided": {"fold": (4, 4)}, "full": {"fold": ()},
        "routed": {"window": 16, "route": {"block": 16, "top_k": 1, "stretch": 2}},
    }  # fmt: skip
    config = small(num_layers=2, **{"fold": ()} | kinds[layers])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # else interpreted
    tokens = torch.randint(97, (1, 64), device=device)
    counts, gradients = {}, {}
    for recompute in get_args(Recompute):
        if recompute == "auto":
            continue
        model = Llama(config, recompute=recompute, attention="triton")
        model.init_weights(seed=3)
        model.to(device)
        loss = model(tokens, None, tokens)
        with CountedOperators() as counted:
            loss.backward()
        counts[recompute] = counted
        gradients[recompute] = [p.grad for p in model.parameters()]
    for name in (*ATTENTION, PRODUCT):
        assert counts["selective"].of(name) == counts["none"].of(name)
    assert sum(counts["none"].of(name) for name in ATTENTION) == 0
    assert sum(counts["block"].of(name) for name in ATTENTION) >= config.num_layers
    # Of each block's seven products, six.
    assert counts["block"].of(PRODUCT) == counts["none"].of(PRODUCT) + 6 * config.num_layers
    assert counts["attention"].of(PRODUCT) == counts["block"].of(PRODUCT)
    kept = BLOCKS if layers == "routed" else ATTENTION
    assert sum(counts["attention"].of(name) for name in kept) == 0
    assert counts["attention"].of("tensor_attention::hop") == 2 * (layers == "routed")
    for recompute in ("block", "attention", "selective"):
        for found, plain in zip(gradients[recompute], gradients["none"], strict=True):
            assert found is not None
            assert plain is not None
            assert torch.equal(found, plain)


class CountedOperators(TorchDispatchMode):
    """Counts the operators that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def of(self, name: str) -> int:
        return self.names.count(name)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("chunk", [0, 1, 7, 100])
def test_chunked_loss_equals_cross_entropy_of_all_logits(chunk: int) -> None:
    head = OutputHead(16, 31).double()
    hidden = torch.randn(3, 11, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(31, (3, 11))
    labels[0, :4] = IGNORED
    parts = [hidden, head.weight]
    loss = head(hidden, labels, chunk)
    logits = head(hidden).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss * 0.3, parts)
    wanted = torch.autograd.grad(expected * 0.3, parts)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y)
