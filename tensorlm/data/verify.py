"""Every byte of the data is as it was written."""

from collections.abc import Callable

from tensorlm.runtime import disk
from tensorlm.runtime.errors import UserError
from tensorlm.runtime.progress import byte_bar
from tensorlm.runtime.ranks import gather_json

from .loader import PackedRows


def check_data(rows: PackedRows, rank: int, world_size: int, progress: Callable[[], None]) -> None:
    """Every byte of the data is as it was written; each rank reads its share of the files.

    Raises:
        UserError: on all ranks, a line for each file that differs.
    """
    entries = [
        (entry, corpus.folder / name)
        for corpus in rows.corpora
        for shard in corpus.shards
        for name, entry in shard.header.files.items()
    ]
    entries.sort(key=lambda item: item[0].bytes)  # equal shares
    share, bad = entries[rank::world_size], []
    total = sum(entry.bytes for entry, _ in share)
    with byte_bar(total, "verify data", is_shown=rank == 0) as show:

        def moved(num_bytes: int) -> None:
            show(num_bytes)
            progress()

        for entry, path in share:
            try:
                _, sha256 = disk.file_sha256(path.resolve(), moved)
                problem = "" if sha256 == entry.sha256 else "checksum differs"
            except OSError as error:
                problem = f"cannot be read: {error.strerror}"
            if problem:
                bad.append(f"{path}: {problem} (restore the file, or prepare the data again)")
    bad = [line for part in gather_json(bad) for line in part]
    if bad:
        raise UserError(*bad)
