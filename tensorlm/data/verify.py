"""Verification of a run's data against its checksums."""

from collections.abc import Callable

from tensorlm.runtime.errors import UserError
from tensorlm.runtime.ranks import gather_json

from .loader import PackedRows
from .shards import verify_files


def check_data(rows: PackedRows, rank: int, world_size: int, progress: Callable[[], None]) -> None:
    """Verify all files of the data; each rank reads its share of them.

    Raises:
        UserError: on all ranks, one line for each file that differs.
    """
    files = [
        (corpus.folder / name, entry)
        for corpus in rows.corpora
        for shard in corpus.shards
        for name, entry in shard.header.files.items()
    ]
    files.sort(key=lambda file: file[1].bytes)  # equal shares
    share = files[rank::world_size]
    bad = verify_files(share, "verify data", is_shown=rank == 0, progress=progress)
    bad = [line for part in gather_json(bad) for line in part]
    if bad:
        raise UserError(*bad)
