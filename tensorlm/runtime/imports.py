"""Importing large libraries without looking for garbage among what they define."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

# At the end, all of it can be freed: Triton's bindings report what is left as leaked.
atexit.register(gc.unfreeze)


@contextmanager
def without_collection() -> Iterator[None]:
    """Disable the garbage collector during imports, and exclude what they define from it later.

    Modules are never garbage. Scanning those of torch and DeepSpeed takes a quarter of the time of
    their imports, and half a second in each full collection afterwards, such as those of ZeRO-3.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
