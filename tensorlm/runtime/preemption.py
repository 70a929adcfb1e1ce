"""Requests to stop by signal (SIGUSR1 or SIGTERM), from the first moment of a process on.

Imports nothing slow, so that a launcher can listen before it does anything else.
"""

import os
import signal
import threading
import time

from .errors import EXIT_PREEMPTED

# The launcher and the scheduler often both deliver the same signal.
_ECHO_SECONDS = 1.0


class StopRequest:
    """Whether this process was asked to save and exit.

    The first signal is recorded. A second one, unless it is an echo of the first, ends the process
    at once with EXIT_PREEMPTED. This is safe, since the files on disk are intact at any time.
    """

    def __init__(self) -> None:
        self._asked_at: float | None = None

    def listen(self) -> "StopRequest":
        """Install the signal handlers (main thread only)."""
        # Python runs handlers between two instructions of the main thread, which may be blocked in
        # a collective. The byte in the pipe is written at once, and a thread reads it.
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(writer)
        threading.Thread(target=self._read, args=(reader,), name="signals", daemon=True).start()
        return self

    def _read(self, reader: int) -> None:
        while True:
            if os.read(reader, 1)[0] not in (signal.SIGUSR1, signal.SIGTERM):
                continue
            now = time.monotonic()
            if self._asked_at is None:
                self._asked_at = now
            elif now - self._asked_at > _ECHO_SECONDS:
                os._exit(EXIT_PREEMPTED)

    @property
    def is_asked(self) -> bool:
        """Whether a signal has arrived."""
        return self._asked_at is not None
