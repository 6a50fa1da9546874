"""Expert capacity: what goes beyond an expert's share of tokens is left to the base.

    limit = ceil(capacity * assignments / E)

An expert serves its first ``limit`` tokens, in the order of rows and positions; for the
others its gate becomes zero, and other gates stay as they are. Reference: Fedus et al.
2021, arXiv:2101.03961, equation 3, where overflow passes by the residual connection, as
it passes by the base layer here.

Shape legend: see base.py.
"""

import torch
from torch import Tensor


def limited(gates_TE: Tensor, capacity: float, weight_T: Tensor | None) -> Tensor:
    """Gates without what overflows.

    Args:
        gates_TE: Gates, zero where an expert was not chosen.
        capacity: Multiple of the mean load that an expert serves.
        weight_T: 1 at real tokens, 0 at padding, which neither counts nor is cut; None
            when all are real.

    Returns:
        [T, E]. No gradient is read where a gate was cut.
    """
    used_TE = gates_TE.detach() != 0
    if weight_T is not None:
        used_TE &= (weight_T > 0).unsqueeze(-1)
    places_TE = used_TE.cumsum(0)
    share = capacity * used_TE.sum().double() / gates_TE.shape[-1]
    # a margin for products that are whole numbers but for rounding
    limit = torch.ceil(share - 1e-6)
    return gates_TE.masked_fill(used_TE & (places_TE > limit), 0.0)
