"""Were the needle's blocks open: the choices of decoding, against those of a whole row."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fold_parallel import Grid
from tensor_attention import choose_blocks
from tensorlm.config import Config, load_config
from tensorlm.evaluation.model import EvaluatedModel, open_random_model
from tensorlm.evaluation.needle_blocks import find_needle, open_shares
from tensorlm.evaluation.recall import watching_projections
from tensorlm.evaluation.report import format_report
from tensorlm.evaluation.run import evaluate
from tensorlm.evaluation.text import held_out_documents
from tests.support.launching import TINY
from tests.tensor_attention.cases import read_beyond_window

ROUTED = [
    "model.fold=[]", "model.window=16", "model.num_layers=3",
    "model.layers=['routed', 'window', 'routed']", "train.dtype=fp32", "model.init_std=0.5",
]  # fmt: skip


def routed_config(path: Path, data: Path, *overrides: str) -> Config:
    file = path / "config.toml"
    file.write_text(TINY.format(run=path / "run", data=data))
    return load_config(file, [*ROUTED, *overrides])


def open_model(config: Config) -> EvaluatedModel:
    return open_random_model(config, torch.device("cpu"), Grid())


def test_a_needle_is_where_its_characters_are(tmp_path: Path, data: Path) -> None:
    model = open_model(routed_config(tmp_path, data, "model.route={block=8,top_k=2,stretch=2}"))
    text = "The pass key is 48213. Remember it. 48213 is the pass key. What is it?"
    needle, ids = find_needle(model, text, "48213"), model.encode(text)
    assert "".join(model.tokenizer.decode([ids[i]]).strip() for i in needle.tokens) == "48213" * 2
    assert needle.size == len(needle.tokens) // 2


def shares_of_a_whole_row(
    model: EvaluatedModel, tokens: Tensor, queries: range, needle: list[int]
) -> list[float]:
    """By the choice that each routed layer makes when it reads prompt and answer at once."""
    shape, starts = model.shape, torch.zeros_like(tokens, dtype=torch.int32)
    route, window = shape.route, shape.window_size
    assert route is not None
    shares: list[float] = []

    def seen(_: int, q: Tensor, k: Tensor) -> None:
        q, k = (x.unflatten(-1, (-1, shape.head_size)) for x in (q, k))
        choice = choose_blocks(
            q, k, window=window, block=route.block, top_k=route.top_k, pool=route.pool
        )
        read = read_beyond_window(choice, starts, window, route.block, route.open_tile)[0]
        for t in queries:
            read[:, t, max(0, t - window + 1) : t + 1] = True
        shares.append(read[:, queries][..., needle].double().mean().item())

    with torch.no_grad(), watching_projections(model.network, model.routed_layers, seen):
        model.network(tokens)
    return shares


@pytest.mark.parametrize("open_tile", [1, 16])
@pytest.mark.parametrize("chunk", [1000, 23])
def test_shares_are_those_of_a_whole_row(
    tmp_path: Path, data: Path, open_tile: int, chunk: int
) -> None:
    route = f"model.route={{block=4, top_k=3, stretch=2, open_tile={open_tile}}}"
    model = open_model(routed_config(tmp_path, data, route, f"eval.prefill_chunk={chunk}"))
    text = "def main(argv):\n    return 48213\n" * 3 + "import os\n\n\ndef main():\n" * 5
    ids, needle = model.encode(text), find_needle(model, text, "48213")
    needle = type(needle)(needle.tokens, 5)
    found: list[Any] = []

    def look(cache: Any) -> None:
        found.extend(open_shares(cache, needle, len(ids)))

    model.generate(ids, 12, look)
    tokens = torch.tensor([ids])
    for _ in range(4):
        tokens = torch.cat((tokens, model.network(tokens)[:, -1:].argmax(-1)), dim=1)
    assert model.tokenizer.eos_token_id not in tokens
    queries = range(len(ids) - 1, len(ids) + 4)
    expected = shares_of_a_whole_row(model, tokens, queries, needle.tokens)
    assert found == pytest.approx(expected)
    assert 0 < min(expected) <= max(expected) < 1


def test_a_report_has_them_of_answered_and_failed_prompts(tmp_path: Path, data: Path) -> None:
    config = routed_config(
        tmp_path, data, "model.route={block=8, top_k=2, stretch=2}", "eval.lengths=[160,250]",
        "eval.tasks=['passkey']", "eval.depths=3", "eval.repeats=1",
    )  # fmt: skip
    model = open_model(config)
    documents = held_out_documents(config, model.tokenizer, data / "tokenizer")
    report = evaluate(config.eval, model, documents)
    found = report.needle_blocks
    lengths = sorted({cell.length for cell in report.passkey})
    assert [(r.length, r.layer) for r in found] == [(n, i) for n in lengths for i in (0, 2)]
    for entry in found:
        assert (entry.num_answered, entry.num_failed, entry.answered) == (0, 3, None)
        assert entry.failed is not None
        assert 0 < entry.failed < 1
    table = format_report([report])
    assert "Were the needle's blocks open?" in table
    assert "prompts failed" in table
    assert "prompts answered" not in table  # there were none
