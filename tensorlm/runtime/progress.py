"""Progress bars with the time left."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

from tqdm import tqdm

# Work that takes less time than this shows no byte bar.
DELAY_SECONDS = 2.0

# By default all child processes share a semaphore. One that is killed while it holds the semaphore
# blocks the bars, and so the work, of all others. Here each bar belongs to one process.
tqdm.set_lock(threading.RLock())


def progress_bar(
    total: int, unit: str, title: str, *, is_shown: bool = True, delay: float = 0.0
) -> tqdm:
    """Progress bar on stderr; one line every 30 seconds if stderr is not a terminal."""
    is_terminal = sys.stderr.isatty()
    return tqdm(
        total=total, unit=unit, unit_scale=unit != "prompt", desc=title, delay=delay,
        mininterval=0.2 if is_terminal else 30.0, miniters=1, disable=not is_shown,
        file=sys.stderr if is_terminal else _Lines(),
    )  # fmt: skip


class _Lines:
    """stderr for a bar in a log file: writes complete lines, so that bars do not mix."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(f"{text.strip()}\n")

    def flush(self) -> None:
        sys.stderr.flush()


@contextlib.contextmanager
def byte_bar(
    total: int, title: str, *, is_shown: bool = True, progress: Callable[[], object] = lambda: None
) -> Iterator[Callable[[int], object]]:
    """Byte bar; yields the function to call with the number of bytes just moved.

    Those numbers may include headers that `total` does not count. `progress` is called each time.
    """
    with progress_bar(total, "B", title, is_shown=is_shown, delay=DELAY_SECONDS) as bar:

        def moved(num_bytes: int) -> None:
            bar.update(min(num_bytes, total - bar.n))
            progress()

        yield moved


def format_duration(seconds: float) -> str:
    """Format as `1d02h`, `3h07m`, `4m05s` or `12s`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    if hours:
        return f"{h}h{m:02d}m"
    return f"{m}m{s:02d}s" if minutes else f"{s}s"
