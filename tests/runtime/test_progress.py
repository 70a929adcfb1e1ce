"""A bar of one process holds up no other."""

import multiprocessing
import os
import threading

from tqdm import tqdm

from tensorlm.runtime.progress import progress_bar


def _die_holding_the_lock() -> None:
    tqdm.get_lock().acquire()
    os._exit(1)


def test_a_process_that_dies_while_it_draws_stops_no_other() -> None:
    progress_bar(1, "B", "first").close()  # all that tqdm makes once is there before the fork
    child = multiprocessing.get_context("fork").Process(target=_die_holding_the_lock)
    child.start()
    child.join(timeout=30)
    assert child.exitcode == 1

    drawn = threading.Event()

    def draw() -> None:
        progress_bar(1, "B", "second").close()
        drawn.set()

    threading.Thread(target=draw, daemon=True).start()
    assert drawn.wait(timeout=30)
