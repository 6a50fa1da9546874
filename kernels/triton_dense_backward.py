"""Backward of the grouped low-rank matmul in at most five Triton launches.

With h = dy Bt^T everything but the wide products stays in rank space:

    bwd_rank      dz = gates * scale * h        zg = gates * scale * z
                  dgates = scale * sum_r h * z
    wgrad         dBt = zg^T dy, dA = dz^T x    one launch each
    expand_add    dx = dz A                     the kernel of the forward
    sum_parts     both weight gradients, where programs shared a sum over the tokens

dx and dA are separate launches because together they need more registers than there
are, and separately they read and write the same wide matrices: x once, dx once. The
order of every sum is fixed, so two runs agree to the bit.

Shape legend
    T tokens   E experts   I in features   O out features   r rank of one expert
    EA, EB: experts that A, Bt hold (1 where all experts share it)
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora.kernels.configs import Config
from molora.kernels.gradients import Gradients, Needs
from molora.kernels.triton_dense_forward import expand, rank_tiles, routing
from molora.kernels.triton_tiles import (
    cdiv,
    configure,
    emit,
    gate_tile,
    get,
    keep,
    launch,
    project,
    rank_columns,
    ready,
    scale_tile,
    tile,
    unit_stride,
)

SUM = Config(BM=1, BN=1024, warps=4, stages=1)
"""How ``sum_parts`` is launched, whatever the shapes."""

ALL = Needs(True, True, True, True)
"""Every gradient."""


@triton.jit(do_not_specialize=["T"])  # type: ignore[untyped-decorator]
def bwd_rank(  # type: ignore[no-untyped-def]
    dy,
    bt,
    gates,
    scales,
    z,
    dz,
    zg,
    dgates,
    T,
    wide,
    stride,
    scale,
    E: tl.constexpr,
    r: tl.constexpr,
    EC: tl.constexpr,
    RP: tl.constexpr,
    NC: tl.constexpr,
    A_SHARED: tl.constexpr,
    B_SHARED: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Gradient in rank space; grid as in ``shrink_gate``, outputs may be None."""
    chunk = tl.program_id(0) * NC
    rows = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    live = rows < T
    DTYPE: tl.constexpr = z.dtype.element_ty
    EZ: tl.constexpr = 1 if A_SHARED else EC
    EH: tl.constexpr = 1 if B_SHARED else EC
    EA: tl.constexpr = 1 if A_SHARED else E
    EB: tl.constexpr = 1 if B_SHARED else E
    if B_SHARED:
        h = project(dy, stride, bt, wide, rows, live, 0, 0, 0.0, DTYPE, EB, r, EH, RP,
                    EVEN, False, BM, BN)  # fmt: skip
    if A_SHARED:
        zt = get(z, rows, live, 0, EA, r, EZ, RP).to(tl.float32)
    dz_total = tl.zeros((BM, RP), dtype=tl.float32)
    zg_total = tl.zeros((BM, RP), dtype=tl.float32)
    for c in range(NC):
        first = (chunk + c) * EC
        if not B_SHARED:
            h = project(dy, stride, bt, wide, rows, live, first, 0, 0.0, DTYPE, EB, r,
                        EH, RP, EVEN, False, BM, BN)  # fmt: skip
        if not A_SHARED:
            zt = get(z, rows, live, first, EA, r, EZ, RP).to(tl.float32)
        h3 = tl.reshape(h, (BM, EH, RP))
        z3 = tl.reshape(zt, (BM, EZ, RP))
        s = scale_tile(scales, scale, first, E, EC)[None, :]
        if dgates is not None:
            expert = first + tl.arange(0, EC)
            at = dgates + rows[:, None] * E + expert[None, :]
            exists = live[:, None] & (expert < E)[None, :]
            tl.store(at, tl.sum(h3 * z3, axis=2) * s, exists)
        weight = (gate_tile(gates, rows, live, first, E, EC) * s)[:, :, None]
        dz_total = emit(dz, h3 * weight, dz_total, rows, live, first, A_SHARED, E, r,
                        EC, RP, BM)  # fmt: skip
        zg_total = emit(zg, z3 * weight, zg_total, rows, live, first, B_SHARED, E, r,
                        EC, RP, BM)  # fmt: skip
    if A_SHARED:
        emit(dz, dz_total, dz_total, rows, live, 0, False, 1, r, 1, RP, BM)
    if B_SHARED:
        emit(zg, zg_total, zg_total, rows, live, 0, False, 1, r, 1, RP, BM)


@triton.jit(do_not_specialize=["T", "seed"])  # type: ignore[untyped-decorator]
def wgrad(  # type: ignore[no-untyped-def]
    wide_in,
    narrow,
    out,
    T,
    wide,
    stride,
    seed,
    p,
    E: tl.constexpr,
    r: tl.constexpr,
    EC: tl.constexpr,
    RP: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    DROP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Out[s] = narrow^T wide_in over every SPLIT-th tile of tokens, from the s-th.

    Grid (chunks of experts, wide / BN, SPLIT).
    """
    place, exists = rank_columns(tl.program_id(0) * EC, E, r, EC, RP)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = tl.full((BN,), 1, tl.int1) if EVEN else columns < wide
    s = tl.program_id(2)
    # the wide side first: its tile is never too small for a matrix instruction
    acc = tl.zeros((BN, EC * RP), dtype=tl.float32)
    for i in range(0, tl.cdiv(T, BM * SPLIT)):
        rows = ((i * SPLIT + s) * BM + tl.arange(0, BM)).to(tl.int64)
        live = rows < T
        at = narrow + rows[:, None] * (E * r) + place[None, :]
        ranks = tl.load(at, live[:, None] & exists[None, :], other=0.0)
        at = wide_in + rows[:, None] * stride + columns[None, :]
        values = tl.load(at, live[:, None] & inside[None, :], other=0.0)
        if DROP:
            values = tl.where(keep(seed, p, rows, columns, wide), values, 0.0)
        acc = tl.dot(
            tl.trans(values.to(ranks.dtype)), ranks, acc, input_precision="ieee"
        )
    if DROP:
        acc = acc / (1.0 - p)
    at = out + s.to(tl.int64) * E * r * wide
    at += place[:, None] * wide + columns[None, :]
    value = tl.trans(acc).to(out.dtype.element_ty)
    tl.store(at, value, exists[:, None] & inside[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def sum_part(parts, out, size, block, SPLIT: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum SPLIT rows of one block of BN elements, in order."""
    at = block.to(tl.int64) * BN + tl.arange(0, BN)
    acc = tl.zeros((BN,), dtype=tl.float32)
    for _ in range(SPLIT):
        acc += tl.load(parts + at, at < size, other=0.0)
        parts += size
    tl.store(out + at, acc.to(out.dtype.element_ty), at < size)


@triton.jit  # type: ignore[untyped-decorator]
def sum_parts(  # type: ignore[no-untyped-def]
    parts,
    out,
    more_parts,
    more_out,
    size,
    more_size,
    SPLIT: tl.constexpr,
    MORE_SPLIT: tl.constexpr,
    BN: tl.constexpr,
):
    """Out = parts.sum(0) for one or two gradients; grid: blocks of BN of each."""
    block = tl.program_id(0)
    if more_out is None:
        sum_part(parts, out, size, block, SPLIT, BN)
    else:
        own = tl.cdiv(size, BN)
        if block < own:
            sum_part(parts, out, size, block, SPLIT, BN)
        else:
            sum_part(more_parts, more_out, more_size, block - own, MORE_SPLIT, BN)


def backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float | Tensor,
    top_k: int | None = None,
    dropout: float = 0.0,
    seed: int = 0,
    needs: Needs = ALL,
    onto: Tensor | None = None,
) -> Gradients:
    """Gradients of ``triton_dense.forward``; that of base is dy itself.

    Args:
        dy: [T, O] gradient of y.
        x: As given to the forward.
        z: As returned by the forward.
        A: As given to the forward.
        Bt: As given to the forward.
        gates: As given to the forward.
        scale: As given to the forward.
        top_k: As given to the forward.
        dropout: As given to the forward.
        seed: As given to the forward.
        needs: Which of the four gradients to compute.
        onto: [T, I] another gradient of x, added to ours in the same pass.

    Returns:
        dx in the dtype of x, dA and dBt in those of the parameters, dgates in float32;
        None where not needed.
    """
    x, dy = unit_stride(x), unit_stride(dy)
    dx, dA, dBt, dgates = (
        value.new_empty(value.shape) if need and value is not None else None
        for value, need in zip((x, A, Bt, gates), needs, strict=True)
    )
    if not len(x):
        dA, dBt = (None if d is None else d.zero_() for d in (dA, dBt))
        return Gradients(dx, dA, dBt, dgates)
    dz = z.new_empty(z.shape) if dx is not None or dA is not None else None
    zg = None if dBt is None else z.new_empty(len(x), Bt.shape[0] * Bt.shape[1])
    if dz is not None or zg is not None or dgates is not None:
        rank_gradients(dy, Bt, A.shape[0], gates, scale, z, dz, zg, dgates)
    products = []
    if dA is not None and dz is not None:
        products.append(Product(x, dz, dA, dropout))
    if dBt is not None and zg is not None:
        products.append(Product(dy, zg, dBt, 0.0))
    if products:
        weight_gradients(products, seed)
    if dx is not None and dz is not None:
        expand(dz, A, None if onto is None else unit_stride(onto), dx, dropout, seed)
    return Gradients(dx, dA, dBt, dgates)


def rank_gradients(
    dy: Tensor,
    Bt: Tensor,
    held: int,
    gates: Tensor | None,
    scale: float | Tensor,
    z: Tensor,
    dz: Tensor | None,
    zg: Tensor | None,
    dgates: Tensor | None,
) -> None:
    """Fill dz, zg and dgates, those that are tensors; A holds ``held`` experts."""
    experts, number, scales = routing(gates, scale)
    shared = held < experts, Bt.shape[0] < experts
    config, cut, inside = rank_tiles("bwd_rank", dy, Bt, experts, any(shared))
    launch(
        bwd_rank,
        (cut.chunks // inside, cdiv(len(dy), config.BM)),
        {
            "dy": dy,
            "bt": ready(Bt, z),
            "gates": None if gates is None else gates.contiguous(),
            "scales": scales,
            "z": z,
            "dz": dz,
            "zg": zg,
            "dgates": dgates,
        },
        config,
        T=len(dy),
        wide=dy.shape[1],
        stride=dy.stride(0),
        scale=number,
        E=experts,
        r=Bt.shape[1],
        EC=cut.EC,
        RP=cut.RP,
        NC=inside,
        A_SHARED=shared[0],
        B_SHARED=shared[1],
        EVEN=dy.shape[1] % config.BN == 0,
        BM=config.BM,
        BN=config.BN,
    )


class Product(NamedTuple):
    """A weight gradient: out = narrow^T wide over the tokens, wide after dropout."""

    wide: Tensor
    narrow: Tensor
    out: Tensor
    dropout: float


def weight_gradients(products: list[Product], seed: int) -> None:
    """Fill the weight gradients: a launch each, and one more if any sum is shared."""
    shared = []
    for product in products:
        experts, r, wide = product.out.shape
        cut = tile(experts, r)
        config = configure("wgrad", product.wide, cut)
        out = product.out
        if config.split > 1:
            out = out.new_empty(config.split, *out.shape, dtype=torch.float32)
            shared.append((out, product.out))
        launch(
            wgrad,
            (cut.chunks, cdiv(wide, config.BN), config.split),
            {"wide_in": product.wide, "narrow": product.narrow, "out": out},
            config,
            T=len(product.wide),
            wide=wide,
            stride=product.wide.stride(0),
            seed=seed,
            p=product.dropout,
            E=experts,
            r=r,
            EC=cut.EC,
            RP=cut.RP,
            SPLIT=config.split,
            EVEN=wide % config.BN == 0,
            DROP=product.dropout > 0,
            BM=config.BM,
            BN=config.BN,
        )
    if shared:
        _sum(*shared)


def _sum(
    first: tuple[Tensor, Tensor],
    more: tuple[Tensor | None, Tensor | None] = (None,) * 2,
) -> None:
    parts, out = first
    more_parts, more_out = more
    more_size = 0 if more_out is None else more_out.numel()
    blocks = cdiv(out.numel(), SUM.BN) + cdiv(more_size, SUM.BN)
    launch(
        sum_parts,
        (blocks,),
        {"parts": parts, "out": out, "more_parts": more_parts, "more_out": more_out},
        SUM,
        size=out.numel(),
        more_size=more_size,
        SPLIT=len(parts),
        MORE_SPLIT=0 if more_parts is None else len(more_parts),
        BN=SUM.BN,
    )
