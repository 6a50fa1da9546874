"""Which backend is fastest for a call: closed forms in bytes and multiplications.

A backend is a list of kernels. A kernel takes the longer of its multiplications at the
machine's rate and its bytes at the machine's bandwidth, plus a fixed time to start:

    seconds = sum over kernels of max(flops / rate, bytes / bandwidth) + launch

Every count below is what the backend's source does: the concatenated form reads x once
for all R = E r ranks and is bound by memory until R reaches the machine's balance
(rate / bandwidth); the sorted forms pay for ordering the tokens, and for gathering rows
or walking the experts of a tile, and win where R is far above that.

Limitations: caches are not modelled; measured rates stand in for them.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple


class Machine(NamedTuple):
    """What a device can do."""

    gemm: float
    """FLOP per second of a product with a narrow side (tens to hundreds of ranks)."""
    grouped: float
    """FLOP per second of the same work as a grouped product of small groups."""
    bandwidth: float
    """Bytes per second of copying, reads and writes counted."""
    launch: float
    """Seconds that one more operation costs, however small."""


class Shape(NamedTuple):
    """Sizes of a call."""

    tokens: int
    wide_in: int
    wide_out: int
    experts: int
    rank: int
    top_k: int
    """Experts per token, at most."""
    itemsize: int
    """Bytes of a value in the computation."""
    training: bool
    """Whether gradients of the experts and of x are computed as well."""


class Work(NamedTuple):
    """One kernel, or several of the same kind."""

    flops: float
    bytes: float
    launches: int = 1
    is_grouped: bool = False


def concatenated(s: Shape) -> Iterator[Work]:
    """All experts as one factor of R = E r ranks: torch, and Triton's dense kernels."""
    ranks, size = s.experts * s.rank, s.itemsize
    for wide, others in ((s.wide_in, 1), (s.wide_out, 2)):
        tall, factor, thin = s.tokens * wide, ranks * wide, s.tokens * ranks
        flops = 2.0 * tall * ranks
        # forward: x to z; zg onto base
        yield Work(flops, size * (others * tall + factor + 2 * thin))
        if s.training:
            # the product with the factor, and the gradient of the factor
            yield Work(flops, size * (tall + factor + 2 * thin))
            yield Work(flops, size * (tall + factor + thin))
    if s.training:
        yield Work(0.0, size * 4 * s.tokens * ranks, launches=6)


def sorted_pairs(s: Shape) -> Iterator[Work]:
    """Pairs sorted by expert, rows gathered and summed: the CPU's sorted form."""
    pairs, size = s.tokens * s.top_k, s.itemsize
    touched = min(s.experts, pairs) * s.rank
    # finding and ordering the pairs, in forward and again in backward
    yield Work(0.0, 8.0 * s.tokens * s.experts, launches=8)
    for wide in (s.wide_in, s.wide_out):
        tall, factor, thin = pairs * wide, touched * wide, pairs * s.rank
        flops = 2.0 * tall * s.rank
        # gather (or sum) the rows, and the grouped product
        yield Work(0.0, size * 2 * tall)
        yield Work(flops, size * (tall + factor + thin), is_grouped=True)
        if s.training:
            yield Work(0.0, size * 2 * tall)
            yield Work(0.0, size * 2 * tall if wide == s.wide_in else 0.0)
            whole = s.experts * s.rank * wide
            yield Work(flops, size * (tall + factor + thin), is_grouped=True)
            yield Work(flops, size * (tall + whole + thin), is_grouped=True)
    if s.training:
        yield Work(0.0, 8.0 * s.tokens * s.experts, launches=10)


def experts_per_tile(s: Shape, tile: int = 64) -> float:
    """Mean number of experts that a tile of sorted tokens uses, under even routing.

    Tokens are ordered by their first two experts. With one expert per token a tile
    holds one, and a border now and then. With two, a tile holds one first expert and as
    many second ones as there are runs of equal pairs in it; further experts are spread
    at random.
    """
    experts, tokens = s.experts, s.tokens
    if s.top_k == 1 or experts < 3:
        return min(float(experts), 1 + experts * tile / max(tokens, 1))
    per_pair = 2.0 * tokens / (experts * (experts - 1))
    runs = tile * -math.expm1(-per_pair) / per_pair if per_pair else 1.0
    used = min(float(experts), 1 + runs)
    drawn = tile * (s.top_k - 2)
    return used - (experts - used) * math.expm1(-drawn / experts)


def fused_tiles(s: Shape) -> Iterator[Work]:
    """Tiles of tokens sorted by expert, each walking its experts: Triton's grouped."""
    pairs, size = s.tokens * s.top_k, s.itemsize
    tile_rank = experts_per_tile(s) * s.rank
    # ordering the tokens and listing the experts of each tile
    yield Work(0.0, 8.0 * s.tokens * s.experts, launches=15)
    for wide, passes in ((s.wide_in, 1), (s.wide_out, 2)):
        tall, thin = s.tokens * wide, pairs * s.rank
        factor = s.experts * s.rank * wide
        flops = 2.0 * tall * tile_rank
        yield Work(flops, size * (passes * tall + factor + thin))
        if s.training:
            yield Work(flops, size * (tall + factor + thin))
            # the gradient of a factor reads a row once per expert that uses it
            exact = 2.0 * pairs * wide * s.rank
            yield Work(exact, size * (s.top_k * tall + factor + thin), is_grouped=True)
    if s.training:
        yield Work(0.0, 8.0 * s.tokens * s.experts, launches=15)


def gathered(s: Shape) -> Iterator[Work]:
    """Each token reads its own experts: Triton's decoding kernels."""
    if s.training:
        raise ValueError("the gathered form has no backward")
    pairs, size = s.tokens * s.top_k, s.itemsize
    for wide, passes in ((s.wide_in, 1), (s.wide_out, 2)):
        factor = pairs * s.rank * wide
        yield Work(2.0 * factor, size * (passes * s.tokens * wide + factor))


FORMS = {
    "torch": concatenated,
    "sorted": sorted_pairs,
    "triton": concatenated,
    "triton_grouped": fused_tiles,
    "triton_gather": gathered,
}
"""The form that each backend computes."""


def seconds(backend: str, shape: Shape, machine: Machine) -> float:
    """Predicted time of a call, forward and, in training, backward."""
    total = 0.0
    for work in FORMS[backend](shape):
        rate = machine.grouped if work.is_grouped else machine.gemm
        total += max(work.flops / rate, work.bytes / machine.bandwidth)
        total += work.launches * machine.launch
    return total


def fastest(backends: list[str], shape: Shape, machine: Machine) -> str:
    """The backend with the least predicted time; the earlier one where equal."""
    return min(backends, key=lambda name: seconds(name, shape, machine))
