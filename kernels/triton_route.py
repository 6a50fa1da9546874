"""Which token uses which expert, arranged on the device for the grouped kernels.

Nothing waits for the host, every shape follows from the shapes of the arguments, and
ties are broken by order, so the same gates are arranged the same way every time.

Shape legend
    T tokens   E experts   K experts per token, at most   P = T K pairs
    N tiles of tokens   L experts per tile, at most   BM tokens in a tile
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor


class Route(NamedTuple):
    """Which token uses which expert, arranged for the kernels; int32."""

    order_T: Tensor
    """Tokens ordered by their first two experts."""
    lists_NL: Tensor
    """Experts that each of the N tiles uses, ascending."""
    counts_N: Tensor
    """How many experts each tile uses."""
    slots_TE: Tensor
    """Place of an expert among those of its token, -1 where it is not used."""
    pairs_P: Tensor
    """Pairs of token and slot, as token * K + slot, ordered by expert."""
    starts_E: Tensor
    """Where the pairs of each expert start, and where the last ones end."""


def route(gates_TE: Tensor, top_k: int, BM: int) -> Route:
    """Arrange the pairs of tokens and experts without waiting for the host.

    Args:
        gates_TE: Gates; zero where a token does not use an expert.
        top_k: Most gates of a row that are not zero; further ones are left out.
        BM: Tokens in a tile.
    """
    tokens, experts = gates_TE.shape
    expert_E = torch.arange(experts, device=gates_TE.device)
    slots_TE = (gates_TE != 0).cumsum(1) - 1
    used_TE = (gates_TE != 0) & (slots_TE < top_k)
    named_TE = torch.where(used_TE, expert_E, experts)
    # missing experts are all the same number, so their order does not matter
    chosen_TK = named_TE.topk(top_k, 1, largest=False, sorted=True).values
    second_T = chosen_TK[:, min(1, top_k - 1)]
    order_T = (chosen_TK[:, 0] * (experts + 1) + second_T).argsort(stable=True)
    tiles = triton.cdiv(tokens, BM)
    sorted_NE = used_TE.new_zeros(tiles * BM, experts)
    sorted_NE[:tokens] = used_TE[order_T]
    present_NE = sorted_NE.view(tiles, BM, experts).any(1)
    lists_NE = present_NE.logical_not().byte().argsort(dim=1, stable=True)
    by_expert = chosen_TK.flatten().sort(stable=True)
    bounds = torch.arange(experts + 1, device=gates_TE.device)
    return Route(
        order_T.int(),
        lists_NE[:, : min(experts, BM * top_k)].int().contiguous(),
        present_NE.sum(1).int(),
        torch.where(used_TE, slots_TE, -1).int(),
        by_expert.indices.int(),
        torch.searchsorted(by_expert.values, bounds).int(),
    )
