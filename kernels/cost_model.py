"""Which backend is fastest for a call: closed forms in bytes and multiplications.

A backend is a list of kernels. A kernel takes the longer of its multiplications at the
machine's rate and its bytes at the machine's bandwidth, plus a fixed time to start:

    seconds = sum over kernels of max(flops / rate, bytes / bandwidth) + launch

Every count below is what the backend's source does: the concatenated form reads x once
for all R = E r ranks and is bound by memory until R reaches the machine's balance
(rate / bandwidth); the sorted forms pay for ordering the tokens, read and write a row
once per expert that uses it, and win where R is far above that.

Limitations: caches are not modelled; measured rates stand in for them.
"""

from collections.abc import Iterator
from typing import NamedTuple


class Machine(NamedTuple):
    """What a device can do."""

    gemm: float
    """FLOP per second of a product with a narrow side (tens to hundreds of ranks)."""
    grouped: float
    """FLOP per second of the same work as a grouped product of small groups; on a GPU,
    in the tiles of the Triton kernels."""
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


def concatenated(s: Shape, in_tiles: bool = False) -> Iterator[Work]:
    """Products of all experts as one factor of R = E r ranks, forward and backward."""
    ranks, size = s.experts * s.rank, s.itemsize
    for wide, others in ((s.wide_in, 1), (s.wide_out, 2)):
        tall, factor, thin = s.tokens * wide, ranks * wide, s.tokens * ranks
        flops = 2.0 * tall * ranks
        # forward: x to z; zg onto base
        yield Work(flops, size * (others * tall + factor + 2 * thin), 1, in_tiles)
        if s.training:
            # the product with the factor, and the gradient of the factor
            yield Work(flops, size * (tall + factor + 2 * thin), 1, in_tiles)
            yield Work(flops, size * (tall + factor + thin), 1, in_tiles)


def plain(s: Shape) -> Iterator[Work]:
    """The concatenated form in torch on a CPU, which adds gates in rank space."""
    yield from concatenated(s)
    if s.training:
        yield Work(0.0, s.itemsize * 4 * s.tokens * s.experts * s.rank, launches=6)


def library(s: Shape) -> Iterator[Work]:
    """The same on a GPU: a dozen passes over rank space in float32, a copy of base.

    120 bytes per rank and token in training is what was counted on an H100.
    """
    yield from concatenated(s)
    thin = s.tokens * s.experts * s.rank
    yield Work(0.0, (120.0 if s.training else 40.0) * thin, launches=12)
    yield Work(0.0, 2.0 * s.itemsize * s.tokens * s.wide_out)


def rank_space(s: Shape) -> Iterator[Work]:
    """The concatenated form in Triton, where rank space costs nothing of its own."""
    yield from concatenated(s, in_tiles=True)


def sorted_pairs(s: Shape) -> Iterator[Work]:
    """Pairs sorted by expert, rows gathered and summed: the CPU's sorted form."""
    pairs, size = s.tokens * s.top_k, s.itemsize
    touched = min(s.experts, pairs) * s.rank
    # finding and ordering the pairs, in forward and again in backward
    yield Work(0.0, 8.0 * s.tokens * s.experts, launches=8)
    for wide in (s.wide_in, s.wide_out):
        tall, factor, thin = pairs * wide, touched * wide, pairs * s.rank
        flops, whole = 2.0 * tall * s.rank, s.experts * s.rank * wide
        # rows are gathered, or added onto a sum that is written before; what is
        # written anew counts twice, since its pages are cleared first
        gather = Work(0.0, size * 3 * tall)
        scatter = Work(0.0, size * (4 * tall + 3 * s.tokens * wide), launches=2)
        yield gather if wide == s.wide_in else scatter
        yield Work(flops, size * (tall + factor + thin), is_grouped=True)
        if s.training:
            yield gather
            yield Work(flops, size * (tall + factor + thin), is_grouped=True)
            yield Work(flops, size * (tall + whole + thin), is_grouped=True)
    if s.training:
        # the gradient of x is summed, then added onto the layer's
        moved = (4 * pairs + 5 * s.tokens) * s.wide_in
        yield Work(0.0, size * moved, launches=3)
        yield Work(0.0, 8.0 * s.tokens * s.experts, launches=10)


def by_slots(s: Shape) -> Iterator[Work]:
    """Tokens sorted by the expert of every slot: Triton's grouped form."""
    pairs, size, slots = s.tokens * s.top_k, s.itemsize, s.top_k
    # forward: every slot reads x; the sum of the updates, base and y for every slot
    passes = [(s.wide_in, slots, 1), (s.wide_out, 2 * slots, slots)]
    arranged = Work(0.0, 8.0 * s.tokens * s.experts, launches=4)
    yield arranged
    if s.training:
        yield arranged
        # ranks of dy, both gradients of the factors, and dx like y but without base
        passes += [(s.wide_out, slots, 1), (s.wide_out, slots, 1)]
        passes += [(s.wide_in, slots, 1), (s.wide_in, 2 * slots - 1, slots)]
    for wide, times, launches in passes:
        factor = s.experts * s.rank * wide
        moved = times * s.tokens * wide + factor + pairs * s.rank
        yield Work(2.0 * pairs * wide * s.rank, size * moved, launches, True)


def gathered(s: Shape) -> Iterator[Work]:
    """Each token reads its own experts: Triton's decoding kernels."""
    if s.training:
        raise ValueError("the gathered form has no backward")
    pairs, size = s.tokens * s.top_k, s.itemsize
    for wide, passes in ((s.wide_in, 1), (s.wide_out, 2)):
        factor = pairs * s.rank * wide
        yield Work(2.0 * factor, size * (passes * s.tokens * wide + factor))


def walked(s: Shape) -> Iterator[Work]:
    """Expert after expert that is in use: the CPU's decoding form."""
    if s.training:
        raise ValueError("the gathered form has no backward")
    used, size = min(s.experts, s.tokens * s.top_k), s.itemsize
    thin, wide_out = s.tokens * s.rank, 2 * s.tokens * s.wide_out
    for wide, others in ((s.wide_in, s.tokens * s.wide_in), (s.wide_out, wide_out)):
        moved = used * (others + s.rank * wide + thin)
        # with the selection of the expert's factor
        yield Work(2.0 * used * thin * wide, size * moved, 2 * used)


FORMS = {
    "torch": plain,
    "torch on a GPU": library,
    "sorted": sorted_pairs,
    "gather": walked,
    "triton": rank_space,
    "triton_grouped": by_slots,
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
