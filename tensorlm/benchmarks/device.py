"""The device that is measured: which one, its clock, its memory."""

import gc
import time

import torch


def find_device() -> torch.device:
    """A GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def now(device: torch.device) -> float:
    """Seconds on a clock, once `device` has done all work that was started."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def release_memory() -> None:
    """Return memory that no tensor holds to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
