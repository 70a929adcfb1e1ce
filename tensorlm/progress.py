"""Progress bars with the time left."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm

# Bars of bytes do not show for work that is done sooner.
DELAY_SECONDS = 2.0


def progress_bar(
    total: int, unit: str, title: str, *, is_shown: bool = True, delay: float = 0.0
) -> tqdm:
    """A bar on standard error; into a log file it writes a line every 30 seconds."""
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total, unit=unit, unit_scale=unit != "prompt", desc=title, mininterval=interval,
        delay=delay, disable=not is_shown,
    )  # fmt: skip


@contextlib.contextmanager
def byte_bar(total: int, title: str, *, is_shown: bool = True) -> Iterator[Callable[[int], object]]:
    """Yields what takes the number of bytes just moved, headers included, which `total` has not."""
    with progress_bar(total, "B", title, is_shown=is_shown, delay=DELAY_SECONDS) as bar:
        yield lambda num_bytes: bar.update(min(num_bytes, total - bar.n))
