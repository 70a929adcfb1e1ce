"""Packed and padded batches of a Hugging Face model: each document's logits are its own."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tensorlm.hf import attach
from tensorlm.hf.cache_tensorlm import FoldCache
from tensorlm.hf.modeling_tensorlm import TensorLMForCausalLM
from tests.hf.test_hf_generate import MODELS, folded_model
from tests.support.hf_models import relative_error, tiny_llama

Spans = Sequence[tuple[int, int]]  # (position of the first token, number of tokens), per document

PACKINGS: dict[str, Spans] = {
    "from 0": [(0, 40), (0, 30)],
    "from 1": [(1, 40), (1, 30)],
    "from elsewhere": [(7, 25), (3, 25), (11, 20)],
    "after a gap": [(0, 40), (100, 30)],
    "cut at both ends": [(35, 9), (0, 60), (0, 1)],
    "single tokens": [(0, 1), (0, 1), (0, 30), (0, 1), (0, 1), (0, 36)],
}


@pytest.fixture(params=[name for name in MODELS if name != "every kind"])
def model(request: pytest.FixtureRequest) -> TensorLMForCausalLM:
    return folded_model(**MODELS[request.param], num_hidden_layers=2)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(3, 256, (1, 70), generator=torch.Generator().manual_seed(1))


def positions_of(spans: Spans) -> Tensor:
    return torch.cat([torch.arange(first, first + size) for first, size in spans])[None]


def numbers_of(spans: Spans) -> Tensor:
    """1 1 1 2 2 3 ...: the number of each token's document."""
    return torch.cat([torch.full((size,), i + 1) for i, (_, size) in enumerate(spans)])[None]


def alone(model: TensorLMForCausalLM, tokens: Tensor, spans: Spans) -> Tensor:
    """The logits of each document by itself, one after the other."""
    parts = tokens.split([size for _, size in spans], dim=1)
    return torch.cat([model(part, use_cache=False).logits for part in parts], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("name", PACKINGS)
def test_positions_separate_documents_wherever_they_begin(
    model: TensorLMForCausalLM, tokens: Tensor, name: str
) -> None:
    spans = PACKINGS[name]
    wanted = alone(model, tokens, spans)
    for use_cache in (False, True):
        found = model(tokens, position_ids=positions_of(spans), use_cache=use_cache).logits
        assert relative_error(found, wanted) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", PACKINGS)
def test_packing_is_read_as_llama_reads_it(name: str) -> None:
    llama, folded = tiny_llama(), attach(tiny_llama(), [128])  # the axis is longer than the row
    tokens, positions = torch.randint(512, (1, 70)), positions_of(PACKINGS[name])
    wanted = llama(tokens, position_ids=positions, use_cache=False).logits
    found = folded(tokens, position_ids=positions, use_cache=False).logits
    assert relative_error(found, wanted) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("signal", ["mask", "mask and positions", "seq_idx", "cu_seq_lens", "all"])
def test_other_signals_separate_documents_as_positions_do(
    model: TensorLMForCausalLM, tokens: Tensor, signal: str
) -> None:
    spans = [(0, 20), (0, 33), (0, 17)]
    lengths = torch.tensor([0, 20, 53, 70], dtype=torch.int32)
    mask, positions = {"attention_mask": numbers_of(spans)}, {"position_ids": positions_of(spans)}
    lists = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}
    longest: dict[str, Any] = {"max_length_q": 33, "max_length_k": torch.tensor(33)}
    inputs: dict[str, Any] = {
        "mask": mask,
        "mask and positions": mask | positions,
        "seq_idx": {"seq_idx": numbers_of(spans).int() - 1},
        "cu_seq_lens": lists | longest,
        "all": positions | lists | longest | {"seq_idx": numbers_of(spans)},
    }[signal]
    found = model(tokens, **inputs).logits
    assert relative_error(found, alone(model, tokens, spans)) < 1e-5


@torch.no_grad()
def test_numbered_documents_with_padding_between_and_behind_them(
    model: TensorLMForCausalLM, tokens: Tensor
) -> None:
    mask = torch.tensor([[0] * 3 + [1] * 20 + [0] * 2 + [2] * 30 + [4] * 10 + [0] * 5])
    found = model(tokens, attention_mask=mask).logits
    for start, stop in ((3, 23), (25, 55), (55, 65)):
        wanted = model(tokens[:, start:stop]).logits
        assert relative_error(found[:, start:stop], wanted) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("named", ["positions", "positions of the prompt", "numbers"])
@pytest.mark.parametrize("size", [1, 7, 40])
def test_documents_continue_in_the_cache(
    model: TensorLMForCausalLM, tokens: Tensor, named: str, size: int
) -> None:
    """Two rows of other documents, a prompt of 45 tokens, then pieces of `size`."""
    rows: list[Spans] = [[(1, 20), (1, 50)], [(0, 30), (0, 40)]]
    batch = torch.cat([tokens, tokens.flip(1)])
    wanted = torch.cat([alone(model, batch[i : i + 1], rows[i]) for i in range(2)])
    positions = torch.cat([positions_of(spans) for spans in rows])
    numbers = torch.cat([numbers_of(spans) for spans in rows])
    cache, parts = FoldCache(model.config), []
    for start in (0, *range(45, 70, size)):
        stop = min(45 if start == 0 else start + size, 70)
        given = {"position_ids": positions[:, start:stop]}
        if named == "numbers":
            given = {"attention_mask": numbers[:, :stop]}
        elif named == "positions of the prompt" and start:
            given = {}
        parts.append(model(batch[:, start:stop], past_key_values=cache, **given).logits)
    assert relative_error(torch.cat(parts, dim=1), wanted) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 9, 25])
def test_documents_begin_after_a_cached_prompt(
    model: TensorLMForCausalLM, tokens: Tensor, size: int
) -> None:
    spans = [(0, 20), (0, 30), (4, 20)]
    positions = positions_of(spans)
    cache, parts = FoldCache(model.config), []
    for start in range(0, 70, size):
        piece = slice(start, start + size)
        inputs = {"position_ids": positions[:, piece], "past_key_values": cache}
        parts.append(model(tokens[:, piece], **inputs).logits)
    assert relative_error(torch.cat(parts, dim=1), alone(model, tokens, spans)) < 1e-5


@torch.no_grad()
def test_generate_goes_on_in_the_last_document(model: TensorLMForCausalLM, tokens: Tensor) -> None:
    """It counts positions from the start of the sequence, whatever the prompt's were."""
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cache = FoldCache(model.config)
    positions = positions_of([(1, 40), (1, 29)])
    model(tokens[:, :69], position_ids=positions, past_key_values=cache)
    for beams in (1, 3):
        wanted = model.generate(tokens[:, 40:], num_beams=beams, **settings)[:, 30:]
        again = FoldCache(model.config)
        model(tokens[:, :69], position_ids=positions, past_key_values=again)
        if beams > 1:
            again.batch_repeat_interleave(beams)
        found = model.generate(tokens, past_key_values=again, num_beams=beams, **settings)
        assert torch.equal(found[:, 70:], wanted)


@torch.no_grad()
def test_the_last_documents_follow_the_rows_of_the_cache(tokens: Tensor) -> None:
    model = folded_model([8], num_hidden_layers=1)
    batch = tokens[:, :60].view(3, 20)
    starts = torch.tensor([[4], [9], [15]])
    positions = torch.arange(20) - torch.where(torch.arange(20) < starts, 0, starts)
    new = torch.tensor([[5], [6], [7]])
    wanted = torch.cat([model(torch.cat([batch[i : i + 1, s:], new[i : i + 1]], 1)).logits[:, -1]
                        for i, s in enumerate(starts.flatten().tolist())])  # fmt: skip
    cache = FoldCache(model.config)
    model(batch, position_ids=positions, past_key_values=cache)
    order = torch.tensor([2, 0, 1])
    cache.reorder_cache(order)
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.batch_repeat_interleave(2)
    kept = order[[0, 0, 2, 2]]
    found = model(new[kept], past_key_values=cache).logits[:, -1]
    assert relative_error(found, wanted[kept]) < 1e-5
    cache.reset()
    assert relative_error(model(batch, past_key_values=cache).logits, model(batch).logits) < 1e-6


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"position_ids": torch.arange(70)[None] // 2}, "position_ids must count up by one"),
        ({"position_ids": torch.arange(70)[None] // 3}, "position_ids must count up by one"),
        ({"position_ids": torch.arange(70)[None] * 2}, "position_ids must count up by one"),
        ({"position_ids": torch.arange(70).flip(0)[None]}, "position_ids must count up by one"),
        ({"position_ids": torch.arange(70)[None] / 2}, "position_ids must be integers"),
        ({"position_ids": torch.arange(70)}, r"of shape \[1, 70\], got torch.int64 \[70\]"),
        ({"position_ids": torch.zeros(3, 1, 70).long()}, r"of shape \[1, 70\]"),
        ({"attention_mask": torch.tensor([[2] * 40 + [1] * 30])}, "numbers that increase"),
        (
            {"attention_mask": torch.tensor([[1] * 40 + [2] * 20 + [1] * 10])},
            "numbers that increase",
        ),
        (
            {"attention_mask": torch.tensor([[1] * 40 + [0] + [1] * 29])},
            "padding only outside documents",
        ),
        ({"attention_mask": torch.zeros(1, 70) - 1e9}, "numbers that increase"),
        ({"attention_mask": torch.ones(1, 1, 70, 70)}, r"must have shape \[1, 70\]"),
        ({"attention_mask": {"full_attention": None}}, r"must have shape \[1, 70\] .* got dict"),
        ({"cu_seq_lens_q": torch.tensor([0, 40, 71])}, "must begin at 0, increase"),
        ({"cu_seq_lens_q": torch.tensor([1, 40, 70])}, "must begin at 0, increase"),
        ({"cu_seq_lens_q": torch.tensor([0, 50, 40, 70])}, "must begin at 0, increase"),
        ({"cu_seq_lens_k": torch.tensor([0, 70])}, "cu_seq_lens_q must be given"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 70]), "cu_seq_lens_k": torch.tensor([0, 90])},
            "cu_seq_lens_k must equal it",
        ),
        ({"seq_idx": torch.zeros(1, 69).int()}, r"seq_idx must be integers of shape \[1, 70\]"),
    ],
)
def test_signals_that_have_no_meaning_are_refused(
    tokens: Tensor, inputs: dict[str, Any], message: str
) -> None:
    model = folded_model([8], num_hidden_layers=1)
    for use_cache in (False, True):
        with pytest.raises(ValueError, match=message):
            model(tokens, use_cache=use_cache, **inputs)


def test_lists_of_lengths_need_one_row_without_a_cache(tokens: Tensor) -> None:
    model = folded_model([8], num_hidden_layers=1)
    lengths = torch.tensor([0, 35, 70])
    with pytest.raises(ValueError, match=r"single row .*got \[3\] for 2 rows"):
        model(tokens.view(2, 35), cu_seq_lens_q=lengths)
    cache = model(tokens).past_key_values
    with pytest.raises(ValueError, match="70 cached tokens"):
        model(tokens, past_key_values=cache, cu_seq_lens_q=lengths)


@torch.no_grad()
def test_a_row_that_ends_in_padding_cannot_go_on(tokens: Tensor) -> None:
    model = folded_model([8], num_hidden_layers=1)
    mask = torch.ones_like(tokens)
    mask[:, 60:] = 0
    cache = model(tokens, attention_mask=mask).past_key_values
    with pytest.raises(ValueError, match="padding only outside documents"):
        model(tokens[:, :1], past_key_values=cache)
    new = model(tokens[:, :1], past_key_values=cache, position_ids=torch.tensor([[0]])).logits
    assert relative_error(new, model(tokens[:, :1]).logits) < 1e-5  # a document of its own
