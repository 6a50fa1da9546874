"""Which token uses which expert, arranged on the device for the grouped kernels.

The k-th expert of a token, in ascending order, is its slot k. For every slot apart, the
tokens are sorted by that expert: a counting sort in two kernels and a running sum. A
token with fewer experts is in group E of its further slots, which has no expert.

Nothing waits for the host, every shape follows from the shapes of the arguments, and
tokens of a group keep their order, so the same gates are arranged the same way always.

Shape legend
    T tokens   E experts   K experts per token, at most   P = T K places
    G = K (E + 1) groups: those of slot 0, then of slot 1, ...   N blocks of BT tokens
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora.kernels.configs import Config
from molora.kernels.triton_tiles import cdiv, launch, power_of_2

LAUNCH = Config(BM=1, BN=1, warps=4, stages=1)
"""How both kernels are launched, whatever the shapes."""

_TILE = 4096
"""Gates that one block looks at."""


class Route(NamedTuple):
    """Which token uses which expert, arranged for the kernels; int32."""

    order_P: Tensor
    """Tokens by slot, expert, and number."""
    offsets: Tensor
    """[G * N + 1] where the tokens of each group and block begin in order, and P."""
    blocks: int
    """N: every N-th of the offsets is where a group begins."""


@triton.jit  # type: ignore[untyped-decorator]
def slots(gates, rows, live, E: tl.constexpr, EP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which gates of some tokens are used, and the slot of each, [BT, EP]."""
    expert = tl.arange(0, EP)
    at = gates + rows[:, None] * E + expert[None, :]
    used = tl.load(at, live[:, None] & (expert < E)[None, :], other=0.0) != 0.0
    return used, tl.cumsum(used.to(tl.int32), 1) - 1


@triton.jit(do_not_specialize=["T"])  # type: ignore[untyped-decorator]
def route_count(  # type: ignore[no-untyped-def]
    gates,
    chosen,
    counts,
    T,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
):
    """Experts of every slot of a block of tokens, and how many tokens each has."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    rows = block.to(tl.int64) * BT + tl.arange(0, BT)
    live = rows < T
    expert = tl.arange(0, EP)
    used, slot = slots(gates, rows, live, E, EP)
    for k in range(K):
        here = (used & (slot == k)).to(tl.int32)
        found = tl.sum(here, 1)
        owner = tl.where(found > 0, tl.sum(here * expert[None, :], 1), E)
        tl.store(chosen + rows * K + k, owner, live)
        at = counts + (k * (E + 1) + expert) * blocks + block
        tl.store(at, tl.sum(here, 0), expert < E)
        missing = tl.sum((live & (found == 0)).to(tl.int32), 0)
        tl.store(counts + (k * (E + 1) + E) * blocks + block, missing)


@triton.jit(do_not_specialize=["T"])  # type: ignore[untyped-decorator]
def route_place(  # type: ignore[no-untyped-def]
    chosen,
    offsets,
    order,
    T,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
):
    """Put the tokens of a block where its offsets say; EP holds E + 1."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    rows = block.to(tl.int64) * BT + tl.arange(0, BT)
    live = rows < T
    expert = tl.arange(0, EP)
    for k in range(K):
        owner = tl.load(chosen + rows * K + k, live, other=-1)
        here = (owner[:, None] == expert[None, :]).to(tl.int32)
        at = offsets + (k * (E + 1) + expert) * blocks + block
        first = tl.load(at, expert <= E, other=0)
        place = tl.sum(here * (tl.cumsum(here, 0) - 1 + first[None, :]), 1)
        tl.store(order + place, rows.to(tl.int32), live)


def block_of(tokens: int, experts: int) -> int:
    """Tokens that one program of the routing kernels looks at."""
    return max(1, min(power_of_2(tokens), _TILE // power_of_2(experts + 1)))


def route(gates_TE: Tensor, top_k: int) -> Route:
    """Arrange tokens and experts without waiting for the host.

    Args:
        gates_TE: Gates; zero where a token does not use an expert.
        top_k: Most gates of a row that are not zero; further ones are left out.
    """
    tokens, experts = gates_TE.shape
    block = block_of(tokens, experts)
    blocks = cdiv(tokens, block)
    chosen_TK = gates_TE.new_empty(tokens, top_k, dtype=torch.int32)
    counts = chosen_TK.new_empty(top_k * (experts + 1) * blocks)
    offsets = chosen_TK.new_zeros(len(counts) + 1)
    order_P = chosen_TK.new_empty(tokens * top_k)
    common = {"T": tokens, "E": experts, "K": top_k, "BT": block}
    launch(
        route_count,
        (blocks,),
        {"gates": gates_TE, "chosen": chosen_TK, "counts": counts},
        LAUNCH,
        EP=power_of_2(experts),
        **common,
    )
    torch.cumsum(counts, 0, dtype=torch.int32, out=offsets[1:])
    launch(
        route_place,
        (blocks,),
        {"chosen": chosen_TK, "offsets": offsets, "order": order_P},
        LAUNCH,
        EP=power_of_2(experts + 1),
        **common,
    )
    return Route(order_P, offsets, blocks)
