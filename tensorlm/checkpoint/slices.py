"""One rank's part of a checkpoint: slices of flattened parameters with their Adam state."""

from typing import NamedTuple

from torch import Tensor

ADAM_STATE = ("exp_avg", "exp_avg_sq")
STATE = ("master", *ADAM_STATE)


class ParameterSlice(NamedTuple):
    """This rank's range [start, stop) of one flattened parameter, as live views."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    state: dict[str, Tensor]  # a tensor [stop - start] per name in STATE; fp32, moments maybe bf16
    is_owned: bool = True  # False if another rank holds and saves the same values
