"""What transformers' users set on a model, by argument or configuration, has its effect."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from tensorlm.hf import attach, modeling_tensorlm
from tensorlm.hf.cache_tensorlm import FoldCache
from tensorlm.hf.configuration_tensorlm import TensorLMConfig
from tensorlm.hf.modeling_tensorlm import TensorLMForCausalLM, TensorLMModel
from tests.hf.test_hf_generate import folded_model
from tests.support.hf_models import relative_error, tiny_llama


@pytest.fixture
def model() -> TensorLMForCausalLM:
    return folded_model([8], 2, num_hidden_layers=2)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(3, 256, (2, 50), generator=torch.Generator().manual_seed(1))


def gradients(model: TensorLMForCausalLM, tokens: Tensor, **inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(tokens, labels=tokens, **inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_a_hand_written_loop_gets_the_cache_of_the_configuration(
    model: TensorLMForCausalLM, tokens: Tensor
) -> None:
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = model.generate(tokens, **settings)[:, 50:]
    out, found = model(tokens), []  # without torch.no_grad(), as in many scripts
    for _ in range(10):
        found.append(out.logits[:, -1:].argmax(-1))
        out = model(found[-1], past_key_values=out.past_key_values)
    assert torch.equal(torch.cat(found, dim=1), wanted)


def test_a_cache_is_made_as_configured_except_in_training(
    model: TensorLMForCausalLM, tokens: Tensor
) -> None:
    for module in (model, model.model):
        assert isinstance(module(tokens).past_key_values, FoldCache)
        assert module(tokens, use_cache=False).past_key_values is None
    model.train()
    assert model(tokens).past_key_values is None
    assert isinstance(model(tokens, use_cache=True).past_key_values, FoldCache)
    model.eval()
    model.config.use_cache = False
    assert model(tokens).past_key_values is None
    assert isinstance(model(tokens, use_cache=True).past_key_values, FoldCache)


def test_gradients_flow_through_the_cache(model: TensorLMForCausalLM, tokens: Tensor) -> None:
    wanted = gradients(model, tokens, use_cache=False)
    for name, found in gradients(model, tokens).items():
        assert relative_error(found, wanted[name]) < 1e-5, name
    model.zero_grad()
    cache = model(tokens[:, :30]).past_key_values
    model(tokens[:, 30:], past_key_values=cache).logits.square().sum().backward()
    in_two = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(tokens).logits[:, 30:].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert relative_error(in_two[name], parameter.grad) < 1e-5, name


def test_what_inference_mode_made_can_be_used_outside_of_it(
    model: TensorLMForCausalLM, tokens: Tensor
) -> None:
    with torch.inference_mode():
        out = model(tokens[:, :30])
    with torch.no_grad():
        last = model(tokens[:, 30:], past_key_values=out.past_key_values).logits
        assert relative_error(last, model(tokens).logits[:, 30:]) < 1e-5
    for made_first in (True, False):
        if made_first:
            model.model._table = None
        with torch.inference_mode():
            model(torch.randint(256, (1, 60 if made_first else 200)))
        cos, sin = model.model._rotary(10, tokens.device)
        x = torch.ones_like(cos, requires_grad=True)
        (x * cos * sin).sum().backward()  # saves the table, as the kernels do


@pytest.mark.parametrize("gradient", [True, False])
def test_hidden_states_as_the_configuration_says(
    model: TensorLMForCausalLM, tokens: Tensor, gradient: bool
) -> None:
    with torch.set_grad_enabled(gradient):
        wanted = model(tokens, output_hidden_states=True).hidden_states
        assert len(wanted) == 3
        model.config.output_hidden_states = True
        for module in (model, model.model):
            assert all(map(torch.equal, module(tokens).hidden_states, wanted))
            assert module(tokens, output_hidden_states=False).hidden_states is None
        first, middle, last = model(tokens, output_hidden_states=[0, -1]).hidden_states
        assert torch.equal(first, wanted[0])
        assert torch.equal(last, wanted[2])
        assert middle is None
        assert model(tokens, output_hidden_states=1).hidden_states[1] is not None


@torch.no_grad()
def test_return_dict_false_gives_tuples(model: TensorLMForCausalLM, tokens: Tensor) -> None:
    for module in (model, model.model):
        wanted = module(tokens, use_cache=False, output_hidden_states=True)
        found = module(tokens, use_cache=False, output_hidden_states=True, return_dict=False)
        assert type(found) is tuple
        assert torch.equal(found[0], wanted[0])
        assert all(map(torch.equal, found[1], wanted.hidden_states))
    assert isinstance(model.model(tokens), BaseModelOutputWithPast)
    model.config.return_dict = False
    assert type(model.model(tokens)) is tuple


def test_gradient_checkpointing_of_the_configuration_is_kept(
    model: TensorLMForCausalLM, tokens: Tensor, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    for kind in (AutoModelForCausalLM, AutoModel):
        config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
        config.gradient_checkpointing = True
        loaded = kind.from_pretrained(tmp_path, trust_remote_code=True, config=config)
        assert loaded.is_gradient_checkpointing
        assert not hasattr(loaded.config, "gradient_checkpointing")
        inner = loaded if kind is AutoModel else loaded.model
        assert all(layer.gradient_checkpointing for layer in inner.layers)
    config = TensorLMConfig(**model.config.to_dict())
    config.gradient_checkpointing = True
    assert all(layer.gradient_checkpointing for layer in TensorLMModel(config).layers)
    wanted = gradients(model.train(), tokens)
    config.gradient_checkpointing = True
    again = TensorLMForCausalLM(config).train()
    again.load_state_dict(model.state_dict())
    for use_cache in (None, True):
        for name, found in gradients(again, tokens, use_cache=use_cache).items():
            assert relative_error(found, wanted[name]) < 1e-5, name
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="must be empty while gradients are checkpointed"):
        again(tokens, past_key_values=cache)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"token_type_ids": torch.zeros(2, 50)}, "token_type_ids: this model does not support"),
        ({"head_mask": torch.ones(2)}, "head_mask: this model does not support"),
        ({"is_causal": False}, "is_causal: this model does not support"),
        ({"block_sequence_ids": torch.zeros(2, 50)}, "block_sequence_ids: this model"),
        ({"output_attentions": True}, "output_attentions"),
        ({"inputs_embeds": torch.zeros(2, 50, 32)}, "exactly one of input_ids and inputs_embeds"),
    ],
)
def test_no_argument_is_ignored(
    model: TensorLMForCausalLM, tokens: Tensor, named: dict[str, Any], message: str
) -> None:
    for module in (model, model.model):
        with pytest.raises(ValueError, match=message):
            module(tokens, **named)
    model(tokens, token_type_ids=None, is_causal=True)
    assert model(tokens, labels=tokens, num_items_in_batch=torch.tensor(7)).loss > 0
    model.set_attn_implementation("eager")  # else the configuration refuses the next line
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions"):
        model(tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout must be 0"),
        ({"is_causal": False}, "is_causal must be true"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type must be .* got dynamic",
        ),
    ],
)
def test_no_field_of_the_configuration_is_ignored(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        folded_model([8], **changes)
    with pytest.raises(ValueError, match=f"attach: {message}"):
        attach(tiny_llama(**changes), [8])


def test_other_caches_than_the_folds_are_refused(
    model: TensorLMForCausalLM, tokens: Tensor
) -> None:
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(tokens, **settings)
    assert torch.equal(model.generate(tokens, cache_implementation="dynamic", **settings), wanted)
    for name in ("static", "offloaded", "offloaded_static", "quantized"):
        with pytest.raises(ValueError, match=f'"dynamic", got "{name}"'):
            model.generate(tokens, cache_implementation=name, **settings)
    with pytest.raises(ValueError, match="Passing both"):
        model.generate(
            tokens, cache_implementation="dynamic", past_key_values=FoldCache(model.config),
            **settings,
        )  # fmt: skip


INPUTS = {
    "tokens": {},
    "padded and packed": {
        "attention_mask": torch.tensor([[0] * 9 + [1] * 41, [1] * 50]),
        "position_ids": torch.cat([torch.arange(20), torch.arange(30)])[None],
    },
}


@torch.no_grad()
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_compiles_without_a_break_in_the_graph_and_exports(
    model: TensorLMForCausalLM, tokens: Tensor, inputs: dict[str, Tensor]
) -> None:
    wanted = model(tokens, **inputs).logits
    torch.compiler.reset()
    found = torch.compile(model, fullgraph=True, backend="eager")(tokens, **inputs)
    assert relative_error(found.logits, wanted) < 1e-5
    assert found.past_key_values.get_seq_length() == 50
    exported = torch.export.export(model, (tokens,), inputs)
    assert relative_error(exported.module()(tokens, **inputs).logits, wanted) < 1e-5


@torch.no_grad()
def test_values_without_a_meaning_fail_in_a_compiled_graph_too(tokens: Tensor) -> None:
    torch.compiler.reset()
    model = folded_model([64], num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="position_ids must count up by one"):
        compiled(tokens, position_ids=torch.arange(50)[None] // 2)


# Routed layers as the kernels take them; 50 tokens have blocks beyond the window.
ON_GPU: dict[str, dict[str, Any]] = {
    "strided and full": {"fold": [8], "full_every": 2},
    "window and routed": {
        "window": 16, "route": {"block": 16, "top_k": 1, "stretch": 2}, "route_every": 2,
    },
}  # fmt: skip


@contextmanager
def no_waiting() -> Iterator[None]:
    """An operation that waits for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("layers", ON_GPU.values(), ids=ON_GPU)
@torch.no_grad()
def test_a_forward_pass_never_waits_for_the_gpu(tokens: Tensor, layers: dict[str, Any]) -> None:
    model, tokens = folded_model(**layers, head_dim=16).cuda(), tokens.cuda()
    token = tokens[:, :1].clone()
    for inputs in INPUTS.values():
        inputs = {name: x.cuda() for name, x in inputs.items()}
        out = model(tokens, **inputs)  # compiles the kernels, makes the rotary table
        logits = out.logits
        for _ in range(2):
            out = model(token, past_key_values=out.past_key_values)
        with no_waiting():
            again = model(tokens, **inputs)
            for _ in range(2):
                out = model(token, past_key_values=again.past_key_values)
            model(tokens, use_cache=False, **inputs)
        assert torch.equal(again.logits, logits)


@pytest.mark.gpu
@pytest.mark.parametrize("layers", ON_GPU.values(), ids=ON_GPU)
def test_a_step_of_training_never_waits_for_the_gpu(tokens: Tensor, layers: dict[str, Any]) -> None:
    model, tokens = folded_model(**layers, head_dim=16).cuda().train(), tokens.cuda()
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        for inputs in INPUTS.values():
            inputs = {name: x.cuda() for name, x in inputs.items()}
            model(tokens, **inputs).logits.float().sum().backward()  # compiles the kernels
            with no_waiting():
                model(tokens, **inputs).logits.float().sum().backward()


def test_the_model_file_names_every_file_that_travels() -> None:
    """transformers 4 copies only those that it names, not those that they name in turn."""
    source = Path(modeling_tensorlm.__file__).read_text()
    named = {f"{name}.py" for name in re.findall(r"^\s*from \.(\w+) import", source, re.MULTILINE)}
    travels = {*modeling_tensorlm.MODEL_FILES, *modeling_tensorlm.OPERATOR_FILES}
    assert named == travels - {"modeling_tensorlm.py"}
