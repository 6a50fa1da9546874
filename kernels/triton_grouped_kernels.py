"""Kernels of the grouped form: every tile of tokens has one expert.

A tile is up to BM tokens that have the same expert in the same slot; a program finds
its tile in the offsets of ``molora.kernels.triton_route``, of which there are as many
as shapes allow, and ends at once where there is none. Factors are those of one expert,
so products have r columns. x is read once per slot; each slot but the last adds onto
a sum of updates, and the last onto base, so that y is rounded once.

Rank space is compact, [T, K, r]: the k-th expert of a token in ascending order. Slots
beyond the experts of a token are never written and never read.

Shape legend
    T tokens   E experts   r rank of one expert, RP padded to a power of two
    K experts per token, at most   BM tokens in a tile   N see triton_route
"""

import triton
import triton.language as tl

from molora.kernels.triton_tiles import keep


@triton.jit  # type: ignore[untyped-decorator]
def find(  # type: ignore[no-untyped-def]
    offsets,
    blocks,
    number,
    slot,
    E: tl.constexpr,
    GROUPS: tl.constexpr,
    GP: tl.constexpr,
    BM: tl.constexpr,
):
    """Slot and expert of a tile, and the places of its tokens: first, end.

    The tiles of slot after slot are numbered one by one, from those of ``slot`` on. One
    that does not exist has no places.
    """
    group = tl.arange(0, GP)
    real = group < GROUPS
    at = offsets + (slot * (E + 1) + group) * blocks
    start = tl.load(at, real, other=0)
    end = tl.load(at + blocks, real, other=0)
    tiles = (end - start + BM - 1) // BM
    after = tl.cumsum(tiles, 0)
    here = (real & (after - tiles <= number) & (number < after)).to(tl.int32)
    own = tl.sum(here * group, 0)
    first = tl.sum(here * (start + (number - after + tiles) * BM), 0)
    return slot + own // (E + 1), own % (E + 1), first, tl.sum(here * end, 0)


@triton.jit  # type: ignore[untyped-decorator]
def weight(gates, scales, scale, rows, live, expert, E: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gates of the tokens of a tile, and the scale of its expert."""
    gate = tl.load(gates + rows * E + expert, live, other=0.0)
    factor = scale if scales is None else tl.load(scales + expert)
    return gate, factor


@triton.jit  # type: ignore[untyped-decorator]
def project_rows(  # type: ignore[no-untyped-def]
    wide_in,
    stride,
    factor,
    wide,
    rows,
    live,
    factor_row,
    exists,
    seed,
    p,
    DTYPE: tl.constexpr,
    DROP: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    RP: tl.constexpr,
):
    """Gathered rows of a wide matrix times the factor of one expert, [BM, RP]."""
    step = tl.arange(0, BN)
    in_at = wide_in + rows[:, None] * stride + step[None, :]
    factor_at = factor + factor_row[:, None] * wide + step[None, :]
    acc = tl.zeros((BM, RP), dtype=tl.float32)
    for at in range(0, wide, BN):
        if EVEN:
            values = tl.load(in_at, live[:, None], other=0.0)
            factors = tl.load(factor_at, exists[:, None], other=0.0)
        else:
            inside = (at + step < wide)[None, :]
            values = tl.load(in_at, live[:, None] & inside, other=0.0)
            factors = tl.load(factor_at, exists[:, None] & inside, other=0.0)
        if DROP:
            values = tl.where(keep(seed, p, rows, at + step, wide), values, 0.0)
        acc = tl.dot(
            values.to(DTYPE), tl.trans(factors.to(DTYPE)), acc, input_precision="ieee"
        )
        in_at += BN
        factor_at += BN
    if DROP:
        acc = acc / (1.0 - p)
    return acc


@triton.jit(do_not_specialize=["seed", "blocks"])  # type: ignore[untyped-decorator]
def grouped_shrink(  # type: ignore[no-untyped-def]
    wide_in,
    factor,
    order,
    offsets,
    out,
    z,
    gates,
    scales,
    dgates,
    blocks,
    wide,
    stride,
    scale,
    seed,
    p,
    E: tl.constexpr,
    K: tl.constexpr,
    GP: tl.constexpr,
    r: tl.constexpr,
    RP: tl.constexpr,
    SHARED: tl.constexpr,
    EVEN: tl.constexpr,
    DROP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compact Z = x A^T; with z given, dz = gate * scale * (dy Bt^T), and dgates."""
    number = tl.program_id(0)
    slot, expert, first, end = find(offsets, blocks, number, 0, E, K * (E + 1), GP, BM)
    if (first < end) & (expert < E):
        place = first + tl.arange(0, BM)
        live = place < end
        rows = tl.load(order + place, live, other=0).to(tl.int64)
        rank = tl.arange(0, RP)
        owner = 0 if SHARED else expert.to(tl.int64)
        acc = project_rows(wide_in, stride, factor, wide, rows, live, owner * r + rank,
                           rank < r, seed, p, out.dtype.element_ty, DROP, EVEN, BM, BN,
                           RP)  # fmt: skip
        at = (rows * K + slot)[:, None] * r + rank[None, :]
        there = live[:, None] & (rank < r)[None, :]
        if z is not None:
            gate, factors = weight(gates, scales, scale, rows, live, expert, E)
            if dgates is not None:
                ranks = tl.load(z + at, there, other=0.0).to(tl.float32)
                value = tl.sum(acc * ranks, 1) * factors
                tl.store(dgates + rows * E + expert, value, live)
            acc *= (gate * factors)[:, None]
        tl.store(out + at, acc.to(out.dtype.element_ty), there)


@triton.jit(do_not_specialize=["seed", "blocks", "slot"])  # type: ignore[untyped-decorator]
def grouped_expand(  # type: ignore[no-untyped-def]
    z,
    factor,
    order,
    offsets,
    gates,
    scales,
    base,
    more,
    y,
    blocks,
    slot,
    wide,
    stride,
    scale,
    seed,
    p,
    E: tl.constexpr,
    K: tl.constexpr,
    GP: tl.constexpr,
    r: tl.constexpr,
    RP: tl.constexpr,
    SHARED: tl.constexpr,
    EVEN: tl.constexpr,
    DROP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Y = base + more + gated z Bt for one slot; z Bt where gates are None.

    Grid (columns, tiles). Every token is written, also one that has no expert.
    """
    number = tl.program_id(1)
    _, expert, first, end = find(offsets, blocks, number, slot, E, E + 1, GP, BM)
    if first < end:
        place = first + tl.arange(0, BM)
        live = place < end
        rows = tl.load(order + place, live, other=0).to(tl.int64)
        columns = tl.program_id(0) * BN + tl.arange(0, BN)
        inside = tl.full((BN,), 1, tl.int1) if EVEN else columns < wide
        rank = tl.arange(0, RP)
        exists = rank < tl.where(expert < E, r, 0)
        at = z + (rows * K + slot)[:, None] * r + rank[None, :]
        narrow = tl.load(at, live[:, None] & exists[None, :], other=0.0)
        if gates is not None:
            known = place < tl.where(expert < E, end, first)
            owner = tl.where(expert < E, expert, 0)
            gate, factors = weight(gates, scales, scale, rows, known, owner, E)
            narrow = narrow.to(tl.float32) * (gate * factors)[:, None]
        narrow = narrow.to(z.dtype.element_ty)
        owner = 0 if SHARED else expert.to(tl.int64)
        wide_at = factor + (owner * r + rank)[:, None] * wide + columns[None, :]
        tile = tl.load(wide_at, exists[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(narrow, tile.to(narrow.dtype), input_precision="ieee")
        if DROP:
            acc = tl.where(keep(seed, p, rows, columns, wide), acc / (1.0 - p), 0.0)
        mask = live[:, None] & inside[None, :]
        if base is not None:
            base_at = base + rows[:, None] * stride + columns[None, :]
            acc += tl.load(base_at, mask, other=0.0).to(tl.float32)
        at = rows[:, None] * wide + columns[None, :]
        if more is not None:
            acc += tl.load(more + at, mask, other=0.0).to(tl.float32)
        tl.store(y + at, acc.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["seed", "blocks"])  # type: ignore[untyped-decorator]
def grouped_wgrad(  # type: ignore[no-untyped-def]
    z,
    wide_in,
    order,
    offsets,
    gates,
    scales,
    out,
    blocks,
    wide,
    stride,
    scale,
    seed,
    p,
    E: tl.constexpr,
    K: tl.constexpr,
    r: tl.constexpr,
    RP: tl.constexpr,
    EVEN: tl.constexpr,
    DROP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Gradient of the factor of one expert, [r, wide]; grid (columns, experts).

    The sum runs over the slots, and in each over the tokens in ascending order. An
    expert that no token uses gets zeros.
    """
    expert = tl.program_id(1)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = tl.full((BN,), 1, tl.int1) if EVEN else columns < wide
    rank = tl.arange(0, RP)
    acc = tl.zeros((BN, RP), dtype=tl.float32)
    for slot in range(K):
        group = offsets + (slot * (E + 1) + expert) * blocks
        start = tl.load(group)
        end = tl.load(group + blocks)
        for first in range(start, end, BM):
            place = first + tl.arange(0, BM)
            live = place < end
            rows = tl.load(order + place, live, other=0).to(tl.int64)
            mask = live[:, None] & (rank < r)[None, :]
            at = z + (rows * K + slot)[:, None] * r + rank[None, :]
            narrow = tl.load(at, mask, other=0.0)
            if gates is not None:
                gate, factor = weight(gates, scales, scale, rows, live, expert, E)
                narrow = narrow.to(tl.float32) * (gate * factor)[:, None]
            wide_at = wide_in + rows[:, None] * stride + columns[None, :]
            values = tl.load(wide_at, live[:, None] & inside[None, :], other=0.0)
            if DROP:
                values = tl.where(keep(seed, p, rows, columns, wide), values, 0.0)
            narrow = narrow.to(z.dtype.element_ty)
            values = values.to(z.dtype.element_ty)
            acc = tl.dot(tl.trans(values), narrow, acc, input_precision="ieee")
    if DROP:
        acc = acc / (1.0 - p)
    row = expert.to(tl.int64) * r + rank
    out_at = out + row[None, :] * wide + columns[:, None]
    there = inside[:, None] & (rank < r)[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), there)
