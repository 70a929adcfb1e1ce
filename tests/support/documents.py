"""Documents of known ids as a prepared split."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tensorlm.data.loader import PackedRows, RowPhase
from tensorlm.data.prepare.shard_writer import ShardWriter, Vocabulary, write_index
from tensorlm.data.shards import Corpus


def write_split(
    folder: Path,
    shards: Sequence[Sequence[NDArray[np.int64]]],
    vocab_size: int = 10_000,
    tokenizer: str = "tokenizer",
) -> Path:
    """Write a split that holds `shards`, each a list of documents (arrays of ids)."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, documents in enumerate(shards):
        with ShardWriter(folder, number, Vocabulary(vocab_size, 1, 2, tokenizer)) as shard:
            shard.add(documents, num_bytes=3 * sum(map(len, documents)))
    write_index(folder, len(shards))
    return folder


def rows_of(folder: Path, seq_len: int, packing: str, seed: int) -> PackedRows:
    """The rows of one split as the only source of a run of one phase."""
    return PackedRows([Corpus(folder)], [1.0], [RowPhase(seq_len, None)], packing, seed, 1)
