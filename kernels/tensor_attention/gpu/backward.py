"""One hop backward on the GPU: each program owns what it writes (no atomics).

Long lines take two kernels, short ones (`backward_line`) do all of the following in one.

The first owns queries: dq, the gradient of the bias per token, of the state's log-sum-exp, and
delta = <dz, z>. The second owns keys: dk and the gradient of the values. Where the values are the
state's z (every hop but the first of `tensor_attention`) that is also the gradient of the state.
The formulas are in `kernels/README.md`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .backward_key import backward_keys
from .backward_line import backward_lines
from .backward_query import QueryGradients, backward_queries
from .launch import Hop
from .tiles import backward_line_tiles


class HopGradients(NamedTuple):
    """What the backward of a hop returns beside dq, dk, dvalues; None where there is no such input.

    `dbias` is [H] float32. `dlse_before`, the gradient of the state's log-sum-exp, and
    `delta_before`, the row sums <dz, z> that the hop before needs, are [B, H, T] float32;
    `delta_before` exists where the values are the state's z.
    """

    dbias: Tensor | None
    dlse_before: Tensor | None
    delta_before: Tensor | None


def hop_backward(
    hop: Hop,
    z: Tensor | None,
    lse: Tensor,
    dz: Tensor,
    dlse: Tensor | None,
    *,
    delta: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    accumulate: bool,
    dvalues: Tensor,
    dz_before: Tensor | None,
) -> HopGradients:
    """Write the gradients of one hop; all tensors contiguous.

    Args:
        z: [B, T, H, E] and lse [B, H, T]: results of the hop.
        dz, dlse: gradients that arrive for them; dlse None is zero.
        delta: <dz, z> [B, H, T] where it is known; z is not read then and may be None.
        dq, dk: written, or added to if `accumulate`.
        dvalues: written. With `dz_before` None, the state's z is the values and its gradient is
            included here; otherwise it is written to `dz_before`.
    """
    grads = QueryGradients(
        delta=torch.empty_like(lse) if delta is None else delta,
        dbias=None if hop.bias is None else torch.empty_like(lse),
        dlse_before=None if hop.lse_before is None else torch.empty_like(lse),
    )
    values_are_state = hop.lse_before is not None and dz_before is None
    delta_before = torch.empty_like(lse) if values_are_state else None
    line_tiles = backward_line_tiles(hop) if dz_before is None else None
    if line_tiles is not None:
        backward_lines(
            hop, z if delta is None else None, lse, dz, dlse, dq, dk, dvalues, grads,
            accumulate=accumulate, delta_before=delta_before, tiles=line_tiles,
        )  # fmt: skip
    else:
        backward_queries(
            hop, z if delta is None else None, lse, dz, dlse, dq, grads,
            accumulate=accumulate, dz_before=dz_before,
        )  # fmt: skip
        backward_keys(
            hop, lse, dz, dlse, grads.delta, dk, dvalues,
            accumulate=accumulate, delta_before=delta_before,
        )  # fmt: skip
    dbias = None if grads.dbias is None else grads.dbias.sum((0, 2))
    return HopGradients(dbias, grads.dlse_before, delta_before)
