"""Three sources, prepared, mixed and trained on in phases of 64, 128 and 256 tokens a row."""

import email
import gzip
import hashlib
import json
import unittest
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tensorlm.checkpoint import manifest_text, newest_checkpoint
from tensorlm.config import load_config
from tensorlm.data.loader import open_rows
from tensorlm.data.prepare.encode import encode
from tensorlm.data.prepare.files import find_files
from tensorlm.data.prepare.inputs import read_documents
from tensorlm.data.tokenizer.training import train_tokenizer
from tensorlm.model.flops import peak_flops, train_flops
from tensorlm.train.metrics import read_metrics
from tests.support.documents import write_split
from tests.support.launching import TINY, TrainRanks, losses

DATA = """[data]
seq_len = 256
[[data.sources]]
path = "{data}/code"
weight = 0.5
[[data.sources]]
path = "{data}/prose"
weight = 0.2
max_epochs = 1.5
[[data.sources]]
path = "{data}/table"
weight = 0.3
"""
STAGES = """[[train.earlier_stages]]
steps = 3
seq_len = 64
rows_per_step = 8
micro_batch = 2
[[train.earlier_stages]]
steps = 2
seq_len = 128
rows_per_step = 4
"""


def sources(package: ModuleType) -> list[Path]:
    return sorted(Path(str(package.__file__)).parent.glob("*.py"))


def long_texts() -> list[str]:
    """Three long texts in plain English: the chapters of the language's own manual."""
    chapters = list(topics.values())
    return ["\n\n".join(chapters[third::3]) for third in range(3)]


@pytest.fixture
def mixed(tmp_path: Path, config: Path) -> Path:
    """The tiny configuration on three sources: source files, long texts, a Parquet table."""
    data = tmp_path / "data"
    data.mkdir()
    for number, text in enumerate(long_texts()):
        assert len(text) > 100_000
        (data / f"{number}.txt.gz").write_bytes(gzip.compress(text.encode()))
    table = pa.table({"content": [file.read_text() for file in sources(unittest)]})
    pq.write_table(table, data / "table.parquet")
    code = find_files([str(file) for file in sources(email)])
    train_tokenizer(read_documents(code, "text"), 512, data / "tokenizer")
    for name, files, field in (
        ("code", code, "text"),
        ("prose", find_files([str(data / "*.txt.gz")]), "text"),
        ("table", [str(data / "table.parquet")], "content"),
    ):
        encode(files, data / "tokenizer", data / name, text_field=field, shard_bytes=100_000)
    head, tail = TINY.format(run=tmp_path / "run", data=data).split("[data]")
    tail = "[optim]" + tail.split("[optim]")[1]
    config.write_text(head + DATA.format(data=data) + tail + STAGES)
    return config


def test_three_sources_are_mixed_and_trained_on_in_phases(
    tmp_path: Path, mixed: Path, train_ranks: TrainRanks
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    shown = train_ranks(f"run.dir={whole}", ranks=1)
    assert "data: code: " in shown
    assert "50.0% of the rows" in shown
    assert "3 of 8 rows of 64 tokens, then 2 of 4 rows of 128 tokens, then 3 of 4" in shown

    # Stopped inside the first phase, it goes on across both borders on two ranks that share rows.
    train_ranks(f"run.dir={broken}", "train.stop_at=2", ranks=1)
    train_ranks(f"run.dir={broken}", "parallel.sp=2", ranks=2)
    assert losses(broken) == pytest.approx(losses(whole), rel=1e-5)
    records = read_metrics(whole)
    assert [r["data/seq_len"] for r in records] == [64] * 3 + [128] * 2 + [256] * 3
    slots = 3 * 8 * 64 + 2 * 4 * 128 + 3 * 4 * 256
    num_tokens = records[-1]["train/tokens"]
    assert 0.9 * slots < num_tokens <= slots
    assert num_tokens == read_metrics(broken)[-1]["train/tokens"]
    hashes = [r["data/hash"] for r in records]
    assert [r["data/hash"] for r in read_metrics(broken)] == hashes

    # They are those of the rows in their order, and the checkpoint knows the last one.
    config = load_config(mixed)
    rows = open_rows(config, "train")
    running, first = "", 0
    for step, expected in enumerate(hashes):
        indices = range(first, first + config.phase_at(step).rows_per_step)
        text = f"{running} {rows.batch(indices).digest}"
        running, first = hashlib.sha256(text.encode()).hexdigest()[:16], indices.stop
        assert running == expected
    last_step = rows.batch(range(first - 4, first))
    assert records[-1]["train/tokens"] - records[-2]["train/tokens"] == last_step.num_tokens
    found = newest_checkpoint(whole)
    assert found is not None
    assert found.manifest["state"]["data_hash"] == running
    assert [rows.mix.count(source, first) for source in range(3)] == [22, 9, 13]


def test_a_flipped_bit_stops_training_before_it_starts(
    tmp_path: Path, mixed: Path, train_ranks: TrainRanks
) -> None:
    tokens = tmp_path / "data/prose/train/shard-00000.tokens"
    content = bytearray(tokens.read_bytes())
    content[4321] ^= 2
    tokens.write_bytes(content)
    assert train_ranks(ranks=1, code=2).splitlines()[-1] == (
        f"error: {tokens}: checksum differs (restore the file, or prepare the data again)"
    )


def test_padding_counts_neither_as_tokens_nor_as_work(
    tmp_path: Path, config: Path, train_ranks: TrainRanks
) -> None:
    """One document of 28 tokens: each row of 128 holds it and 100 tokens of padding."""
    document = np.random.default_rng(0).integers(3, 512, 28)
    write_split(tmp_path / "one/train", [[document]], vocab_size=512)
    data = f"data.path={tmp_path / 'one'}"
    for name, ranks, *overrides in (("one", 1), ("dp", 2), ("sp", 2, "parallel.sp=2")):
        run = f"run.dir={tmp_path / name}"
        train_ranks(run, data, "train.steps=3", "train.stop_at=2", *overrides, ranks=ranks)
        records = read_metrics(tmp_path / name)
        assert [record["train/tokens"] for record in records] == [4 * 28, 8 * 28]
        assert [record["data/labels"] for record in records] == [4 * 27] * 2
        # Speed and MFU are of the same seconds; the rest of HFU is padding.
        flops = train_flops(load_config(config).model, torch.arange(28))
        for record in records:
            seconds = 4 * 28 / record["perf/tokens_per_second"]
            peak = ranks * peak_flops(torch.device("cpu"))
            assert record["perf/mfu"] * seconds * peak == pytest.approx(4 * flops)
            assert record["perf/hfu"] > 4 * record["perf/mfu"]
    # Checkpoints of earlier versions counted padding: what they say of tokens is not continued.
    manifest = tmp_path / "one/step-00000002/manifest.json"
    content = json.loads(manifest.read_text())
    del content["sha256"], content["format"], content["version"]
    content["state"]["tokens"] = 8 * 128
    manifest.write_text(manifest_text(content))
    train_ranks(f"run.dir={tmp_path / 'one'}", data, "train.steps=3", ranks=1)
    assert read_metrics(tmp_path / "one")[-1]["train/tokens"] == 12 * 28
