"""Routed and window layers as Hugging Face models: fields, export, cache, attach."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tensor_attention import choose_blocks, routed_decode
from tensorlm.benchmarks.accounting import PeakMemory
from tensorlm.checkpoint import open_checkpoint
from tensorlm.config import load_config
from tensorlm.hf import attach, routed_tensorlm
from tensorlm.hf.cache_tensorlm import FoldCache, RoutedLayer
from tensorlm.hf.configuration_tensorlm import TensorLMConfig, check_operator
from tensorlm.hf.export_folder import export_checkpoint
from tensorlm.hf.import_folder import import_weights
from tensorlm.hf.llama_config import describe_unused
from tensorlm.hf.load_folder import load_folder
from tensorlm.hf.modeling_tensorlm import TensorLMForCausalLM
from tests.hf.test_hf_generate import ROUTE, CountReads, buffers, folded_model
from tests.hf.test_hf_options import INPUTS
from tests.support.hf_models import (
    launcher_here,
    random_checkpoint,
    relative_error,
    tiny_llama,
)
from tests.support.launching import ROOT

ROUTED = (
    "model.fold=[]", "model.full_every=0", "model.window=8", "model.route_every=2",
    "model.route={block=4, top_k=2, stretch=4, open_tile=4}",
)  # fmt: skip


# -------------------------------------------------------------------------------------- the fields

# config.json of a folder that was exported before there were window and routed layers.
OLD_FIELDS = {
    "architectures": ["TensorLMForCausalLM"], "model_type": "tensorlm", "vocab_size": 512,
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "hidden_act": "silu", "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "initializer_range": 0.2, "attention_bias": False, "mlp_bias": False, "torch_dtype": "float32",
    "auto_map": {
        "AutoConfig": "configuration_tensorlm.TensorLMConfig",
        "AutoModel": "modeling_tensorlm.TensorLMModel",
        "AutoModelForCausalLM": "modeling_tensorlm.TensorLMForCausalLM",
    },
    "fold": [4, 8], "full_every": 2, "hop_bias_init": -4.0,
}  # fmt: skip


def test_folders_of_before_mean_what_they_meant(tmp_path: Path, config: Path) -> None:
    settings = ("model.fold=[4,8]", "model.full_every=2")
    checkpoint, exported, ours = random_checkpoint(config, *settings)
    export_checkpoint(checkpoint, exported, tmp_path / "hf", "fp32", None)
    (tmp_path / "hf/config.json").write_text(json.dumps(OLD_FIELDS))
    model = load_folder(tmp_path / "hf")
    assert [model.config.layer_kind(i) for i in range(2)] == ["strided", "full"]
    assert [model.config.layer_fold(i) for i in range(2)] == [[4, 8], []]
    tokens = torch.randint(512, (2, 70))
    with torch.no_grad():
        assert relative_error(model(tokens).logits, ours(tokens)) < 1e-5
    new_run = load_config(config, [*settings, f"run.dir={tmp_path}/again"])
    import_weights(tmp_path / "hf", new_run)


@pytest.mark.parametrize(
    ("fields", "kinds"),
    [
        ({"window": 8}, "window window window window"),
        ({"window": 8, "route": ROUTE}, "routed routed routed routed"),
        ({"window": 8, "route": ROUTE, "route_every": 2}, "window routed window routed"),
        ({"fold": [8], "route": ROUTE, "route_every": 2}, "strided routed strided routed"),
        ({"window": 8, "route": ROUTE, "full_every": 4}, "routed routed routed full"),
        ({"fold": [8], "layers": ["window", "full"] * 2}, "window full window full"),
        ({"full_every": 2}, "full full full full"),
    ],
)
def test_kind_of_each_layer_is_that_of_training(
    config: Path, fields: dict[str, Any], kinds: str
) -> None:
    settings = TensorLMConfig(num_hidden_layers=4, **fields)
    check_operator(settings)
    assert " ".join(settings.layer_kind(i) for i in range(4)) == kinds
    overrides = [f"model.{key}={_toml(value)}" for key, value in fields.items()]
    plain = ["model.num_layers=4", "model.fold=[]", "model.full_every=0"]
    model = load_config(config, [*plain, *overrides]).model
    assert " ".join(model.layer_kind(i) for i in range(4)) == kinds
    assert model.window_size == settings.window_size


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {number}" for key, number in value.items()) + "}"
    return json.dumps(value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 8, "route": {"block": 4, "top_k": 2}}, "route must have the keys block, top_k"),
        ({"window": 8, "route": ROUTE | {"tile": 1}}, "route must have the keys block, top_k"),
        ({"window": 8, "route": ROUTE | {"top_k": 0}}, "route.top_k must be an integer of"),
        (
            {"window": 3, "route": ROUTE},
            "route.block must be at most the window of 3 tokens",
        ),
        ({"route": ROUTE}, "window must be at least 1 for routed layers, got 0"),
        ({"window": 8, "route_every": 2}, "route_every must be 0 without route, got 2"),
        ({"window": 8, "fold": [4]}, r"window must be fold\[0\] = 4, got 8"),
        (
            {"window": 8, "layers": ["window"]},
            "layers must have one entry for each of 2 layers",
        ),
        (
            {"window": 8, "layers": ["window", "?"]},
            "layers must be one of window, strided, routed",
        ),
        ({"layers": ["full", "strided"]}, "fold must have an inner axis for strided layers, got"),
        ({"window": 8, "layers": ["full", "routed"]}, "route must be given for routed layers"),
        (
            {"window": 8, "layers": ["full", "window"], "full_every": 2},
            "full_every must be 0 if layers is given, got 2",
        ),
        (
            {"window": 8, "route": ROUTE, "full_every": 1},
            "route must be used by at least one layer",
        ),
    ],
)
def test_fields_that_contradict_each_other_are_one_line(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        folded_model(num_hidden_layers=2, **fields)
    assert "\n" not in str(caught.value)
    model = tiny_llama()
    with pytest.raises(ValueError, match=f"attach: {message}"):
        attach(model, **fields)
    assert type(model).__name__ == "LlamaForCausalLM"


# ------------------------------------------------------------------------------- there and back


def test_folder_brings_its_layers_and_its_weights_back(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, settings, model = random_checkpoint(config, *ROUTED)
    folder = tmp_path / "hf"
    export_checkpoint(checkpoint, settings, folder, "fp32", None)
    assert "routed (window 8" in (folder / "README.md").read_text()
    write = ("import", "--hf", folder, "--write-config", tmp_path / "own.toml")
    assert launcher_here("convert.py", *write) == 0
    written = load_config(tmp_path / "own.toml").model
    assert written.model_dump(exclude={"init_std", "hop_bias_init"}) == settings.model.model_dump(
        exclude={"init_std", "hop_bias_init"}
    )
    again = load_config(config, [*ROUTED, f"run.dir={tmp_path}/again"])
    imported = open_checkpoint(import_weights(folder, again))
    for name, parameter in model.named_parameters():
        found = imported.read(name, "master", 0, parameter.numel())
        assert torch.equal(found, parameter.detach().flatten()), name
    capsys.readouterr()
    other = ("import", "--config", config, "--hf", folder, f"run.dir={tmp_path}/third", *ROUTED)
    assert launcher_here("convert.py", *other, "model.route.top_k=3", "model.window=9") == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: model.window: must be 8, as in {folder}, got 9 (set model.window=8)",
        f"error: model.route.top_k: must be 2, as in {folder}, got 3 (set model.route.top_k=2)",
    ]
    tiny_llama().save_pretrained(tmp_path / "llama")
    unused = describe_unused(tmp_path / "llama", settings.model)
    assert "window = 8 (" in unused
    assert 'route = {"block": 4' in unused


# --------------------------------------------------------------------------------------- the cache


@torch.no_grad()
@pytest.mark.parametrize("open_tile", [1, 4])
@pytest.mark.parametrize("num_tokens", [500, 2000])
def test_a_new_token_reads_its_window_its_blocks_and_the_means(
    num_tokens: int, open_tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    window, block, top_k = 32, 8, 3
    route = {"block": block, "top_k": top_k, "stretch": 4, "open_tile": open_tile}
    layers = ["window", "routed", "routed"]
    model = folded_model(window=window, route=route, layers=layers, num_hidden_layers=3)
    opened = _record_open_blocks(monkeypatch)
    cache = FoldCache(model.config)
    model(torch.randint(256, (1, num_tokens)), past_key_values=cache, use_cache=True)
    kept = {rows.buffer.shape[1] for layer in cache.layers[:1] for rows in layer.all_rows()}
    assert max(kept) == window + 64  # and not the whole prompt
    with CountReads(list(buffers(cache))) as count:
        model(torch.randint(256, (1, 1)), past_key_values=cache, use_cache=True)
    kv_size = model.config.num_key_value_heads * model.config.head_dim
    means = (num_tokens - window) // block + 1
    entries = sum(opened) * block
    if open_tile == 1:
        assert opened == [top_k + 1] * 2
    tile = min(num_tokens % open_tile, open_tile - 1) if open_tile > 1 else 0
    choices = 2 * (open_tile if open_tile > 1 else 1) * 2 * (top_k + 1)  # K = 2, int32
    assert tile < open_tile
    read = 3 * 2 * window * kv_size + 2 * entries * kv_size + 2 * means * kv_size
    assert count.elements - read in range(choices + 1)


def _record_open_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of blocks that each routed layer reads in a step of one token."""
    found: list[int] = []
    open_entries = routed_decode._open_entries

    def record(choices: Tensor, step: Any, block: int) -> Any:
        entries, seen = open_entries(choices, step, block)
        found.append(entries.shape[3] // block)
        return entries, seen

    monkeypatch.setattr(routed_decode, "_open_entries", record)
    return found


class CountOperations(TorchDispatchMode):
    """Counts the operations that compute something; a GPU gets a launch for each."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if _holds(x)}
        in_place = func._schema.is_mutable
        if _holds(result) and (in_place or result.untyped_storage().data_ptr() not in inputs):
            self.count += 1
        return result


def _holds(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 0


@torch.no_grad()
def test_a_new_token_needs_few_operations() -> None:
    """Decoding one sequence on a GPU waits for the host, which launches operations."""

    def operations(num_layers: int) -> int:
        route = {"block": 16, "top_k": 2, "stretch": 4, "open_tile": 16, "pool": 4}
        model = folded_model(window=64, route=route, num_hidden_layers=num_layers)
        cache = FoldCache(model.config)
        for tokens in (200, 1):
            model(torch.randint(256, (1, tokens)), past_key_values=cache)
        with CountOperations() as operations:
            model(torch.randint(256, (1, 1)), past_key_values=cache)
        return operations.count

    # 42 of routed attention, and 23 of any Llama layer: norms, products, MLP, residuals.
    assert operations(2) - operations(1) <= 42 + 23


@torch.no_grad()
def test_kernels_decode_what_the_operations_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, kernels run in Triton's interpreter."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    route = {"block": 16, "top_k": 2, "stretch": 4, "open_tile": 16, "pool": 8}
    model = folded_model(window=16, route=route, num_hidden_layers=1).to(device)
    tokens = torch.randint(256, (2, 130), device=device)
    expected = model(tokens, use_cache=False).logits
    calls: list[int] = []

    def always(*_: Any) -> bool:
        calls.append(1)
        return True

    monkeypatch.setattr(routed_tensorlm, "uses_decode_kernels", always)
    cache = FoldCache(model.config)
    outs = [model(tokens[:, :126], past_key_values=cache).logits]
    outs += [model(token, past_key_values=cache).logits for token in tokens[:, 126:].split(1, 1)]
    assert len(calls) == 4
    assert relative_error(torch.cat(outs, dim=1), expected) < 1e-5


@torch.no_grad()
def test_kernels_need_a_cache_of_the_dtype_of_the_query(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt read in float32 and continued under autocast is decoded by operations."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    route = {"block": 32, "top_k": 2, "stretch": 4, "open_tile": 16, "pool": 16}
    model = folded_model(window=32, route=route, num_hidden_layers=1).to(device)
    tokens = torch.randint(256, (1, 202), device=device)
    used: list[bool] = []
    decide = routed_tensorlm.uses_decode_kernels

    def record(*arguments: Any) -> bool:
        used.append(decide(*arguments))
        return used[-1]

    monkeypatch.setattr(routed_tensorlm, "runs_kernels", lambda q: True)
    monkeypatch.setattr(routed_tensorlm, "uses_decode_kernels", record)
    cache = FoldCache(model.config)
    model(tokens[:, :200], past_key_values=cache)
    model(tokens[:, 200:201], past_key_values=cache)
    with torch.autocast(device, torch.bfloat16):
        out = model(tokens[:, 201:], past_key_values=cache).logits
        expected = model(tokens, use_cache=False).logits[:, -1:]
    assert used == [True, False]
    assert relative_error(out.float(), expected.float()) < 2e-2


@torch.no_grad()
def prompt_bytes(num_layers: int, length: int) -> tuple[int, int]:
    """Bytes of the cache of a prompt read at once, and what the pass needs beside it."""
    model = folded_model(window=8, route=ROUTE, num_hidden_layers=num_layers)
    tokens = torch.randint(256, (1, length))
    with PeakMemory() as memory:
        model(tokens[:, :1])
        before = memory.live  # weights count as soon as they are seen
        memory.restart()
        cache = FoldCache(model.config, expected=length)
        model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    kept = sum(buffer.nbytes for buffer in buffers(cache))
    return kept, memory.peak - before - kept


def test_a_prompt_needs_its_keys_and_values_and_one_layer_at_a_time() -> None:
    few, many, length = 2, 10, 400
    (kept, beside), (kept_by_many, beside_many) = (prompt_bytes(n, length) for n in (few, many))
    config = folded_model(window=8, route=ROUTE).config
    keys = 4 * config.num_key_value_heads * config.head_dim  # bytes a token
    spare = 8 + 64  # rows of keys rotated for the window
    means = length // ROUTE["block"]  # a block is one part
    recent = 2 * ROUTE["block"] + 64  # rows of keys that are not rotated
    choices = (ROUTE["open_tile"] - 1 + 64) * config.num_key_value_heads * (ROUTE["top_k"] + 1) * 4
    assert kept == few * ((2 * length + spare + means + recent) * keys + choices)
    assert kept_by_many == kept * many // few
    assert beside_many == beside  # no layer's hidden states stay


@torch.no_grad()
def test_a_window_layer_forgets_what_lies_before_its_window() -> None:
    model = folded_model(window=8, num_hidden_layers=1)
    cache = FoldCache(model.config)
    tokens = torch.randint(256, (1, 600))
    for token in tokens.split(1, dim=1):
        out = model(token, past_key_values=cache)
    (layer,) = cache.layers
    assert all(rows.buffer.shape[1] <= 8 + 64 + 8 for rows in layer.all_rows())
    assert relative_error(out.logits, model(tokens, use_cache=False).logits[:, -1:]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_chooses_what_training_chose(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = folded_model(window=8, route=ROUTE, num_hidden_layers=1).to(dtype)
    queries: list[tuple[Tensor, Tensor]] = []
    attend = routed_tensorlm.attend_routed

    def record(q: Tensor, k: Tensor, *others: Any) -> Tensor:
        queries.append((q, k))
        return attend(q, k, *others)

    monkeypatch.setattr("tensorlm.hf.attention_tensorlm.attend_routed", record)
    tokens = torch.randint(256, (1, 200))
    starts = torch.zeros(1, 200, dtype=torch.int32)
    starts[:, 70:] = 70
    positions = torch.arange(200)[None] - starts
    cache, found = FoldCache(model.config), []
    for at in range(0, 200, 1):
        model(tokens[:, at : at + 1], past_key_values=cache, position_ids=positions[:, at : at + 1])
        layer = cache.layers[0]
        assert isinstance(layer, RoutedLayer)
        assert layer.choice_rows.buffer is not None
        found.append(layer.choice_rows.buffer[:, layer.choice_rows.stop - 1].clone())
    q, k = (torch.cat(parts, dim=1) for parts in zip(*queries, strict=True))
    wanted = choose_blocks(q, k, window=8, block=4, top_k=2, doc_start=starts)
    chosen = torch.stack(found, dim=1)  # in any order, -1 for none
    assert torch.equal(chosen.sort(dim=-1).values, wanted.sort(dim=-1).values)
    assert (wanted[:, -1] > 0).any()


# ------------------------------------------------------------------------------------------ attach


@torch.no_grad()
def test_attached_model_is_the_same_inside_its_window_and_saves_itself(tmp_path: Path) -> None:
    tokens = torch.randint(3, 512, (2, 100))
    model = tiny_llama()
    before, weights = model(tokens).logits, dict(model.named_parameters())
    route = {"block": 8, "top_k": 2, "stretch": 4}
    assert attach(model, route=route, window=16, route_every=2) is model
    after = model(tokens).logits
    assert relative_error(after[:, :16], before[:, :16]) < 1e-5
    assert relative_error(after[:, 16:], before[:, 16:]) > 1e-3
    assert dict(model.named_parameters()).keys() == weights.keys()
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = model.generate(tokens, use_cache=False, **settings)
    assert torch.equal(model.generate(tokens, **settings), wanted)
    model.save_pretrained(tmp_path / "saved")
    again = load_folder(tmp_path / "saved")
    assert isinstance(again, TensorLMForCausalLM)
    assert again.config.route == route
    assert torch.equal(again(tokens).logits, after)


def test_routed_layers_are_attached_by_default() -> None:
    model = attach(tiny_llama())
    trained = load_config(ROOT / "configs/llama8b_32k.toml").model
    assert model.config.window == trained.window
    assert trained.route is not None
    route = trained.route.model_dump()
    assert model.config.route == {n: route[n] for n in ("block", "top_k", "stretch")}
    assert all(layer.self_attn.kind == "routed" for layer in model.model.layers)


@torch.no_grad()
def test_routing_to_all_blocks_is_full_attention() -> None:
    tokens = torch.randint(512, (2, 100))
    model = tiny_llama()
    before = model(tokens).logits
    attach(model, window=16, route={"block": 4, "top_k": 25, "stretch": 1})
    for use_cache in (False, True):
        assert relative_error(model(tokens, use_cache=use_cache).logits, before) < 1e-5


def test_gradient_checkpointing_changes_no_gradient() -> None:
    tokens = torch.randint(512, (2, 50))
    gradients = []
    for checkpointing in (False, True):
        model = tiny_llama().train()
        attach(model, window=8, route={"block": 4, "top_k": 2, "stretch": 2})
        if checkpointing:
            model.activation_checkpointing_enable()
        model(tokens, labels=tokens).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_adapters_train_on_an_attached_model_and_merge(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_llama()
    attach(model, window=8, route={"block": 4, "top_k": 2, "stretch": 2})
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    tokens = torch.randint(3, 512, (2, 50))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=tokens, labels=tokens).loss
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "tuned")
    with torch.no_grad():
        wanted = merged(tokens).logits
        assert torch.equal(load_folder(tmp_path / "tuned")(tokens).logits, wanted)


# --------------------------------------------------------------------------------- as transformers


@torch.no_grad()
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_compiles_without_a_break_in_the_graph_and_exports(inputs: dict[str, Tensor]) -> None:
    model = folded_model(window=8, route=ROUTE, route_every=2, num_hidden_layers=2)
    tokens = torch.randint(3, 256, (2, 50))
    wanted = model(tokens, **inputs).logits
    torch.compiler.reset()
    found = torch.compile(model, fullgraph=True, backend="eager")(tokens, **inputs)
    assert relative_error(found.logits, wanted) < 1e-5
    assert found.past_key_values.get_seq_length() == 50
    exported = torch.export.export(model, (tokens,), inputs)
    assert relative_error(exported.module()(tokens, **inputs).logits, wanted) < 1e-5


def test_gradients_flow_through_the_cache() -> None:
    model = folded_model(window=8, route=ROUTE, route_every=2, num_hidden_layers=2)
    tokens = torch.randint(3, 256, (2, 60))
    model(tokens, use_cache=False).logits[:, 30:].square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    for size in (5, 30):  # gathered, and in tiles
        model.zero_grad()
        cache = model(tokens[:, :30]).past_key_values
        parts = [
            model(part, past_key_values=cache).logits for part in tokens[:, 30:].split(size, 1)
        ]
        torch.cat(parts, dim=1).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert relative_error(parameter.grad, wanted[name]) < 1e-5, name


@torch.no_grad()
def test_what_inference_mode_made_can_be_used_outside_of_it() -> None:
    model = folded_model(window=8, route=ROUTE, num_hidden_layers=2)
    tokens = torch.randint(3, 256, (2, 50))
    with torch.inference_mode():
        out = model(tokens[:, :30])
    last = model(tokens[:, 30:], past_key_values=out.past_key_values).logits
    assert relative_error(last, model(tokens).logits[:, 30:]) < 1e-5
