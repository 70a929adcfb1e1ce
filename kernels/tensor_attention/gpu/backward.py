"""One hop backward on the GPU. Each output is written by one program only (no atomics).

Long lines need two kernels. The first owns queries: it computes dq, the bias's gradient per token,
the gradient of the state's log-sum-exp, and delta = <dz, z>. The second owns keys: it computes dk
and the gradient of the values. If the values are the state's z (in every hop of `tensor_attention`
but the first), this includes the gradient of the state. For short lines, one kernel computes
everything (`backward_line`). The formulas are in `kernels/README.md`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .backward_key import backward_keys
from .backward_line import backward_lines
from .backward_query import QueryGradients, backward_queries
from .launch import Hop
from .tiles import backward_key_tiles, backward_line_tiles, backward_query_tiles


class HopGradients(NamedTuple):
    """Results of a hop's backward pass other than dq, dk, dvalues; None for absent inputs.

    `dbias` is [H] float32. `dlse_before`, the gradient of the state's log-sum-exp, and
    `delta_before`, the row sums <dz, z> for the previous hop, are [B, H, T] float32. `delta_before`
    is None unless the values are the state's z.
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
        hop: the inputs of the hop.
        z: result of the hop, [B, T, H, E]; may be None if `delta` is given.
        lse: result of the hop, [B, H, T].
        dz: gradient of z.
        dlse: gradient of lse; None: zero.
        delta: <dz, z> [B, H, T]; None: it is computed from z.
        dq, dk: outputs.
        accumulate: whether to add to dq and dk instead of writing them.
        dvalues: output.
        dz_before: output, the gradient of the state's z. None: the values are the state's z, and
            `dvalues` includes its gradient.
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
        query_tiles, key_tiles = backward_query_tiles(hop), backward_key_tiles(hop)
        assert query_tiles.rotate_first == key_tiles.rotate_first
        keys = hop.rotated(hop.k, key_tiles.rotate_first)
        backward_queries(
            hop, z if delta is None else None, lse, dz, dlse, dq, grads,
            keys=keys, accumulate=accumulate, dz_before=dz_before,
        )  # fmt: skip
        backward_keys(
            hop, lse, dz, dlse, grads.delta, dk, dvalues,
            keys=keys, accumulate=accumulate, delta_before=delta_before,
        )  # fmt: skip
    dbias = None if grads.dbias is None else grads.dbias.sum((0, 2))
    return HopGradients(dbias, grads.dlse_before, delta_before)
