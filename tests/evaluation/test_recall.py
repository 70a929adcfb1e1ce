"""Recall of the choice, against the operator's own weights and choices made one by one."""

from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fold_parallel import Grid, create_grid
from tensor_attention import Rotary, choose_blocks, routed_attention
from tensorlm.checkpoint import select_checkpoint
from tensorlm.config import RouteConfig, load_config
from tensorlm.evaluation.choice_mass import Masses, choice_masses
from tensorlm.evaluation.model import (
    EvaluatedModel,
    open_checkpoint_model,
    open_hugging_face_model,
    open_random_model,
)
from tensorlm.evaluation.recall import measure_recall, watching_projections
from tensorlm.evaluation.recall_summary import (
    layer_recall_of_others,
    recall_by_distance,
    recall_of_others,
)
from tensorlm.evaluation.results import Recall, Report
from tensorlm.evaluation.run import evaluate
from tensorlm.evaluation.text import Spans, held_out_documents
from tensorlm.hf.export_folder import export_checkpoint
from tensorlm.model.layers import rotary_table as model_rotary_table
from tests.evaluation.solver import save_untrained
from tests.support.distributed import run_distributed
from tests.support.launching import TINY
from tests.tensor_attention.cases import (
    LargestTensor,
    doc_start_of,
    inputs,
    read_beyond_window,
    rotary_table,
)

EVERYTHING = 10_000


def measure(
    q: Tensor, k: Tensor, documents: list[int], queries: range, edges: list[int], **numbers: Any
) -> Masses:
    route = RouteConfig(**{"open_tile": 1, **numbers})
    return choice_masses(
        q, k, window=5, route=route, queries=queries, edges=edges,
        doc_start=doc_start_of(documents).expand(q.shape[0], -1),
        rotary=rotary_table(q.shape[1], q.shape[3]),
    )  # fmt: skip


def weights_of_everything(
    q: Tensor, k: Tensor, doc_start: Tensor, rotary: Rotary, route: RouteConfig
) -> Tensor:
    """[B, H, T, T]: weights of the routed operator with every block open (values = identity)."""
    num_tokens = q.shape[1]
    identity = torch.eye(num_tokens, dtype=q.dtype)[None, :, None]
    v = identity.expand(q.shape[0], num_tokens, k.shape[2], num_tokens)
    return routed_attention(
        q, k, v, window=5, block=route.block, top_k=EVERYTHING, stretch=route.stretch,
        doc_start=doc_start, rotary=rotary, backend="dense",
    ).transpose(1, 2)  # fmt: skip


def one_by_one(
    q: Tensor,
    k: Tensor,
    documents: list[int],
    queries: range,
    edges: list[int],
    route: RouteConfig,
    rotary: Rotary | None = None,
) -> tuple[np.ndarray, int]:
    """`choice_masses` by loops over queries, blocks and all sets of random blocks."""
    doc_start = doc_start_of(documents).expand(q.shape[0], -1)
    rotary = rotary or rotary_table(q.shape[1], q.shape[3])
    weights = weights_of_everything(q, k, doc_start, rotary, route).unflatten(1, (k.shape[2], -1))
    choice = choose_blocks(
        q, k, window=5, block=route.block, top_k=route.top_k, pool=route.pool,
        doc_start=doc_start, backend="dense",
    )  # fmt: skip
    read = read_beyond_window(choice, doc_start, 5, route.block, route.open_tile)
    table, number = np.zeros((len(edges), 4)), 0
    for b in range(q.shape[0]):
        for head in range(k.shape[2]):
            for t in queries:
                start = int(doc_start[b, t])
                mass = weights[b, head, :, t].sum(0)
                blocks = [
                    range(first, min(first + route.block, t - 5 + 1))
                    for first in range(start, t - 5 + 1, route.block)
                ]
                opened = [bool(read[b, head, t, keys.start]) for keys in blocks]
                count = sum(opened)
                number += count
                by_mass = sorted(blocks, key=lambda r: -float(mass[r.start : r.stop].sum()))
                sets = list(combinations(blocks[1:], max(0, count - 1)))
                for block in blocks:
                    random = 1.0
                    if block != blocks[0]:
                        random = sum(block in chosen for chosen in sets) / len(sets)
                    shares = [1, opened[blocks.index(block)], block in by_mass[:count], random]
                    for u in block:
                        (bin_,) = [i for i, (a, z) in enumerate(pairwise(edges)) if a <= t - u < z]
                        line = 0 if block == blocks[0] else 1 + bin_
                        table[line] += float(mass[u]) * np.array(shares, float)
    return table, number


@pytest.mark.parametrize("open_tile", [1, 7])
@pytest.mark.parametrize(
    ("documents", "queries"), [([60], range(40, 60)), ([9, 1, 27, 23], range(0, 60))]
)
def test_masses_are_those_of_the_operator_one_by_one(
    documents: list[int], queries: range, open_tile: int
) -> None:
    q, k, _ = inputs(60, heads=4, key_heads=2, batch=2)
    q *= 3
    route = RouteConfig(block=4, top_k=2, stretch=3, open_tile=open_tile)
    edges = [5, 9, 20, 60]
    table, number = one_by_one(q, k, documents, queries, edges, route)
    found = measure(q, k, documents, queries, edges, **route.model_dump())
    assert found.opened.item() == number
    np.testing.assert_allclose(found.table, table, rtol=1e-9, atol=1e-12)
    everything, chosen, best, random = found.table.sum(0).tolist()
    assert random < chosen < best < everything


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = inputs(90, heads=4, key_heads=2)
    numbers = {"block": 4, "top_k": 3, "stretch": 2, "open_tile": 16}

    def measured() -> Masses:
        return measure(q, k, [90], range(13, 90), [5, 10, 40, 90], **numbers)

    whole = measured()
    monkeypatch.setattr("tensorlm.evaluation.choice_mass._TILE_SCORES", 1)
    alone = measured()
    assert alone.opened == whole.opened
    torch.testing.assert_close(alone.table, whole.table, rtol=1e-12, atol=1e-13)


def test_nothing_grows_with_the_square_of_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorlm.evaluation.choice_mass._TILE_SCORES", 1 << 14)
    q, k, _ = inputs(4096, heads=2, key_heads=1)
    with LargestTensor() as largest:
        measure(q, k, [4096], range(4064, 4096), [5, 4096], block=4, top_k=3, stretch=4)
    assert largest.numel <= 16 * 4096  # 32 queries of 2 heads: 64 x 4,096 scores at once


def test_a_choice_of_all_blocks_holds_everything() -> None:
    q, k, _ = inputs(60, heads=4, key_heads=2)
    numbers = {"block": 4, "top_k": EVERYTHING, "stretch": 2}
    found = measure(q, k, [20, 40], range(60), [5, 60], **numbers)
    for column in found.table.unbind(1)[1:]:
        torch.testing.assert_close(column, found.table[:, 0], rtol=1e-12, atol=0)


def test_a_planted_key_is_found_at_its_distance() -> None:
    q, k, _ = inputs(96, heads=2, key_heads=1, dim=8)
    q, k = q * 0.01, k * 0.01
    q[:, -8:, :, 3] = k[:, 41, :, 3] = 30.0  # the slowest pair: rotation hardly turns it
    found = measure(q, k, [96], range(88, 96), [5, 40, 60, 96], block=4, top_k=1, stretch=1)
    first, near, planted, far = found.table
    assert planted[1:3].tolist() == pytest.approx([16, 16], rel=1e-4)  # of 8 queries, 2 heads
    assert max(first[0], near[0], far[0]) < 1e-3
    assert planted[3] < 0.1 * planted[0]


# Through a model.


ROUTED = [
    "model.fold=[]", "model.window=16", "model.num_layers=3",
    "model.layers=['window', 'routed', 'routed']",
    "model.route={block=8, top_k=2, stretch=2, open_tile=4}", "train.dtype=fp32",
    "model.init_std=0.3",
]  # fmt: skip


def random_model(path: Path, data: Path, grid: Grid, *overrides: str) -> EvaluatedModel:
    file = path / f"config{grid.rank}.toml"
    file.write_text(TINY.format(run=path / "run", data=data))
    config = load_config(file, [*ROUTED, *overrides])
    return open_random_model(config, torch.device("cpu"), grid)


def spans(num: int, length: int) -> Spans:
    rng = np.random.default_rng(0)
    return Spans(rng.integers(512, size=(num, length + 1)), np.arange(num))


def test_layers_and_distances_add_up_in_a_model(tmp_path: Path, data: Path) -> None:
    model = random_model(tmp_path, data, Grid())
    found = measure_recall(model, spans(2, 128), 96, 20)
    assert [(r.layer, r.length, r.num_queries) for r in found] == [(1, 96, 40), (2, 96, 40)]
    for recall in found:
        assert [(r.start, r.stop) for r in recall.distances] == [(16, 32), (32, 64), (64, 96)]
        assert 0 < recall.random < recall.chosen <= recall.best < 1
        # To a random model one key is about as good as another.
        assert recall.beyond == pytest.approx(70 / 86, abs=0.1)
        assert 3 <= recall.opened < 9
        others = sum(r.mass * r.chosen for r in recall.distances)
        assert others + recall.first * recall.beyond == pytest.approx(recall.chosen * recall.beyond)
    everything = random_model(tmp_path, data, Grid(), "model.route.top_k=99")
    for recall in measure_recall(everything, spans(2, 128), 96, 20):
        assert recall.chosen == pytest.approx(1, abs=1e-6)
        assert recall.opened == pytest.approx(9.2)  # of queries 76 to 95


def test_recall_without_the_first_block_is_that_of_float64_one_by_one(
    tmp_path: Path, data: Path
) -> None:
    settings = ("model.window=5", "model.route={block=4, top_k=2, stretch=2, open_tile=3}")
    model, windows = random_model(tmp_path, data, Grid(), *settings), spans(2, 48)
    layers = model.routed_layers
    shape, found = model.shape, measure_recall(model, windows, 48, 12)
    assert shape.route is not None
    cos, sin = (x.double() for x in model_rotary_table(shape, 48, model.device))
    tables = np.zeros((len(layers), 5, 4))
    for window in torch.from_numpy(windows.tokens):
        seen: dict[int, tuple[Tensor, Tensor]] = {}
        with watching_projections(
            model.network, layers, lambda layer, *pair, seen=seen: seen.update({layer: pair})
        ):
            model.losses(window[None])
        for i, layer in enumerate(layers):
            q, k = (x.double().unflatten(-1, (-1, shape.head_size)) for x in seen[layer])
            tables[i] += one_by_one(
                q, k, [48], range(36, 48), [5, 10, 20, 40, 48], shape.route, Rotary(cos, sin)
            )[0]  # fmt: skip
    for recall, (first, *bins) in zip(found, tables, strict=True):
        others = sum(bins)
        ours = layer_recall_of_others(recall)
        np.testing.assert_allclose(
            [ours.chosen, ours.best, ours.random], others[1:] / others[0], rtol=1e-5
        )
        assert ours.mass == pytest.approx(others[0] / (24 * shape.num_heads), rel=1e-5)
        # The first block, always open, hides what the choice does.
        assert recall.chosen > ours.chosen + 0.01 < 1
        assert first[1] == first[0]
    report = Report(name="a", step=0, trained_length=48, facts={}, recall=found)
    others = tables[:, 1:].sum((0, 1))
    every = recall_of_others(report, 48)
    assert every.chosen == pytest.approx(others[1] / others[0], rel=1e-5)


def test_the_last_tokens_of_each_span_are_measured_at_every_length(
    tmp_path: Path, data: Path
) -> None:
    model, windows = random_model(tmp_path, data, Grid()), spans(3, 128)
    short = measure_recall(model, windows, 64, 20)
    last = Spans(windows.tokens[:, 64:], windows.document)
    assert short == measure_recall(model, last, 64, 20)
    assert short != measure_recall(model, windows, 128, 20)


def on_ranks(folder: Path, data: Path, sp: int) -> list[Recall]:
    model = random_model(folder, data, create_grid(sp))
    return measure_recall(model, spans(3, 128), 128, 51)


@pytest.mark.parametrize("sp", [1, 2])
def test_ranks_that_share_windows_or_rows_find_what_one_finds(
    tmp_path: Path, data: Path, sp: int
) -> None:
    model = random_model(tmp_path, data, Grid())
    expected = measure_recall(model, spans(3, 128), 128, 51)
    for found in run_distributed(on_ranks, 2, tmp_path, data, sp):
        for ours, whole in zip(found, expected, strict=True):
            assert ours.opened == whole.opened
            for name in ("beyond", "first", "chosen", "best", "random"):
                assert getattr(ours, name) == pytest.approx(getattr(whole, name), rel=1e-5)


def test_a_report_has_it_of_a_checkpoint_and_of_its_folder(tmp_path: Path, data: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(TINY.format(run=tmp_path / "run", data=data))
    tasks = ["eval.tasks=['recall']", "eval.lengths=[16,64,128]", "eval.recall_windows=2"]
    config = load_config(file, [*ROUTED, *tasks, "eval.recall_queries=20"])
    save_untrained(config)
    where, tokenizer = (torch.device("cpu"), Grid()), data / "tokenizer"
    model = open_checkpoint_model(config, 0, *where)
    documents = held_out_documents(config, model.tokenizer, tokenizer)
    report = evaluate(config.eval, model, documents)
    assert [(r.length, r.layer) for r in report.recall] == [(64, 1), (64, 2), (128, 1), (128, 2)]
    (note,) = report.notes
    assert note == "recall at 16 tokens was not measured: no token is beyond the window of 16"
    assert [(cost.what, cost.length) for cost in report.costs] == [("recall", 64), ("recall", 128)]
    bins = recall_by_distance(report, 128)
    assert [(r.start, r.stop) for r in bins] == [(16, 32), (32, 64), (64, 128)]

    checkpoint = select_checkpoint(Path(config.run.dir), 0)
    export_checkpoint(checkpoint, config, tmp_path / "hf", "fp32", tokenizer)
    exported = open_hugging_face_model(config, tmp_path / "hf", *where)
    for ours, theirs in zip(
        report.recall, evaluate(config.eval, exported, documents).recall, strict=True
    ):
        for name in ("length", "layer", "beyond", "first", "chosen", "best", "random", "opened"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-4)


def test_a_model_without_routed_layers_has_none_and_says_so(tmp_path: Path, data: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(TINY.format(run=tmp_path / "run", data=data))
    config = load_config(file, ["eval.tasks=['recall']"])
    model = open_random_model(config, torch.device("cpu"), Grid())
    documents = held_out_documents(config, model.tokenizer, data / "tokenizer")
    report = evaluate(config.eval, model, documents)
    assert report.recall == []
    assert report.notes == ["recall was not measured: the model has no routed layers"]
