"""The model: Hugging Face's logits for the same weights, and what packing must not change."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tensorlm.batch import IGNORED
from tensorlm.config import ModelConfig, RopeScaling
from tensorlm.model import Llama
from tensorlm.model.output_head import OutputHead


def small(**changes: object) -> ModelConfig:
    shape = {
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


def test_activation_checkpointing_changes_no_gradient() -> None:
    tokens, labels = torch.randint(97, (1, 64)), torch.randint(97, (1, 64))
    gradients = []
    for enabled in (False, True):
        model = Llama(small(fold=(8,)), activation_checkpointing=enabled, loss_chunk=24)
        model.init_weights(seed=3)
        model(tokens, None, labels).backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None
        assert torch.equal(plain, recomputed)


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
