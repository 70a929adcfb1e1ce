"""Generation: the cache changes no token, and a new token reads n_1 + T / n_1 entries of it."""

import io
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from tensorlm.data.tokenizer.tokenizers import DocumentEncoder, load_tokenizer
from tensorlm.hf.cache_tensorlm import FoldCache, GrowingBuffer
from tensorlm.hf.configuration_tensorlm import TensorLMConfig
from tensorlm.hf.export_folder import export_checkpoint
from tensorlm.hf.load_folder import load_folder
from tensorlm.hf.modeling_tensorlm import TensorLMForCausalLM
from tensorlm.runtime.errors import UserError
from tests.support.hf_models import launcher_here, random_checkpoint, relative_error
from tests.support.launching import ROOT

ROUTE = {"block": 4, "top_k": 2, "stretch": 4, "open_tile": 4}
MODELS: dict[str, dict[str, Any]] = {
    "one axis": {"fold": [16]},
    "two axes": {"fold": [4, 8]},
    "hybrid": {"fold": [8], "full_every": 2},
    "routed": {"window": 8, "route": ROUTE},
    "every kind": {"fold": [8], "route": ROUTE, "layers": ["routed", "window", "strided", "full"]},
}


def folded_model(
    fold: list[int] | None = None, full_every: int = 0, **changes: Any
) -> TensorLMForCausalLM:
    torch.manual_seed(0)
    fields = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.25,
        "hop_bias_init": 0.5,
    }
    config = TensorLMConfig(fold=fold, full_every=full_every, **(fields | changes))
    return TensorLMForCausalLM(config).eval()


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> TensorLMForCausalLM:
    return folded_model(**MODELS[request.param])


@pytest.fixture
def batch() -> dict[str, Any]:
    """Two prompts of 90 and 81 tokens, the shorter one padded on the left."""
    torch.manual_seed(1)
    tokens = torch.randint(3, 256, (2, 90))
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    tokens[1, :9] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def generate(model: TensorLMForCausalLM, **inputs: Any) -> Tensor:
    """Tokens [B, T + 30], never ended early."""
    settings = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(**(settings | inputs))


def test_cache_and_prefill_in_chunks_change_no_token(
    model: TensorLMForCausalLM, batch: dict[str, Any]
) -> None:
    wanted = generate(model, **batch, use_cache=False)
    assert len(wanted[:, 90:].unique()) > 20  # not one token over and over
    assert torch.equal(generate(model, **batch), wanted)
    for size in (3, 23, 64):
        assert torch.equal(generate(model, **batch, prefill_chunk_size=size), wanted)


@torch.no_grad()
def test_a_loop_that_hands_the_cache_on_gives_the_tokens_of_generate(
    model: TensorLMForCausalLM, batch: dict[str, Any]
) -> None:
    tokens = batch["input_ids"][:1]
    wanted = generate(model, input_ids=tokens)
    out = model(tokens, use_cache=True)
    for _ in range(30):
        new = out.logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, new], dim=1)
        out = model(new, past_key_values=out.past_key_values)
    assert torch.equal(tokens, wanted)
    assert model(tokens, use_cache=False).past_key_values is None


def test_cache_changes_no_beam_and_no_sample(
    model: TensorLMForCausalLM, batch: dict[str, Any]
) -> None:
    # Both rows cross token 96, where a new row of every fold, and a new block, begins.
    few: dict[str, Any] = {**batch, "max_new_tokens": 18}
    beams = generate(model, **few, use_cache=False, num_beams=3)
    assert torch.equal(generate(model, **few, num_beams=3), beams)
    greedy = generate(model, **few)
    assert not torch.equal(beams, greedy)
    samples = []
    for use_cache in (False, True):
        torch.manual_seed(3)
        samples.append(generate(model, **few, use_cache=use_cache, do_sample=True, top_k=50))
    assert torch.equal(*samples)
    assert not torch.equal(samples[0], greedy)


def test_left_padding_changes_no_token(model: TensorLMForCausalLM, batch: dict[str, Any]) -> None:
    together = generate(model, **batch)
    alone = generate(model, input_ids=batch["input_ids"][1:, 9:])
    assert torch.equal(together[1, 9:], alone[0])


@torch.no_grad()
def test_right_padding_and_packed_positions_change_no_logit(model: TensorLMForCausalLM) -> None:
    first, second = torch.randint(3, 256, (1, 37)), torch.randint(3, 256, (1, 50))
    wanted = torch.cat([model(first).logits, model(second).logits], dim=1)
    packed = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(37), torch.arange(50)])[None]
    found = model(packed, position_ids=positions).logits
    assert relative_error(found, wanted) < 1e-5
    assert relative_error(model(packed).logits, wanted) > 1e-2  # the positions did it
    mask = torch.ones_like(packed)
    mask[:, 37:] = 0
    found = model(packed, attention_mask=mask).logits[:, :37]
    assert relative_error(found, wanted[:, :37]) < 1e-5


def test_what_has_no_meaning_is_refused(model: TensorLMForCausalLM, batch: dict[str, Any]) -> None:
    tokens = batch["input_ids"]
    mask = torch.ones_like(tokens)
    mask[0, 40] = 0
    with pytest.raises(ValueError, match="padding only outside documents"):
        model(tokens, attention_mask=mask)
    with pytest.raises(ValueError, match=r"must have shape \[2, 90\]"):
        model(tokens, attention_mask=torch.ones(2, 1, 90, 90))
    with pytest.raises(ValueError, match="output_attentions"):
        model(tokens, output_attentions=True)
    with pytest.raises(ValueError, match="must be a FoldCache"):
        model(tokens, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="assisted generation"):
        generate(model, input_ids=tokens[:1], prompt_lookup_num_tokens=3)


def test_hidden_states_are_those_between_the_layers(model: TensorLMForCausalLM) -> None:
    tokens = torch.randint(256, (1, 20))
    states = model(tokens, output_hidden_states=True).hidden_states
    assert len(states) == 1 + model.config.num_hidden_layers
    assert torch.equal(states[0], model.get_input_embeddings()(tokens))
    assert torch.equal(states[-1], model.model(tokens).last_hidden_state)
    assert len({state.sum().item() for state in states}) == len(states)


class CountReads(TorchDispatchMode):
    """Counts the elements of the given buffers that operations read."""

    def __init__(self, buffers: list[Tensor]) -> None:
        super().__init__()
        self.storages = {buffer.untyped_storage().data_ptr() for buffer in buffers}
        self.elements = 0

    def holds(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage().data_ptr() in self.storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if self.holds(leaf)]
        if inputs and not self.holds(result):  # views read nothing
            gathers = func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_select.default)
            self.elements += sum(x.numel() for x in ([result] if gathers else inputs))
        return result


def buffers(cache: FoldCache) -> Iterator[Tensor]:
    for layer in cache.layers:
        for rows in layer.all_rows():
            yield rows.buffer


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [500, 2000])
def test_a_new_token_reads_the_sum_of_the_axes(num_tokens: int) -> None:
    n_1 = 32
    model = folded_model([n_1], num_hidden_layers=3)
    cache = FoldCache(model.config)
    model(torch.randint(256, (1, num_tokens)), past_key_values=cache, use_cache=True)
    token = torch.randint(256, (1, 1))
    with CountReads(list(buffers(cache))) as count:
        model(token, past_key_values=cache, use_cache=True)
    config = model.config
    kv_size = config.num_key_value_heads * config.head_dim
    state_size = config.num_attention_heads * config.head_dim
    inner = n_1 * 2 * kv_size  # keys and values
    outer = (num_tokens // n_1) * (kv_size + state_size)  # keys and states
    assert count.elements == config.num_hidden_layers * (inner + outer)


def test_rows_hold_what_was_appended_and_copy_little() -> None:
    for keep in (None, 5):
        rows, wanted, num_buffers, last = GrowingBuffer(keep), torch.empty(2, 0, 3), 0, 0
        for size in (7, 1, 1, 60, 100, 66, 1, *[1] * 400):
            new = torch.randn(2, size, 3)
            kept = wanted if keep is None else wanted[:, -keep:]
            wanted = torch.cat((kept, new), dim=1)
            assert torch.equal(rows.append(new), wanted)
            assert rows.buffer is not None
            num_buffers += rows.buffer.data_ptr() != last
            last = rows.buffer.data_ptr()
        assert num_buffers < 12
    rows = GrowingBuffer(expected=100)
    for size in (60, 39, 1):
        rows.append(torch.randn(1, size))
        assert rows.buffer is not None
        assert rows.buffer.shape[1] == 100
    assert rows.append(torch.randn(1, 1)).shape[1] == 101


def test_launcher_streams_what_plain_generation_gives(
    tmp_path: Path, config: Path, data: Path
) -> None:
    checkpoint, settings, _ = random_checkpoint(config, "model.fold=[4,8]")
    folder = tmp_path / "hf"
    export_checkpoint(checkpoint, settings, folder, "fp32", data / "tokenizer")
    prompt = "import os\n\n\ndef main(argv):\n" * 5
    command = [sys.executable, "launcher/generate.py", "--model", str(folder), "--prompt", "-"]
    command += ["--max-new-tokens", "40", "--prefill-chunk", "17"]
    # Unlike a pipe, it keeps the writes apart, however late they are read.
    reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with reader, writer:
        subprocess.run(command, cwd=ROOT, input=prompt.encode(), stdout=writer.fileno(), check=True)
        writer.send(b"END")
        pieces = list(filter(None, iter(lambda: reader.recv(1 << 16), b"END")))
    assert len(pieces) > 5  # it came as it was made
    tokenizer = load_tokenizer(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    model = TensorLMForCausalLM.from_pretrained(folder)
    tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    wanted = tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert b"".join(pieces).decode() == wanted + "\n"


@pytest.mark.parametrize("has_template", [True, False])
def test_a_prompt_begins_as_documents_did(
    tmp_path: Path, config: Path, data: Path, monkeypatch: pytest.MonkeyPatch, has_template: bool
) -> None:
    checkpoint, settings, _ = random_checkpoint(config)
    folder = tmp_path / "hf"
    export_checkpoint(checkpoint, settings, folder, "fp32", data / "tokenizer")
    if not has_template:
        fields = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(fields | {"post_processor": None}))
    prompts: list[Tensor] = []

    def record(self: TensorLMForCausalLM, input_ids: Tensor, **settings: Any) -> None:
        prompts.append(input_ids)

    monkeypatch.setattr(TensorLMForCausalLM, "generate", record)
    for prompt in ("import os", "<s>import os"):
        assert launcher_here("generate.py", "--model", folder, "--prompt", prompt) == 0
    document = DocumentEncoder(data / "tokenizer")(["import os"])[0].tolist()
    assert prompts[0].tolist() == [document[:-1]]
    assert [token for token in prompts[1][0].tolist() if token == 1] == [1]


def test_options_and_prompts_that_make_no_sense_are_one_line_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def errors(*arguments: str) -> list[str]:
        code = launcher_here("generate.py", "--model", tmp_path, "--prompt", *arguments)
        assert code == 2
        return capsys.readouterr().err.splitlines()

    assert errors("x")[0].startswith(f"error: {tmp_path}: must contain config.json")
    (tmp_path / "config.json").write_text("{}")
    numbers = ("--temperature", "-1", "--top-p", "2", "--seed", str(2**64))
    assert errors("x", *numbers, "--max-new-tokens", "0", "--prefill-chunk", "0") == [
        "error: --max-new-tokens: must be at least 1, got 0",
        "error: --temperature: must be 0 (greedy) or at least 1e-6, got -1.0",
        "error: --top-p: must be above 0 and at most 1, got 2.0",
        f"error: --seed: must be at least 0 and below 2**64, got {2**64}",
        "error: --prefill-chunk: must be at least 1, got 0",
    ]
    for number in ("nan", "inf", "1e-40"):
        assert len(errors("x", "--temperature", number)) == 1
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"abc\xff")))
    assert errors("-") == ["error: --prompt: must be UTF-8, got an invalid start byte at byte 3"]
    expected = "error: --prompt: must be UTF-8, got abc\\xff (correct it, or rename the file)"
    assert errors("abc\udcff") == [expected]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    for prompt in ("-", ""):
        assert errors(prompt) == ["error: --prompt: must not be empty"]


@pytest.mark.parametrize("tied", [False, True])
def test_damaged_folders_are_one_line(tmp_path: Path, config: Path, tied: bool) -> None:
    checkpoint, settings, _ = random_checkpoint(config, f"model.tie_embeddings={str(tied).lower()}")
    folder = tmp_path / "hf"
    export_checkpoint(checkpoint, settings, folder, "fp32", None)
    weights, fields = folder / "model.safetensors", folder / "config.json"
    content, good = weights.read_bytes(), json.loads(fields.read_text())
    load_folder(folder)
    for change, message in (
        ({"hidden_size": None}, r"cannot be loaded \(.*field 'hidden_size'"),
        ({"hidden_act": "?"}, r"cannot be loaded \(KeyError"),
        ({"num_hidden_layers": 3}, r"layers\.2\.input_layernorm\.weight is missing"),
        ({"fold": [4, 8]}, r"layers\.0\.self_attn\.hop_bias must have the shape"),
        ({"model_type": "gpt2"}, "hf: "),
    ):
        fields.write_text(json.dumps(good | change))
        with pytest.raises(UserError, match=message) as caught:
            load_folder(folder)
        assert "\n" not in str(caught.value)
    fields.write_text(json.dumps(good))
    weights.write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"hf: cannot be loaded \(SafetensorError: .*incomplete"):
        load_folder(folder)
