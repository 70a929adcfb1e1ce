"""Sequence parallelism through loader, trainer and evaluation."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tensorlm.data.loader import PackedRows
from tests.tensorlm.documents import write_split


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
@pytest.mark.parametrize("sp", [2, 4, 8])
def test_ranks_read_only_their_slice_of_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str, sp: int
) -> None:
    documents = [np.arange(n) + 40 * n for n in (200, 3, 64, 17, 90, 1, 31)]
    write_split(tmp_path, [documents])
    rows = PackedRows(tmp_path, 64, packing, seed=3)
    shard = 64 // sp
    reads: list[int] = []
    read = rows.corpus.tokens

    def counted_read(document: int, start: int, stop: int) -> np.ndarray:
        reads.append(stop - start)
        return read(document, start, stop)

    for index in range(rows.plan.num_rows):
        indices = range(index, index + 1)
        whole = rows.batch(indices)
        for rank in range(sp):
            reads.clear()
            with monkeypatch.context() as patch:
                patch.setattr(rows.corpus, "tokens", counted_read)
                part = rows.batch(indices, slice(rank * shard, (rank + 1) * shard))
            # One more token for each piece of a document: its last label.
            assert sum(reads) <= shard + len(reads)
            own = slice(rank * shard, (rank + 1) * shard)
            for name in ("tokens", "labels", "doc_start", "depth"):
                assert torch.equal(getattr(part, name), getattr(whole, name)[:, own]), name
