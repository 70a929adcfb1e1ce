"""Rotary tables: exact at any position, by every maker, and Hugging Face's where that is exact."""

import math

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tensor_attention import Rotary, hop, rotary_frequencies, rotary_table
from tensorlm.config import ModelConfig, RopeScaling
from tensorlm.hf.configuration_tensorlm import TensorLMConfig
from tensorlm.hf.modeling_tensorlm import TensorLMModel
from tensorlm.model import layers

CPU = torch.device("cpu")
HEAD, THETA, MILLION = 8, 500000.0, 1 << 20
ROUNDING = 2.0**-24  # of a float32 between 1/2 and 1
SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
every_scaling = pytest.mark.parametrize("kind", SCALINGS)


def model_config(kind: str) -> ModelConfig:
    scaling = SCALINGS[kind]
    return ModelConfig(
        vocab_size=16, hidden_size=2 * HEAD, intermediate_size=16, num_layers=1, num_heads=2,
        num_kv_heads=1, rope_theta=THETA, fold=(4,),
        rope_scaling=None if scaling is None else RopeScaling.model_validate(scaling),
    )  # fmt: skip


def rope_parameters(kind: str) -> dict[str, object]:
    return {"rope_theta": THETA, **(SCALINGS[kind] or {"rope_type": "default"})}


def trained(kind: str, positions: int) -> Rotary:
    """As in training and in the benchmarks."""
    return layers.rotary_table(model_config(kind), positions, CPU)


def exported(kind: str, positions: int) -> Rotary:
    """As in an exported folder."""
    config = TensorLMConfig(
        vocab_size=16, hidden_size=2 * HEAD, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, fold=[4],
        rope_parameters=rope_parameters(kind),
    )  # fmt: skip
    table = TensorLMModel(config).to(torch.bfloat16)._rotary(positions, CPU)
    return Rotary(*(x[:positions] for x in table))


def scalar_frequencies(kind: str) -> list[float]:
    """Radians per position, by Python's floats."""
    frequencies = [THETA ** (-2 * i / HEAD) for i in range(HEAD // 2)]
    if kind == "linear":
        return [x / 3 for x in frequencies]
    if kind == "default":
        return frequencies
    scaled = []
    for x in frequencies:
        wavelength = 2 * math.pi / x
        keep = min(max((8192 / wavelength - 1) / (4 - 1), 0.0), 1.0)
        scaled.append(keep * x + (1 - keep) * x / 8)
    return scaled


@every_scaling
@pytest.mark.parametrize("make", [trained, exported])
def test_angles_are_exact_at_a_million_positions(make: object, kind: str) -> None:
    assert callable(make)
    table = make(kind, MILLION)
    assert [(x.dtype, x.shape) for x in table] == [(torch.float32, (MILLION, HEAD // 2))] * 2
    frequencies = scalar_frequencies(kind)
    for position in (0, 1, 2, 8191, 32767, 131071, 524287, MILLION - 1):
        for i, frequency in enumerate(frequencies):
            angle = position * frequency
            assert abs(float(table.cos[position, i]) - math.cos(angle)) <= ROUNDING
            assert abs(float(table.sin[position, i]) - math.sin(angle)) <= ROUNDING


def hugging_face(kind: str, positions: Tensor) -> Rotary:
    config = LlamaConfig(
        hidden_size=2 * HEAD, num_attention_heads=2, max_position_embeddings=MILLION,
        rope_parameters=rope_parameters(kind),
    )  # fmt: skip
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    return Rotary(*(x[0, :, : HEAD // 2] for x in (cos, sin)))


@every_scaling
def test_frequencies_are_hugging_faces_to_float32(kind: str) -> None:
    config = LlamaConfig(
        hidden_size=2 * HEAD, num_attention_heads=2, max_position_embeddings=MILLION,
        rope_parameters=rope_parameters(kind),
    )  # fmt: skip
    frequencies = rotary_frequencies(HEAD, THETA, SCALINGS[kind])
    assert frequencies.dtype == torch.float64
    theirs = LlamaRotaryEmbedding(config).inv_freq.double()
    torch.testing.assert_close(frequencies, theirs, rtol=5e-7, atol=0)


@every_scaling
def test_the_table_is_hugging_faces_where_that_is_exact(kind: str) -> None:
    first = torch.arange(16)
    for ours, theirs in zip(trained(kind, 16), hugging_face(kind, first), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=16 * 2**-22)
    # A frequency of 1 is exact, and so is its product with any position below 2^24.
    if kind == "default":
        far = torch.tensor([1, 8191, 131071, MILLION - 1])
        for ours, theirs in zip(trained(kind, MILLION), hugging_face(kind, far), strict=True):
            torch.testing.assert_close(ours[far, 0], theirs[:, 0], rtol=0, atol=2 * ROUNDING)


def test_a_document_at_a_million_positions_has_the_outputs_it_has_at_the_start() -> None:
    tokens = 64
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, 1, HEAD, generator=generator) for _ in range(3))
    table = trained("default", MILLION)
    reach = torch.arange(tokens, dtype=torch.int32)[None]

    def outputs(first: int) -> Tensor:
        shifted = Rotary(*(x[first : first + tokens] for x in table))
        return hop(q, k, v, stride=1, length=tokens, reach=reach, rotary=shifted)[0]

    start, end = outputs(0), outputs(MILLION - tokens)
    assert float((end - start).norm() / start.norm()) < 1e-6


def test_an_unknown_scaling_is_a_value_error_that_names_it() -> None:
    with pytest.raises(ValueError, match='must be "default", "linear" or "llama3", got "yarn"'):
        rotary_frequencies(HEAD, THETA, {"rope_type": "yarn", "factor": 2.0})


def test_the_table_is_made_where_it_is_used() -> None:
    frequencies = rotary_frequencies(HEAD, THETA, None, "meta")
    assert frequencies.is_meta
    assert all(x.is_meta for x in rotary_table(frequencies, 4, torch.device("meta")))
