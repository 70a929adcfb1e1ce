"""The measured device, its clock and its memory."""

import gc
import time

import torch


def find_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def now(device: torch.device) -> float:
    """Seconds on a clock, after `device` has finished all pending work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def release_memory() -> None:
    """Return unused memory to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
