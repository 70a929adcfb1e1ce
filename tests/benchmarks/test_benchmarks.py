"""Benchmarks compare like with like."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

from tensorlm.benchmarks import decode, train
from tensorlm.benchmarks.routed_inputs import Route, agreeing_queries, union_of_neighbors
from tensorlm.benchmarks.train_methods import METHODS, open_ratio, shape_of
from tensorlm.commands import benchmark
from tensorlm.config import Config, ModelConfig, load_config
from tensorlm.model import Llama
from tensorlm.plan.planning import longest
from tensorlm.runtime.errors import UserError
from tests.support.forked import run_forked


@pytest.fixture
def tiny(config: Path) -> Config:
    return load_config(config, ["train.dtype=fp32"])


def test_all_methods_train_the_same_model_where_one_window_holds_the_row(tiny: Config) -> None:
    length = tiny.model.fold[0]  # the first hop sees it whole, so folding changes nothing
    tokens = torch.randint(0, tiny.model.vocab_size, (1, length))
    ours = train.build(tiny, "tensorized", length, torch.device("cpu"))
    full = train.build(tiny, "full", length, torch.device("cpu"))
    theirs = train.build(tiny, "huggingface", length, torch.device("cpu"))
    weights = {
        n.replace("self_attn.attention", "self_attn"): p for n, p in full.state_dict().items()
    }
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("hop_bias") for name in missing)
    heads = {n if n.startswith("lm_head") else f"model.{n}": p for n, p in weights.items()}
    theirs.load_state_dict(heads)
    expected = ours(tokens, None, tokens) / length
    torch.testing.assert_close(full(tokens, None, tokens) / length, expected)
    logits = theirs(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_every_method_is_measured_at_every_length(config: Path) -> None:
    route = "model.route={block=8, top_k=1, stretch=2}"
    tiny = load_config(config, ["train.dtype=fp32", route])
    rows = list(train.measure(tiny, [32, 64], METHODS, 1))
    assert {(row.method, row.length) for row in rows} == {
        (method, length) for method in METHODS for length in (32, 64)
    }
    assert all(math.isfinite(row.mfu) and row.seconds > 0 for row in rows)
    table = train.format_table(rows)
    assert len(table.splitlines()) == 2 + len(rows)
    assert "| full |" in table
    opened = {row.method: row.open_blocks for row in rows if row.length == 64}
    assert opened.pop("tensorized") >= 1 <= opened.pop("routed")
    assert all(math.isnan(ratio) for ratio in opened.values())


def test_a_method_is_the_same_shape_with_its_kind_of_layers(config: Path, tiny: Config) -> None:
    with pytest.raises(ValueError, match=r"routed: needs \[model.route\] and model.window"):
        shape_of(tiny.model, "routed")
    route = "model.route={block=8, top_k=1, stretch=2}"
    mixed = load_config(config, [route, "model.layers=['routed', 'full']"])
    for method in ("routed", "strided", "window", "full"):
        shape = ModelConfig.model_validate(shape_of(mixed.model, method).model_dump())
        assert set(shape.layer_kinds) == {method}
        assert shape.window_size == (0 if method == "full" else 16)
    assert shape_of(mixed.model, "tensorized") == mixed.model


@pytest.mark.parametrize("union", [2.0, 3.5])
def test_neighbors_of_the_attention_benchmark_open_as_many_blocks_as_asked(union: float) -> None:
    route = Route(window=64, block=16, top_k=4, stretch=1)
    k = torch.randn(1, 1024, 1, 16, generator=torch.Generator().manual_seed(0))
    q = agreeing_queries(k, 2, route, union)
    assert union_of_neighbors(q, k, route) == pytest.approx(union, rel=0.03)


def test_open_blocks_of_a_tile_are_counted() -> None:
    same = torch.tensor([0, 3, 5]).int().expand(1, 64, 2, 3)
    assert open_ratio(same) == 1
    each = torch.stack([torch.zeros(64), torch.arange(64) + 1], -1).int()[None, :, None]
    assert open_ratio(each) == 17 / 2  # the first block, and one more of each token
    assert open_ratio(torch.where(each > 0, -1, each)) == 1


@pytest.mark.parametrize("limit", [0, 15, 16, 100, 1000, 123_456])
def test_the_longest_length_is_found(limit: int) -> None:
    found = longest(lambda length: length <= limit, 16, precision=32)
    assert found % 16 == 0
    assert found <= limit < found + max(16, found / 32) + 16


def test_launcher_writes_numbers_and_a_plot(tmp_path: Path, config: Path) -> None:
    arguments = [
        "train", "--config", str(config), "--lengths", "32,64", "--methods", "tensorized,full",
        "--repeats", "1", "--json", str(tmp_path / "rows.json"),
        "--plot", str(tmp_path / "rows.png"),
    ]  # fmt: skip
    done = run_forked("benchmark.py", *arguments)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "rows.json").read_text())
    assert [row["length"] for row in content["rows"]] == [32, 64, 32, 64]
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    longest = run_forked("benchmark.py", *arguments, "--longest")
    assert longest.returncode == 2
    assert longest.stderr.splitlines() == ["error: --longest: needs a CUDA device"]


def test_methods_of_our_own_follow_the_memory_settings(config: Path) -> None:
    saving = ["train.activation_offload=true", "train.mlp_chunk=16"]
    settings = load_config(config, ["train.recompute=block", *saving])
    for method in ("tensorized", "full"):
        model = train.build(settings, method, 64, torch.device("cpu"))
        assert isinstance(model, Llama)
        assert model.offload is not None
        assert model.layers[0].mlp.chunk == 16


def test_data_is_prepared_planned_and_served(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tensorlm.benchmarks.data._SERVE_SECONDS", 0.01)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # which the launcher sets for good
    size = ["--documents", "1000", "--max-bytes", "300000"]
    command = ["benchmark.py", "data", *size, "--tokenizer", str(data / "tokenizer")]
    monkeypatch.setattr(sys, "argv", command)
    assert benchmark.main() == 0
    lines = capsys.readouterr().out.splitlines()
    plans, (prepared,), served = (
        [line for line in lines if line.startswith(kind)]
        for kind in ("plan: ", "prepare: ", "serve: ")
    )
    assert [re.findall(r"[\d,]+", line)[0] for line in plans] == ["1,000"] * 3
    assert re.search(r"tokenizer alone [\d.]+ MB/s, a worker [\d.]+ MB/s", prepared)
    assert all(re.search(r"rows of [\d,]+: [1-9]\d* M tokens/s", line) for line in served)
    assert len(served) == 3


def test_decoding_is_measured_for_both_methods_after_every_prompt(config: Path) -> None:
    route = "model.route={block=4, top_k=2, stretch=4}"
    routed = load_config(config, ["train.dtype=fp32", "model.fold=[]", "model.window=8", route])
    rows = list(decode.measure(routed, [24, 48], decode.METHODS, 2))
    assert {(row.method, row.length) for row in rows} == {
        (method, length) for method in decode.METHODS for length in (24, 48)
    }
    assert all(row.tokens_per_second > 0 for row in rows)
    table = decode.format_table(rows)
    assert len(table.splitlines()) == 2 + len(rows)
    full = load_config(config, ["model.fold=[]"])
    with pytest.raises(UserError, match="model: must have window, strided or routed layers"):
        next(decode.measure(full, [24], decode.METHODS, 2))
