"""Data: nothing lost or repeated by packing, labels right, damage noticed, all inputs read."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorlm.data.loader import PackedRows
from tensorlm.data.packing import plan_rows
from tensorlm.data.prepare import encode, find_files, read_documents
from tensorlm.data.shards import Corpus, open_shards, verify_shards
from tensorlm.data.tokenizers import load_tokenizer, train_tokenizer
from tensorlm.errors import UserError
from tensorlm.loss import IGNORED
from tests.tensorlm.documents import write_split


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=60),
    seq_len=st.integers(2, 64),
    mode=st.sampled_from(["best_fit", "concat"]),
    seed=st.integers(0, 5),
)
def test_every_token_is_in_exactly_one_row(
    lengths: list[int], seq_len: int, mode: str, seed: int
) -> None:
    plan = plan_rows(np.array(lengths), seq_len, mode, seed)
    seen = [np.zeros(n, dtype=int) for n in lengths]
    for document, start, length in zip(plan.document, plan.start, plan.length, strict=True):
        assert length > 0
        seen[document][start : start + length] += 1
    assert all((count == 1).all() for count in seen)
    for row in range(plan.num_rows):
        held = plan.length[plan.row_first[row] : plan.row_first[row + 1]].sum()
        assert 0 < held <= seq_len
    again = plan_rows(np.array(lengths), seq_len, mode, seed)
    assert all(np.array_equal(getattr(plan, k), getattr(again, k)) for k in ("document", "start"))


def test_best_fit_fills_rows_of_log_normal_documents() -> None:
    lengths = np.random.default_rng(0).lognormal(7.5, 1.0, 20_000).astype(np.int64) + 1
    assert plan_rows(lengths, 32_768, "best_fit", 0).fill > 0.995


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards whose token ids tell document and place: id = 100 * document + place."""
    documents = [100 * d + np.arange(n) for d, n in enumerate([30, 5, 64, 17, 90, 1])]
    return write_split(tmp_path / "train", [documents[:3], documents[3:]], 1000)


def test_rows_hold_their_documents_and_predict_the_next_token(shards: Path) -> None:
    rows = PackedRows(shards, 32, "best_fit", seed=3)
    seen: list[int] = []
    for index in range(rows.plan.num_rows):
        batch = rows.batch(range(index, index + 1))
        tokens, labels, starts = batch.tokens[0], batch.labels[0], batch.doc_start[0]
        pieces = rows.plan.row_first[index : index + 2]
        for t in range(32):
            if labels[t] != IGNORED:
                assert labels[t] == tokens[t] + 1  # also where a long document was cut
            assert starts[t] <= t
        assert len(pieces) == 2
        held = int(rows.plan.length.sum())
        seen += [int(x) for x, label in zip(tokens, labels, strict=True) if label != IGNORED]
    # Every token but the last of each document predicts something, exactly once.
    expected = [100 * d + i for d, n in enumerate([30, 5, 64, 17, 90, 1]) for i in range(n - 1)]
    assert sorted(seen) == sorted(expected)
    assert held == 30 + 5 + 64 + 17 + 90 + 1


def test_order_does_not_depend_on_ranks_or_micro_batches(shards: Path) -> None:
    rows = PackedRows(shards, 32, "best_fit", seed=3)
    whole = rows.batch(range(4, 12)).tokens
    for num_ranks, micro in ((1, 8), (2, 2), (4, 1), (8, 1)):
        share = 8 // num_ranks
        parts = [
            batch.tokens
            for rank in range(num_ranks)
            for batch in rows.micro_batches(4 + rank * share, share, micro)
        ]
        assert np.array_equal(np.concatenate(parts), whole)


def test_epochs_hold_all_rows_in_another_order(shards: Path) -> None:
    rows = PackedRows(shards, 32, "best_fit", seed=3)
    n = rows.plan.num_rows
    epochs = [[tuple(rows.row(e * n + i)[0]) for i in range(n)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("damage", ["cut tokens", "no ends", "header", "dtype", "mixed", "empty"])
def test_damaged_shards_are_refused_by_name(shards: Path, damage: str) -> None:
    header = json.loads((shards / "shard-00001.json").read_text())
    if damage == "cut tokens":
        content = (shards / "shard-00001.tokens").read_bytes()
        (shards / "shard-00001.tokens").write_bytes(content[:-2])
    elif damage == "no ends":
        (shards / "shard-00001.ends").unlink()
    elif damage == "header":
        (shards / "shard-00001.json").write_text("{")
    elif damage == "dtype":
        (shards / "shard-00001.json").write_text(json.dumps({**header, "dtype": "uint32"}))
    elif damage == "mixed":
        changed = {**header, "tokenizer_sha256": "other"}
        (shards / "shard-00001.json").write_text(json.dumps(changed))
    else:
        for path in shards.iterdir():
            path.unlink()
    with pytest.raises(UserError) as caught:
        open_shards(shards)
    assert str(shards) in caught.value.problems[0]


def test_verify_finds_one_flipped_bit(shards: Path) -> None:
    assert verify_shards(shards) == []
    content = bytearray((shards / "shard-00000.tokens").read_bytes())
    content[7] ^= 1
    (shards / "shard-00000.tokens").write_bytes(content)
    assert [line.split(":")[0] for line in verify_shards(shards)] == [
        str(shards / "shard-00000.tokens")
    ]


def test_text_jsonl_and_parquet_give_the_same_documents(tmp_path: Path) -> None:
    texts = [f"document {i}\n" * (i + 1) for i in range(5)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    lines = "".join(json.dumps({"body": text}) + "\n" for text in texts)
    (tmp_path / "all.jsonl").write_text(lines)
    pq.write_table(pa.table({"body": texts}), tmp_path / "all.parquet")
    for pattern in ("*.txt", "*.jsonl", "*.parquet"):
        files = find_files([str(tmp_path / pattern)])
        assert list(read_documents(files, "body")) == texts
    with pytest.raises(UserError, match="no field 'text'"):
        list(read_documents([str(tmp_path / "all.jsonl")], "text"))


def test_encoded_documents_decode_to_their_text(tmp_path: Path) -> None:
    files = find_files([str(Path(json.__file__).parent / "*.py")])
    train_tokenizer(read_documents(files, "text"), 512, tmp_path / "tokenizer")
    encode(files, tmp_path / "tokenizer", tmp_path / "data", shard_bytes=20_000)
    corpus = Corpus(tmp_path / "data/train")
    tokenizer = load_tokenizer(tmp_path / "data/tokenizer")
    assert len(corpus.shards) > 1
    for index, text in enumerate(read_documents(files, "text")):
        ids = corpus.tokens(index, 0, 1 << 30)
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[1:-1]) == text
