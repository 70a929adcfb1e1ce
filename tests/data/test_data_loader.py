"""Serving rows: right labels, one order whatever the ranks, nothing lost by any resume."""

import dataclasses
import itertools
import queue
import random
import shutil
import threading
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from fold_parallel import Grid
from tensorlm.batch import IGNORED, Batch
from tensorlm.config import Config, parse_config
from tensorlm.data import epochs as epoch_plans
from tensorlm.data.loader import PackedRows, RowPhase, open_rows
from tensorlm.data.prefetch import Prefetch
from tensorlm.data.shards import Corpus
from tensorlm.data.tokenizer.training import train_tokenizer
from tensorlm.runtime.errors import UserError
from tests.support.documents import rows_of, write_split

LENGTHS = [30, 5, 64, 17, 90, 1]


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """Two shards whose token ids tell document and place: id = 100 * document + place."""
    documents = [100 * d + np.arange(n) for d, n in enumerate(LENGTHS)]
    return write_split(tmp_path / "train", [documents[:3], documents[3:]], 1000)


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_rows_hold_their_documents_and_predict_the_next_token(split: Path, packing: str) -> None:
    rows = rows_of(split, 32, packing, seed=3)
    predicting: list[int] = []
    for index in range(rows.sources[0].last_plan.num_rows):
        batch = rows.batch(range(index, index + 1))
        tokens, labels, starts = batch.tokens[0], batch.labels[0], batch.doc_start[0]
        for t in range(32):
            if labels[t] != IGNORED:
                assert labels[t] == tokens[t] + 1  # also where a long document was cut
                assert tokens[t] - tokens[starts[t]] == t - starts[t]
                predicting.append(int(tokens[t]))
            assert starts[t] <= t
        assert batch.num_labels == int((labels != IGNORED).sum())
    # Every token but the last of each document predicts something, exactly once.
    assert sorted(predicting) == [100 * d + i for d, n in enumerate(LENGTHS) for i in range(n - 1)]


def test_epochs_hold_all_rows_in_another_order(split: Path) -> None:
    rows = rows_of(split, 32, "best_fit", seed=3)
    n = rows.sources[0].last_plan.num_rows
    epochs = [
        [tuple(rows.batch(range(e * n + i, e * n + i + 1)).tokens[0].tolist()) for i in range(n)]
        for e in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


def test_documents_of_rows_are_named(tmp_path: Path, split: Path) -> None:
    alone = rows_of(split, 32, "best_fit", seed=3)
    n = alone.sources[0].last_plan.num_rows
    assert alone.documents(range(n)) == [str(d) for d in range(len(LENGTHS))]
    config = run_config(tmp_path / "named", seq_len=32)
    names = open_rows(config, "train").documents(range(8))
    assert {name.split(":")[0] for name in names} == {"one", "two", "three"}


# ------------------------------------------------------------------------- one order for all sizes

SEQ_LENS = (32, 64, 128)


def run_config(folder: Path, seq_len: int = SEQ_LENS[-1], **train: Any) -> Config:
    """A run on three sources whose tokens all have ids of their own (from 1), and its data."""
    rng, first = np.random.default_rng(5), 1
    for name, count in (("one", 180), ("two", 270), ("three", 60)):
        if (folder / name).exists():
            continue
        documents = []
        for length in rng.integers(3, 300, count).tolist():
            documents.append(np.arange(first, first + length))
            first += length
        write_split(folder / name / "train", [documents[:20], documents[20:]], 100_000)
    sources = [
        {"path": str(folder / name), "weight": weight}
        for name, weight in (("one", 0.3), ("two", 0.45), ("three", 0.25))
    ]
    model = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 1, "fold": [8]}
    heads = {"num_heads": 8, "num_kv_heads": 8, "vocab_size": 100_000}
    tree = {
        "run": {"dir": str(folder / "run"), "seed": 11},
        "model": {**model, **heads},
        "data": {"sources": sources, "seq_len": seq_len},
        "optim": {"lr": 1e-3},
        "train": {"steps": 8, "rows_per_step": 8, **train},
    }
    return parse_config(tree, "test")


def assemble(parts: list[list[Batch]], dp: int, sp: int) -> list[tuple[torch.Tensor, ...]]:
    """The rows of a step, in global order, from what each rank (dp x sp) was served."""
    rows = []
    for group in range(dp):
        shares = parts[group * sp : (group + 1) * sp]
        for slices in zip(*shares, strict=True):  # the same micro-batch on each sp rank
            columns = [
                torch.cat([getattr(s, name) for s in slices], dim=1)
                for name in ("tokens", "labels", "doc_start")
            ]
            rows += list(zip(*columns, strict=True))
    return rows


@pytest.mark.parametrize("num_resizes", [200, pytest.param(1000, marks=pytest.mark.faults)])
def test_random_resizes_lose_and_repeat_nothing(tmp_path: Path, num_resizes: int) -> None:
    phases = [
        {"steps": 60, "seq_len": SEQ_LENS[0], "rows_per_step": 8},
        {"steps": 50, "seq_len": SEQ_LENS[1], "rows_per_step": 8},
    ]
    total = 110 + 2 * num_resizes
    config = run_config(tmp_path, steps=total, earlier_stages=phases)
    reference = open_rows(config, "train")
    assert reference.epochs(110 * 8)[2] > 1  # also the earlier phases pass the end of an epoch
    random_sizes = random.Random(0)
    step = row = num_done = 0
    counts = [np.zeros(c.num_tokens, dtype=int) for c in reference.corpora]
    firsts = [0, *itertools.accumulate(c.num_tokens for c in reference.corpora)]
    while num_done < num_resizes:
        # A new job with other ranks, micro-batches and, in the last phase, rows per step.
        sp = random_sizes.choice([1, 2, 4])
        dp = random_sizes.choice([1, 2, 4])
        micro = random_sizes.choice([1, 2])
        last_rows = random_sizes.choice([8, 16, 24])
        tree = config.model_dump(mode="json", exclude_none=True)
        tree["train"] |= {"micro_batch": micro, "rows_per_step": last_rows}
        tree["parallel"]["sp"] = sp
        for phase in tree["train"]["earlier_stages"]:
            phase["micro_batch"] = micro
        resized = parse_config(tree, "test")
        resized.check_world(dp * sp)
        # Opening the data again at every resize is another test's business; here it is the same.
        rows = open_rows(resized, "train") if num_done % 50 == 0 else reference
        assert rows.fingerprint == reference.fingerprint
        grids = [Grid(dp * sp, rank, sp) for rank in range(dp * sp)]
        prefetches = [Prefetch(rows, resized, grid, pin=False) for grid in grids]
        for _ in range(random_sizes.choice([1, 2])):
            phase_rows = resized.phase_at(step).rows_per_step
            parts = [prefetch.batches(step, row) for prefetch in prefetches]
            whole = reference.batch(range(row, row + phase_rows))
            digest = sum(batch.digest for part in parts for batch in part)
            assert digest % 2**64 == whole.digest
            num_tokens = sum(batch.num_tokens for part in parts for batch in part)
            assert num_tokens == whole.num_tokens
            for number, (tokens, labels, doc_start) in enumerate(assemble(parts, dp, sp)):
                assert torch.equal(tokens, whole.tokens[number])
                assert torch.equal(labels, whole.labels[number])
                assert torch.equal(doc_start, whole.doc_start[number])
                served = tokens[tokens > 0].numpy()
                assert len(served) == whole.row_tokens[number]
                source = int(np.searchsorted(firsts, served[0])) - 1
                np.add.at(counts[source], served - 1 - firsts[source], 1)
            step, row = step + 1, row + phase_rows
        num_done += 1
    # Every token of a source has been served as often as any other of it, give or take the epoch
    # under way, and there were at least 10 resumes in an epoch.
    assert reference.num_tokens(row) == sum(count.sum() for count in counts)
    for source, epochs in enumerate(reference.epochs(row)):
        assert counts[source].min() == int(epochs)
        assert counts[source].max() - counts[source].min() <= 1
        assert counts[source].mean() == pytest.approx(epochs)
        assert num_resizes / epochs >= 10
    assert row == sum(reference.mix.count(source, row) for source in range(3))


def test_a_wrong_guess_of_the_feed_costs_nothing_but_time(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    rows = open_rows(config, "train")
    prefetch = Prefetch(rows, config, Grid(), pin=False)
    prefetch.batches(0, 0)
    jumped = prefetch.batches(5, 400)
    assert torch.equal(jumped[3].tokens, rows.batch(range(403, 404)).tokens)


class Watched:
    """Rows that remember what they were asked for, and are read as often as they are let."""

    def __init__(self, rows: PackedRows) -> None:
        self.rows, self.pins = rows, set[bool]()
        self.asked, self.may_read = queue.SimpleQueue[int](), threading.Semaphore(0)

    def micro_batches(self, first_row: int, *place: Any, pin: bool) -> list[Batch]:
        self.asked.put(first_row)
        self.pins.add(pin)
        assert self.may_read.acquire(timeout=60)
        return self.rows.micro_batches(first_row, *place)


@pytest.mark.parametrize("pin", [False, True])
def test_the_next_step_is_read_while_this_one_computes(tmp_path: Path, pin: bool) -> None:
    config = run_config(tmp_path, steps=3)
    watched = Watched(open_rows(config, "train"))
    prefetch = Prefetch(cast(PackedRows, watched), config, Grid(), pin=pin)
    for step in range(3):
        watched.may_read.release()  # for this step; that of the next one has to wait
        batches = prefetch.batches(step, 8 * step)
        row = 8 * step + 3
        assert torch.equal(batches[3].tokens, watched.rows.batch(range(row, row + 1)).tokens)
        if step == 0:
            assert watched.asked.get(timeout=10) == 0
        if step < 2:  # and nobody has asked the prefetch for it
            assert watched.asked.get(timeout=10) == 8 * step + 8
    assert watched.asked.empty()  # no step was read twice, and none after the last
    assert watched.pins == {pin}


def test_pinned_batches_are_allocated_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = open_rows(run_config(tmp_path), "train")
    allocate, pinned = torch.empty, []

    def empty(*shape: Any, pin_memory: bool, **options: Any) -> torch.Tensor:  # pins on GPUs only
        pinned.append(pin_memory)
        return allocate(*shape, **options)

    monkeypatch.setattr(torch, "empty", empty)
    (batch,) = rows.micro_batches(0, 1, 1, pin=True)
    assert pinned == [True] * 3
    plain = rows.batch(range(1))
    assert pinned == [True] * 3  # nothing else is
    for name in ("tokens", "labels", "doc_start"):
        assert torch.equal(getattr(batch, name), getattr(plain, name))


@pytest.mark.gpu
def test_pinned_batches_are_pinned(tmp_path: Path) -> None:
    rows = open_rows(run_config(tmp_path), "train")
    batch = rows.batch(range(2), pin=True)
    assert all(t.is_pinned() for t in (batch.tokens, batch.labels, batch.doc_start))


def test_digest_tells_any_other_token_row_or_order(split: Path) -> None:
    rows = rows_of(split, 32, "best_fit", seed=3)
    n = rows.sources[0].last_plan.num_rows
    digests = [rows.batch(range(i, i + 1)).digest for i in range(2 * n)]
    assert len(set(digests)) == 2 * n  # also where the second epoch brings an equal row
    assert rows.batch(range(n)).digest == sum(digests[:n]) % 2**64
    shards = rows.corpora[0].shards
    tokens = shards[0].tokens.copy()
    tokens[3] += 1
    shards[0] = dataclasses.replace(shards[0], tokens=tokens)
    others = [rows.batch(range(i, i + 1)).digest for i in range(n)]
    assert sum(a != b for a, b in zip(digests, others, strict=False)) == 1


# --------------------------------------------------------------------------------- what is refused


def problem(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        open_rows(config, "train")
    (line,) = caught.value.problems
    return line


def changed(config: Config, **data: Any) -> Config:
    tree = config.model_dump(mode="json", exclude_none=True)
    tree["data"] |= data
    return parse_config(tree, "test")


def test_more_epochs_than_a_source_allows_are_refused_before_the_run(tmp_path: Path) -> None:
    config = run_config(tmp_path, steps=100)
    sources = config.model_dump(mode="json")["data"]["sources"]
    taken = open_rows(config, "train").epochs(100 * 8)
    sources[2]["max_epochs"] = taken[2] + 0.01
    open_rows(changed(config, sources=sources), "train")
    sources[2]["max_epochs"] = 1.5
    line = problem(changed(config, sources=sources))
    assert f"{sources[2]['path']} must last for the run with at most max_epochs = 1.5" in line
    assert f"got {taken[2]:.2f} epochs" in line


def test_sources_of_different_tokenizers_are_refused(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    for path in (tmp_path / "two/train").iterdir():
        path.unlink()
    write_split(tmp_path / "two/train", [[np.arange(9)]], 100_000, tokenizer="other")
    assert "must be encoded with the same tokenizer" in problem(config)


def test_ids_beyond_the_model_are_refused(tmp_path: Path) -> None:
    tree = run_config(tmp_path).model_dump(mode="json", exclude_none=True)
    tree["model"]["vocab_size"] = 5000
    assert problem(parse_config(tree, "test")).startswith("model.vocab_size: must be at least ")


def test_another_tokenizer_beside_the_shards_is_refused(tmp_path: Path, data: Path) -> None:
    config = parse_config(
        {
            **run_config(tmp_path).model_dump(mode="json", exclude_none=True),
            "data": {"path": str(shutil.copytree(data, tmp_path / "set")), "seq_len": 64},
        },
        "test",
    )
    open_rows(config, "train")
    train_tokenizer(["other words"] * 9, 270, tmp_path / "set/tokenizer")
    with pytest.raises(UserError, match=r"set/tokenizer: must be the tokenizer"):
        open_rows(config, "train")


def test_other_data_changes_the_fingerprint(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    fingerprint = open_rows(config, "train").fingerprint

    def other(**data: Any) -> PackedRows:
        return open_rows(changed(config, **data), "train")

    sources = config.model_dump(mode="json")["data"]["sources"]
    heavier = [{**sources[0], "weight": 3.0}, *sources[1:]]
    scaled = [{**source, "weight": 2 * source["weight"]} for source in sources]
    for data in ({"seq_len": 256}, {"packing": "concat"}, {"sources": heavier}):
        assert other(**data).fingerprint != fingerprint
    assert other(sources=scaled).fingerprint == fingerprint


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
@pytest.mark.parametrize("earlier", [[], [(2, 32)], [(2, 32), (20, 128)], [(40, 32)]])
def test_rows_of_all_epochs_are_planned_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: list[tuple[int, int]], packing: str
) -> None:
    documents = [np.arange(3, 3 + n) for n in (40, 70, 33, 90, 12, 64)]
    corpus = Corpus(write_split(tmp_path, [documents], vocab_size=512))
    phases = [RowPhase(seq_len, num_rows) for num_rows, seq_len in earlier]
    num_rows = sum(num_rows for num_rows, _ in earlier) + 30  # several epochs of the last phase
    rows = PackedRows([corpus], [1.0], [*phases, RowPhase(64, None)], packing, 0, num_rows)

    def plan(*_: object) -> None:
        raise AssertionError("planned in a step")

    monkeypatch.setattr(epoch_plans, "plan_rows", plan)
    monkeypatch.setattr(epoch_plans, "pack", plan)
    for index in range(num_rows):
        assert rows.batch(range(index, index + 1)).num_tokens
    assert rows.epochs(num_rows)[0] > 4
