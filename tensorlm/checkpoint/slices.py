"""What a checkpoint holds of one rank: slices of flattened parameters, with their Adam state."""

from dataclasses import dataclass

from torch import Tensor

ADAM_STATE = ("exp_avg", "exp_avg_sq")
STATE = ("master", *ADAM_STATE)


@dataclass(frozen=True)
class ParameterSlice:
    """This rank's share [start, stop) of one flattened parameter, as live views."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    state: dict[str, Tensor]  # by the names in STATE, each [stop - start]; fp32, moments maybe bf16
    is_owned: bool = True  # False where another rank holds, and saves, the same values
