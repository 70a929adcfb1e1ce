"""Progress bars with the time left."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

from tqdm import tqdm

# Bars of bytes do not show for work that is done sooner.
DELAY_SECONDS = 2.0

# By default all processes that come from one share a semaphore, and one that is killed while it
# holds it stops the bars, and so the work, of all others. Bars here are of one process each.
tqdm.set_lock(threading.RLock())


def progress_bar(
    total: int, unit: str, title: str, *, is_shown: bool = True, delay: float = 0.0
) -> tqdm:
    """A bar on standard error; into a log file it writes a line every 30 seconds."""
    is_terminal = sys.stderr.isatty()
    return tqdm(
        total=total, unit=unit, unit_scale=unit != "prompt", desc=title, delay=delay,
        mininterval=0.2 if is_terminal else 30.0, miniters=1, disable=not is_shown,
        file=sys.stderr if is_terminal else _Lines(),
    )  # fmt: skip


class _Lines:
    """Standard error for a bar in a log file: whole lines, so that none has another's end."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(f"{text.strip()}\n")

    def flush(self) -> None:
        sys.stderr.flush()


@contextlib.contextmanager
def byte_bar(total: int, title: str, *, is_shown: bool = True) -> Iterator[Callable[[int], object]]:
    """Yields what takes the number of bytes just moved, headers included, which `total` has not."""
    with progress_bar(total, "B", title, is_shown=is_shown, delay=DELAY_SECONDS) as bar:
        yield lambda num_bytes: bar.update(min(num_bytes, total - bar.n))


def format_duration(seconds: float) -> str:
    """`1d02h`, `3h07m`, `4m05s` or `12s`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    if hours:
        return f"{h}h{m:02d}m"
    return f"{m}m{s:02d}s" if minutes else f"{s}s"
