"""Forward of the grouped low-rank matmul in two Triton kernels, for any routing.

The experts are concatenated along the rank, as in the torch form, so x is read once
and y is written once whatever the number of experts:

    shrink_gate    z = x A^T, zg = gates * scale * z        both in rank space
    expand_add     y = base + zg Bt

Products accumulate in float32, and so does all arithmetic on elements; z, zg and y are
rounded once each. No atomics, no synchronisation, a grid that depends on shapes only.

Dropout keeps element i of token t where ``tl.rand(seed, t * I + i) >= p``; the mask is
the same for all experts, is never stored, and costs ten Philox rounds per element.

Shape legend
    T tokens   E experts   I in features   O out features   r rank of one expert
    EA, EB: experts that A, Bt hold (1 where all experts share it)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora.kernels.configs import Config
from molora.kernels.triton_tiles import (
    MAX_RANK,
    Tile,
    cdiv,
    configure,
    emit,
    gate_tile,
    get,
    keep,
    launch,
    project,
    put,
    rank_columns,
    ready,
    scale_tile,
    tile,
    unit_stride,
)


@triton.jit(do_not_specialize=["T", "seed"])  # type: ignore[untyped-decorator]
def shrink_gate(  # type: ignore[no-untyped-def]
    x,
    a,
    gates,
    scales,
    z,
    zg,
    T,
    wide,
    stride,
    scale,
    seed,
    p,
    E: tl.constexpr,
    r: tl.constexpr,
    EC: tl.constexpr,
    RP: tl.constexpr,
    NC: tl.constexpr,
    A_SHARED: tl.constexpr,
    B_SHARED: tl.constexpr,
    EVEN: tl.constexpr,
    DROP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Z = x A^T and its gated form; grid (chunks of experts / NC, rows / BM)."""
    chunk = tl.program_id(0) * NC
    rows = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    live = rows < T
    DTYPE: tl.constexpr = z.dtype.element_ty
    EZ: tl.constexpr = 1 if A_SHARED else EC
    OWN: tl.constexpr = 1 if A_SHARED else E
    if A_SHARED:
        zt = project(x, stride, a, wide, rows, live, 0, seed, p, DTYPE, OWN, r, EZ, RP,
                     EVEN, DROP, BM, BN)  # fmt: skip
        put(z, zt, rows, live, 0, OWN, r, EZ, RP)
    total = tl.zeros((BM, RP), dtype=tl.float32)
    for c in range(NC):
        first = (chunk + c) * EC
        if not A_SHARED:
            zt = project(x, stride, a, wide, rows, live, first, seed, p, DTYPE, OWN, r,
                         EZ, RP, EVEN, DROP, BM, BN)  # fmt: skip
            put(z, zt, rows, live, first, OWN, r, EZ, RP)
        weight = gate_tile(gates, rows, live, first, E, EC)
        weight *= scale_tile(scales, scale, first, E, EC)[None, :]
        gated = tl.reshape(zt, (BM, EZ, RP)) * weight[:, :, None]
        total = emit(zg, gated, total, rows, live, first, B_SHARED, E, r, EC, RP, BM)
    if B_SHARED:
        put(zg, total, rows, live, 0, 1, r, 1, RP)


@triton.jit(do_not_specialize=["T", "seed"])  # type: ignore[untyped-decorator]
def expand_add(  # type: ignore[no-untyped-def]
    zg,
    b,
    base,
    y,
    T,
    wide,
    stride,
    seed,
    p,
    E: tl.constexpr,
    r: tl.constexpr,
    EC: tl.constexpr,
    RP: tl.constexpr,
    NC: tl.constexpr,
    NT: tl.constexpr,
    EVEN: tl.constexpr,
    DROP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Y = base + zg b; grid (columns / (BN * NT), rows / BM).

    The gradient of x is the same product, of dz and A, and then has its dropout mask.
    """
    rows = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    live = rows < T
    if NC == 1:
        narrow = get(zg, rows, live, 0, E, r, EC, RP)
    for i in range(NT):
        columns = (tl.program_id(0) * NT + i) * BN + tl.arange(0, BN)
        inside = tl.full((BN,), 1, tl.int1) if EVEN else columns < wide
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for c in range(NC):
            place, exists = rank_columns(c * EC, E, r, EC, RP)
            if NC > 1:
                narrow = get(zg, rows, live, c * EC, E, r, EC, RP)
            at = b + place[:, None] * wide + columns[None, :]
            factors = tl.load(at, exists[:, None] & inside[None, :], other=0.0)
            acc = tl.dot(narrow, factors.to(narrow.dtype), acc, input_precision="ieee")
        if DROP:
            kept = keep(seed, p, rows, columns, wide)
            acc = tl.where(kept, acc / (1.0 - p), 0.0)
        mask = live[:, None] & inside[None, :]
        if base is not None:
            at = base + rows[:, None] * stride + columns[None, :]
            acc += tl.load(at, mask, other=0.0).to(tl.float32)
        out = y + rows[:, None] * wide + columns[None, :]
        tl.store(out, acc.to(y.dtype.element_ty), mask)


def forward(
    x: Tensor,
    base: Tensor | None,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float | Tensor,
    top_k: int | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Routed low-rank update and the rank vector that its backward needs.

    Args:
        x: [T, I] in bfloat16, float16 or float32, any strides.
        base: [T, O] in one of these, or None for zero.
        A: [EA, r, I], float32 or the dtype of x.
        Bt: [EB, r, O] in the dtype of A.
        gates: [T, E] float32; None means one expert with gate 1.
        scale: One number, or [E].
        top_k: Has no effect: a gate of zero costs what any other gate costs.
        dropout: Probability of dropping an element of x, below 1.
        seed: Of the dropout mask, a 63-bit number.

    Returns:
        y: [T, O] in the dtype of base (of x without base).
        z: [T, EA * r] A x in the dtype of x, before gates and scale.
    """
    x, base = unit_stride(x), None if base is None else unit_stride(base)
    y = x.new_empty(len(x), Bt.shape[2], dtype=(x if base is None else base).dtype)
    z = x.new_empty(len(x), A.shape[0] * A.shape[1])
    if not len(x):
        return y, z
    zg = x.new_empty(len(x), Bt.shape[0] * Bt.shape[1])
    shrink(x, A, Bt, gates, scale, dropout, seed, z, zg)
    expand(zg, Bt, base, y)
    return y, z


def shrink(
    x: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float | Tensor,
    dropout: float,
    seed: int,
    z: Tensor,
    zg: Tensor,
) -> None:
    """Fill z and zg; x has unit stride in its rows."""
    experts, number, scales = routing(gates, scale)
    shared = A.shape[0] < experts, Bt.shape[0] < experts
    config, cut, inside = rank_tiles("shrink_gate", x, A, experts, any(shared))
    launch(
        shrink_gate,
        (cut.chunks // inside, cdiv(len(x), config.BM)),
        {
            "x": x,
            "a": ready(A, z),
            "gates": None if gates is None else gates.contiguous(),
            "scales": scales,
            "z": z,
            "zg": zg,
        },
        config,
        T=len(x),
        wide=x.shape[1],
        stride=x.stride(0),
        scale=number,
        seed=seed,
        p=dropout,
        E=experts,
        r=A.shape[1],
        EC=cut.EC,
        RP=cut.RP,
        NC=inside,
        A_SHARED=shared[0],
        B_SHARED=shared[1],
        EVEN=x.shape[1] % config.BN == 0,
        DROP=dropout > 0,
        BM=config.BM,
        BN=config.BN,
    )


def expand(
    zg: Tensor,
    factor: Tensor,
    base: Tensor | None,
    y: Tensor,
    dropout: float = 0.0,
    seed: int = 0,
) -> None:
    """Fill y with base + zg factor, and then dropout."""
    experts, r, wide = factor.shape
    cut = tile(experts, r)
    config = configure("expand_add", y, cut)
    step = config.BN * config.columns
    launch(
        expand_add,
        (cdiv(wide, step), cdiv(len(y), config.BM)),
        {"zg": zg, "b": ready(factor, zg), "base": base, "y": y},
        config,
        T=len(y),
        wide=wide,
        stride=0 if base is None else base.stride(0),
        seed=seed,
        p=dropout,
        E=experts,
        r=r,
        EC=cut.EC,
        RP=cut.RP,
        NC=cut.chunks,
        NT=config.columns,
        EVEN=wide % step == 0,
        DROP=dropout > 0,
        BM=config.BM,
        BN=config.BN,
    )


def routing(
    gates: Tensor | None, scale: float | Tensor
) -> tuple[int, float, Tensor | None]:
    """Number of experts, and the scale as a number or as a tensor of all experts."""
    experts = 1 if gates is None else gates.shape[1]
    if isinstance(scale, Tensor):
        return experts, 1.0, scale.to(torch.float32).contiguous()
    return experts, float(scale), None


def rank_tiles(
    kernel: str, wide_in: Tensor, factor: Tensor, experts: int, shared: bool
) -> tuple[Config, Tile, int]:
    """Configuration and tile of a kernel, and the tiles that one program works on.

    ``split`` programs share the experts of the same rows, unless either factor is
    shared: a sum over all experts, and a product that is the same for all of them,
    belong into one program.

    Args:
        kernel: ``shrink_gate`` or ``bwd_rank``.
        wide_in: Rows that it multiplies.
        factor: By what.
        experts: Number of experts, of which the factor may hold one.
        shared: Whether either factor is shared by all experts.
    """
    r = factor.shape[1]
    if not shared:
        whole = tile(experts, r)
        config = configure(kernel, wide_in, whole)
        return config, tile(experts, r, whole.EC * whole.RP // config.split), 1
    # registers also hold a sum or a product for all experts: tiles of half the columns,
    # a quarter where more tiles do not read more, launched as twice as many would be
    limit = MAX_RANK // (4 if len(factor) < experts else 2)
    cut = tile(experts, r, limit, least=16)
    return configure(kernel, wide_in, cut._replace(RP=2 * cut.RP)), cut, cut.chunks
