"""Kernels of the grouped form: each tile of tokens works on the experts it uses.

Tokens are in an order that brings those with the same experts together. A tile of BM
of them has a list of the experts it uses; the kernels walk that list in chunks of EC
experts, whose factors they gather row by row. Whatever the order, the result is right;
the order only makes the lists short.

Rank space is compact, [T, K, r]: the k-th expert of a token in ascending order. A slot
is that k; -1 where a token does not use an expert. Slots beyond the experts of a token
are never written and never read.

Shape legend
    T tokens   E experts   r rank of one expert, RP padded to a power of two
    K experts per token, at most   L experts per tile, at most   BM tokens in a tile
"""

import triton
import triton.language as tl

from molora.kernels.triton_tiles import keep


@triton.jit  # type: ignore[untyped-decorator]
def listed_experts(lists, count, first, block, L: tl.constexpr, EC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Experts of one chunk of the list of a tile, and which of them exist."""
    place = first + tl.arange(0, EC)
    exists = place < count
    return tl.load(lists + block * L + place, exists, other=0), exists


@triton.jit  # type: ignore[untyped-decorator]
def factor_rows(expert, exists, r: tl.constexpr, EC: tl.constexpr, RP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row of the factor for every rank column of a chunk, and which of them exist."""
    rank = tl.arange(0, RP)
    rows = expert.to(tl.int64)[:, None] * r + rank[None, :]
    there = exists[:, None] & (rank < r)[None, :]
    return tl.reshape(rows, (EC * RP,)), tl.reshape(there, (EC * RP,))


@triton.jit  # type: ignore[untyped-decorator]
def compact(rows, slot, K: tl.constexpr, r: tl.constexpr, RP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Places in compact rank space of a chunk, [BM, EC, RP], and which exist."""
    rank = tl.arange(0, RP)
    place = (rows[:, None] * K + slot) * r
    there = (slot >= 0)[:, :, None] & (rank < r)[None, None, :]
    return place[:, :, None] + rank[None, None, :], there


@triton.jit  # type: ignore[untyped-decorator]
def weights(gates, scales, scale, rows, slot, expert, E: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gate of every token and expert of a chunk [BM, EC], and scale of the experts."""
    at = rows[:, None] * E + expert[None, :]
    gate = tl.load(gates + at, slot >= 0, other=0.0)
    if scales is None:
        factor = tl.zeros_like(expert).to(tl.float32) + scale
    else:
        factor = tl.load(scales + expert)
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
    COLUMNS: tl.constexpr,
):
    """Gathered rows of a wide matrix times gathered rows of a factor."""
    step = tl.arange(0, BN)
    in_at = wide_in + rows[:, None] * stride + step[None, :]
    factor_at = factor + factor_row[:, None] * wide + step[None, :]
    acc = tl.zeros((BM, COLUMNS), dtype=tl.float32)
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


@triton.jit(do_not_specialize=["T", "seed"])  # type: ignore[untyped-decorator]
def grouped_shrink(  # type: ignore[no-untyped-def]
    wide_in,
    factor,
    order,
    lists,
    counts,
    slots,
    out,
    z,
    gates,
    scales,
    dgates,
    T,
    wide,
    stride,
    scale,
    seed,
    p,
    E: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    r: tl.constexpr,
    EC: tl.constexpr,
    RP: tl.constexpr,
    SHARED: tl.constexpr,
    EVEN: tl.constexpr,
    DROP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Compact z = A x, or with z given dz and dgates of h = Bt dy.

    Grid (chunks, tiles); a program whose chunk is beyond its list has nothing to do.
    """
    block = tl.program_id(1)
    first = tl.program_id(0) * EC
    count = tl.load(counts + block)
    if first < count:
        place = block.to(tl.int64) * BM + tl.arange(0, BM)
        live = place < T
        rows = tl.load(order + place, live, other=0).to(tl.int64)
        expert, exists = listed_experts(lists, count, first, block, L, EC)
        used = live[:, None] & exists[None, :]
        slot = tl.load(slots + rows[:, None] * E + expert[None, :], used, other=-1)
        owner = tl.zeros_like(expert) if SHARED else expert
        factor_row, there = factor_rows(owner, exists, r, EC, RP)
        DTYPE: tl.constexpr = out.dtype.element_ty
        acc = project_rows(wide_in, stride, factor, wide, rows, live, factor_row, there,
                           seed, p, DTYPE, DROP, EVEN, BM, BN, EC * RP)  # fmt: skip
        acc = tl.reshape(acc, (BM, EC, RP))
        at, here = compact(rows, slot, K, r, RP)
        if z is not None:
            gate, factors = weights(gates, scales, scale, rows, slot, expert, E)
            acc = acc * factors[None, :, None]
            if dgates is not None:
                narrow = tl.load(z + at, here, other=0.0).to(tl.float32)
                gate_at = dgates + rows[:, None] * E + expert[None, :]
                tl.store(gate_at, tl.sum(acc * narrow, axis=2), slot >= 0)
            acc = acc * gate[:, :, None]
        tl.store(out + at, acc.to(DTYPE), here)


@triton.jit(do_not_specialize=["T", "seed"])  # type: ignore[untyped-decorator]
def grouped_expand(  # type: ignore[no-untyped-def]
    z,
    factor,
    order,
    lists,
    counts,
    slots,
    gates,
    scales,
    base,
    y,
    T,
    wide,
    stride,
    scale,
    seed,
    p,
    E: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    r: tl.constexpr,
    EC: tl.constexpr,
    RP: tl.constexpr,
    SHARED: tl.constexpr,
    EVEN: tl.constexpr,
    DROP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Y = base + gated z Bt; dx = dz A where gates are None. Grid (columns, tiles)."""
    block = tl.program_id(1)
    count = tl.load(counts + block)
    place = block.to(tl.int64) * BM + tl.arange(0, BM)
    live = place < T
    rows = tl.load(order + place, live, other=0).to(tl.int64)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = tl.full((BN,), 1, tl.int1) if EVEN else columns < wide
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(0, count, EC):
        expert, exists = listed_experts(lists, count, first, block, L, EC)
        used = live[:, None] & exists[None, :]
        slot = tl.load(slots + rows[:, None] * E + expert[None, :], used, other=-1)
        at, here = compact(rows, slot, K, r, RP)
        narrow = tl.load(z + at, here, other=0.0)
        if gates is not None:
            gate, factors = weights(gates, scales, scale, rows, slot, expert, E)
            narrow = narrow.to(tl.float32) * (gate * factors[None, :])[:, :, None]
        narrow = tl.reshape(narrow.to(z.dtype.element_ty), (BM, EC * RP))
        owner = tl.zeros_like(expert) if SHARED else expert
        factor_row, there = factor_rows(owner, exists, r, EC, RP)
        wide_at = factor + factor_row[:, None] * wide + columns[None, :]
        tile = tl.load(wide_at, there[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(narrow, tile.to(narrow.dtype), acc, input_precision="ieee")
    if DROP:
        acc = tl.where(keep(seed, p, rows, columns, wide), acc / (1.0 - p), 0.0)
    mask = live[:, None] & inside[None, :]
    if base is not None:
        base_at = base + rows[:, None] * stride + columns[None, :]
        acc += tl.load(base_at, mask, other=0.0).to(tl.float32)
    out = y + rows[:, None] * wide + columns[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["seed"])  # type: ignore[untyped-decorator]
def grouped_wgrad(  # type: ignore[no-untyped-def]
    z,
    wide_in,
    pairs,
    starts,
    gates,
    scales,
    out,
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

    The sum runs over the pairs of the expert in ascending order of tokens. An expert
    without a pair gets zeros.
    """
    expert = tl.program_id(1)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = tl.full((BN,), 1, tl.int1) if EVEN else columns < wide
    rank = tl.arange(0, RP)
    start = tl.load(starts + expert)
    end = tl.load(starts + expert + 1)
    acc = tl.zeros((BN, RP), dtype=tl.float32)
    for first in range(start, end, BM):
        place = first + tl.arange(0, BM)
        live = place < end
        pair = tl.load(pairs + place, live, other=0).to(tl.int64)
        rows = pair // K
        mask = live[:, None] & (rank < r)[None, :]
        narrow = tl.load(z + pair[:, None] * r + rank[None, :], mask, other=0.0)
        if gates is not None:
            weight = tl.load(gates + rows * E + expert, live, other=0.0)
            factor = scale if scales is None else tl.load(scales + expert)
            narrow = narrow.to(tl.float32) * (weight * factor)[:, None]
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
