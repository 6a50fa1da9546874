"""Decoding with many experts: each token reads only the experts it is routed to.

For a handful of tokens the concatenated form reads the factors of all E experts; these
two kernels read those of K experts per token and nothing else:

    gather_shrink    z[t, k] = A_e x[t]              e: the k-th expert of token t
    gather_expand    y[t] = base[t] + sum_k gate[t, e] scale[e] z[t, k] Bt_e

The k-th nonzero gate of a row is found inside the kernels, so nothing is sorted and the
grid depends on shapes only. One token gives a matrix product nothing to share, so both
kernels multiply and add in float32; z is float32 and never rounded.

Forward only: a call that needs a gradient is declined.

Shape legend
    T tokens   E experts   I in features   O out features   r rank of one expert
    K experts per token, at most
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from molora.kernels import triton_dense
from molora.kernels.configs import pick
from molora.kernels.triton_tiles import (
    arch_of,
    cdiv,
    launch,
    power_of_2,
    unit_stride,
)


@triton.jit  # type: ignore[untyped-decorator]
def chosen(gates, token, slot, E: tl.constexpr, EP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Expert and gate of the slot-th nonzero gate; 0 and 0 without one."""
    expert = tl.arange(0, EP)
    gate = tl.load(gates + token * E + expert, expert < E, other=0.0)
    used = gate != 0.0
    here = used & (tl.cumsum(used.to(tl.int32), 0) - 1 == slot)
    return tl.sum(tl.where(here, expert, 0), 0), tl.sum(tl.where(here, gate, 0.0), 0)


@triton.jit(do_not_specialize=["pairs", "seed"])  # type: ignore[untyped-decorator]
def gather_shrink(  # type: ignore[no-untyped-def]
    x,
    a,
    gates,
    z,
    wide,
    stride,
    pairs,
    seed,
    p,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    r: tl.constexpr,
    RP: tl.constexpr,
    SPLIT: tl.constexpr,
    SHARED: tl.constexpr,
    DROP: tl.constexpr,
    BN: tl.constexpr,
):
    """Parts of z; grid (pairs of token and slot, parts of the wide dimension)."""
    pair = tl.program_id(0).to(tl.int64)
    token = pair // K
    expert, gate = chosen(gates, token, pair % K, E, EP)
    expert = 0 if SHARED else expert.to(tl.int64)
    rank = tl.arange(0, RP)
    exists = rank < tl.where(gate != 0.0, r, 0)
    acc = tl.zeros((RP, BN), dtype=tl.float32)
    span = tl.cdiv(wide, BN * SPLIT) * BN
    start = tl.program_id(1) * span
    for at in range(start, tl.minimum(start + span, wide), BN):
        column = at + tl.arange(0, BN)
        inside = column < wide
        values = tl.load(x + token * stride + column, inside, other=0.0).to(tl.float32)
        if DROP:
            values = tl.where(tl.rand(seed, token * wide + column) >= p, values, 0.0)
        place = (expert * r + rank)[:, None] * wide + column[None, :]
        factors = tl.load(a + place, exists[:, None] & inside[None, :], other=0.0)
        acc += factors.to(tl.float32) * values[None, :]
    part = tl.sum(acc, axis=1)
    if DROP:
        part = part / (1.0 - p)
    row = tl.program_id(1).to(tl.int64) * pairs + pair
    tl.store(z + row * r + rank, part, rank < r)


@triton.jit(do_not_specialize=["pairs"])  # type: ignore[untyped-decorator]
def gather_expand(  # type: ignore[no-untyped-def]
    z,
    b,
    gates,
    scales,
    base,
    y,
    wide,
    stride,
    pairs,
    scale,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    r: tl.constexpr,
    RP: tl.constexpr,
    SPLIT: tl.constexpr,
    SHARED: tl.constexpr,
    BN: tl.constexpr,
):
    """Rows of y; grid (tokens, column tiles)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = column < wide
    rank = tl.arange(0, RP)
    part = tl.arange(0, SPLIT)
    acc = tl.zeros((BN,), dtype=tl.float32)
    for slot in range(K):
        expert, gate = chosen(gates, token, slot, E, EP)
        weight = gate * scale if scales is None else gate * tl.load(scales + expert)
        expert = 0 if SHARED else expert.to(tl.int64)
        exists = rank < tl.where(gate != 0.0, r, 0)
        row = (part.to(tl.int64) * pairs + token * K + slot)[:, None] * r
        parts = tl.load(z + row + rank[None, :], exists[None, :], other=0.0)
        narrow = tl.sum(parts, axis=0) * weight
        place = (expert * r + rank)[:, None] * wide + column[None, :]
        factors = tl.load(b + place, exists[:, None] & inside[None, :], other=0.0)
        acc += tl.sum(factors.to(tl.float32) * narrow[:, None], axis=0)
    if base is not None:
        acc += tl.load(base + token * stride + column, inside, other=0.0).to(tl.float32)
    tl.store(y + token * wide + column, acc.to(y.dtype.element_ty), inside)


def why_not(
    x: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float | Tensor,
    base: Tensor | None,
    top_k: int | None,
) -> list[str]:
    """Every reason against these kernels for this call."""
    reasons = triton_dense.why_not(x, A, Bt, gates, scale, base)
    if gates is None:
        reasons.append("one expert: nothing to gather")
    elif top_k is None:
        reasons.append("the number of experts per token is not known (top_k)")
    given = (x, A, Bt, gates, scale, base)
    tensors = [tensor for tensor in given if isinstance(tensor, Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        reasons.append("a gradient is needed: these kernels decode only")
    return reasons


def forward(
    x: Tensor,
    base: Tensor | None,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float | Tensor,
    top_k: int | None,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Routed low-rank update of tokens that read their own experts.

    Args:
        x: [T, I] in bfloat16, float16 or float32, any strides.
        base: [T, O] in one of these, or None for zero.
        A: [EA, r, I], float32 or the dtype of x.
        Bt: [EB, r, O] in the dtype of A.
        gates: [T, E] float32.
        scale: One number, or [E].
        top_k: Most gates of a row that are not zero; further ones are left out.
        dropout: Probability of dropping an element of x, below 1.
        seed: Of the dropout mask, a 63-bit number.

    Returns:
        y: [T, O] in the dtype of base (of x without base).
        z: [parts, T, K, r] float32, whose sum over parts is A_e x.
    """
    assert gates is not None and top_k is not None
    x, base = (
        unit_stride(x),
        None if base is None else unit_stride(base),
    )
    tokens, r = len(x), A.shape[1]
    RP = power_of_2(r)
    common = {
        "pairs": tokens * top_k,
        "E": gates.shape[1],
        "EP": power_of_2(gates.shape[1]),
        "K": top_k,
        "r": r,
        "RP": RP,
    }
    arch, gates = arch_of(x.device), gates.contiguous()
    config = pick("gather_shrink", arch, RP, tokens, x.shape[1], x.element_size())
    z = x.new_empty(config.split, tokens, top_k, r, dtype=torch.float32)
    y = x.new_empty(tokens, Bt.shape[2], dtype=(x if base is None else base).dtype)
    if not tokens:
        return y, z
    launch(
        gather_shrink,
        (tokens * top_k, config.split),
        {"x": x, "a": A.contiguous(), "gates": gates, "z": z},
        config,
        wide=x.shape[1],
        stride=x.stride(0),
        seed=seed,
        p=dropout,
        BN=config.BN,
        SPLIT=config.split,
        SHARED=A.shape[0] == 1,
        DROP=dropout > 0,
        **common,
    )
    split = config.split
    config = pick("gather_expand", arch, RP, tokens, Bt.shape[2], x.element_size())
    per_expert = scale if isinstance(scale, Tensor) else None
    launch(
        gather_expand,
        (tokens, cdiv(Bt.shape[2], config.BN)),
        {
            "z": z,
            "b": Bt.contiguous(),
            "gates": gates,
            "scales": None if per_expert is None else per_expert.float().contiguous(),
            "base": base,
            "y": y,
        },
        config,
        wide=Bt.shape[2],
        stride=0 if base is None else base.stride(0),
        scale=scale if per_expert is None else 1.0,
        BN=config.BN,
        SPLIT=split,
        SHARED=Bt.shape[0] == 1,
        **common,
    )
    return y, z
