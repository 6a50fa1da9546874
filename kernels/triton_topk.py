"""Top-k routing on a GPU in one kernel, and its backward in two.

    l = x W^T / temperature    g_e = exp(l_e) / sum_j exp(l_j) for the K largest l_e

with j over these K (renormalised) or over all experts. What PyTorch does in a dozen
launches, each of which takes the host longer than the device, is one here: product,
choice and gates; and x is read once, as it is, where PyTorch makes a float32 copy. All
arithmetic is in float32. Of equal logits the expert with the lowest number comes first.

A logit that is not finite clears a flag on the device, which the caller has asserted.

Shape legend
    T tokens   E experts   I in features   K experts per token   BM rows of a tile
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from molora.kernels.configs import Config
from molora.kernels.triton_tiles import cdiv, launch, power_of_2, unit_stride

MAX_EXPERTS = 128
"""Experts whose logits one program holds for a tile of tokens."""

ONE = Config(BM=1, BN=512, warps=4, stages=2)
"""How a single token is routed among up to 16 experts."""

TILES: dict[str, dict[int, Config]] = {
    "topk_gates": {
        16: Config(BM=16, BN=128, warps=4, stages=2),
        32: Config(BM=16, BN=128, warps=4, stages=2),
        64: Config(BM=16, BN=64, warps=4, stages=2),
        128: Config(BM=16, BN=32, warps=8, stages=2),
    },
    "topk_dx": {
        16: Config(BM=32, BN=64, warps=4, stages=1),
        32: Config(BM=32, BN=64, warps=4, stages=1),
        64: Config(BM=16, BN=64, warps=4, stages=1),
        128: Config(BM=16, BN=32, warps=8, stages=1),
    },
    "topk_dw": {
        16: Config(BM=32, BN=64, warps=4, stages=2),
        32: Config(BM=32, BN=64, warps=4, stages=2),
        64: Config(BM=16, BN=64, warps=4, stages=2),
        128: Config(BM=16, BN=32, warps=8, stages=1),
    },
}
"""How each kernel is launched, by the number of experts, padded."""

_PARTS = 8
"""Partial sums over the tokens of the gradient of W, at most."""


@triton.jit(do_not_specialize=["T", "heat"])  # type: ignore[untyped-decorator]
def topk_gates(  # type: ignore[no-untyped-def]
    x,
    w,
    finite,
    logits,
    gates,
    T,
    wide,
    stride,
    heat,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Logits and gates of a tile of tokens; grid (tiles,)."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    live = (rows < T)[:, None]
    expert = tl.arange(0, EP)[None, :]
    exists = expert < E
    step = tl.arange(0, BN)
    acc = tl.zeros((BM, EP), dtype=tl.float32)
    for at in range(0, wide, BN):
        column = at + step
        inside = column < wide
        values = tl.load(
            x + rows[:, None] * stride + column[None, :],
            live & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        weight = tl.load(
            w + tl.arange(0, EP)[:, None] * wide + column[None, :],
            (tl.arange(0, EP) < E)[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        if BM == 1:
            acc += tl.sum(weight * values, 1)[None, :]
        else:
            acc = tl.dot(values, tl.trans(weight), acc, input_precision="ieee")
    score = acc / heat
    # infinity and NaN less themselves are NaN
    odd = (score - score != 0.0) & live & exists
    tl.store(finite, 0, tl.sum(tl.sum(odd.to(tl.int32), 1), 0) > 0)
    left = tl.where(exists, score, float("-inf"))
    top = tl.max(left, 1)[:, None]
    kept = tl.zeros((BM, EP), dtype=tl.int1)
    for _ in range(K):
        best = tl.max(left, 1)[:, None]
        first = tl.min(tl.where(left == best, expert, EP), 1)[:, None]
        kept = kept | (expert == first)
        left = tl.where(expert == first, float("-inf"), left)
    power = tl.where(exists, tl.exp(score - top), 0.0)
    chosen = tl.where(kept, power, 0.0)
    total = tl.sum(chosen if RENORMALIZE else power, 1)[:, None]
    place = rows[:, None] * E + expert
    tl.store(logits + place, score, live & exists)
    tl.store(gates + place, chosen / total, live & exists)


@triton.jit  # type: ignore[untyped-decorator]
def slope(  # type: ignore[no-untyped-def]
    logits,
    gates,
    dlogits,
    dgates,
    rows,
    T,
    heat,
    E: tl.constexpr,
    EP: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    """Gradient of x W^T of a tile of tokens, [BM, EP]."""
    expert = tl.arange(0, EP)[None, :]
    there = (rows < T)[:, None] & (expert < E)
    place = rows[:, None] * E + expert
    total = tl.zeros(place.shape, dtype=tl.float32)
    if dgates is not None:
        gate = tl.load(gates + place, there, other=0.0)
        # nothing is said of the gradient of a gate that is zero
        change = tl.load(dgates + place, there & (gate != 0.0), other=0.0)
        mean = tl.sum(gate * change, 1)[:, None]
        if RENORMALIZE:
            total = gate * (change - mean)
        else:
            score = tl.load(logits + place, there, other=float("-inf"))
            top = tl.maximum(tl.max(score, 1), -3e38)[:, None]
            power = tl.exp(score - top)
            # at least 1, that of the largest, but for rows beyond the last
            share = power / tl.maximum(tl.sum(power, 1), 1.0)[:, None]
            total = share * (change - mean)
    if dlogits is not None:
        total += tl.load(dlogits + place, there, other=0.0)
    return total / heat


@triton.jit(do_not_specialize=["T", "heat"])  # type: ignore[untyped-decorator]
def topk_dx(  # type: ignore[no-untyped-def]
    w,
    logits,
    gates,
    dlogits,
    dgates,
    dx,
    T,
    wide,
    heat,
    E: tl.constexpr,
    EP: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Gradient of x; grid (column tiles, tiles of tokens)."""
    rows = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    expert = tl.arange(0, EP)
    down = slope(logits, gates, dlogits, dgates, rows, T, heat, E, EP, RENORMALIZE)
    weight = tl.load(
        w + expert[:, None] * wide + column[None, :],
        (expert < E)[:, None] & (column < wide)[None, :],
        other=0.0,
    ).to(tl.float32)
    value = tl.dot(down, weight, input_precision="ieee")
    tl.store(
        dx + rows[:, None] * wide + column[None, :],
        value.to(dx.dtype.element_ty),
        (rows < T)[:, None] & (column < wide)[None, :],
    )


@triton.jit(do_not_specialize=["T", "heat"])  # type: ignore[untyped-decorator]
def topk_dw(  # type: ignore[no-untyped-def]
    x,
    logits,
    gates,
    dlogits,
    dgates,
    dw,
    T,
    wide,
    stride,
    heat,
    E: tl.constexpr,
    EP: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Parts of the gradient of W; grid (column tiles, parts of the tokens)."""
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = (column < wide)[None, :]
    part, parts = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    acc = tl.zeros((EP, BN), dtype=tl.float32)
    for tile in range(part, tl.cdiv(T, BM), parts):
        rows = tile * BM + tl.arange(0, BM)
        down = slope(logits, gates, dlogits, dgates, rows, T, heat, E, EP, RENORMALIZE)
        values = tl.load(
            x + rows[:, None] * stride + column[None, :],
            (rows < T)[:, None] & inside,
            other=0.0,
        ).to(tl.float32)
        acc = tl.dot(tl.trans(down), values, acc, input_precision="ieee")
    expert = tl.arange(0, EP)[:, None]
    tl.store(
        dw + (part * E + expert) * wide + column[None, :], acc, inside & (expert < E)
    )


def gates_of(
    x: Tensor,
    weight: Tensor,
    finite: Tensor,
    top_k: int,
    temperature: float,
    renormalize: bool,
) -> tuple[Tensor, Tensor]:
    """Logits and gates, [T, E] float32; see the module.

    Args:
        x: [T, I] in 16 or 32 bits, any strides.
        weight: [E, I], contiguous.
        finite: One byte, set to 0 where a logit is not finite.
        top_k: Experts per token, at most E.
        temperature: Divides the logits.
        renormalize: Divide the gates by the sum of those that are kept.
    """
    x, tokens, experts = unit_stride(x), len(x), len(weight)
    logits = x.new_empty(tokens, experts, dtype=torch.float32)
    gates = torch.empty_like(logits)
    if not tokens:
        return logits, gates
    EP = _padded(experts)
    config = ONE if tokens == 1 and EP == 16 else TILES["topk_gates"][EP]
    launch(
        topk_gates,
        (cdiv(tokens, config.BM),),
        {"x": x, "w": weight, "finite": finite, "logits": logits, "gates": gates},
        config,
        T=tokens,
        wide=x.shape[1],
        stride=x.stride(0),
        heat=temperature,
        E=experts,
        EP=EP,
        K=top_k,
        RENORMALIZE=renormalize,
        BM=config.BM,
        BN=config.BN,
    )
    return logits, gates


def backward(
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    gates: Tensor,
    dlogits: Tensor | None,
    dgates: Tensor | None,
    temperature: float,
    renormalize: bool,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of W, from those of the logits and of the gates."""
    tokens, wide = x.shape
    dx = x.new_empty(tokens, wide) if need_x else None
    given = {"logits": logits, "gates": gates, "dlogits": dlogits, "dgates": dgates}
    experts = len(weight)
    EP = _padded(experts)
    config = TILES["topk_dx"][EP]
    common: dict[str, Any] = {
        "T": tokens,
        "wide": wide,
        "heat": temperature,
        "E": experts,
        "EP": EP,
        "RENORMALIZE": renormalize,
    }
    if dx is not None and tokens:
        launch(
            topk_dx,
            (cdiv(wide, config.BN), cdiv(tokens, config.BM)),
            {"w": weight, **given, "dx": dx},
            config,
            **common,
            BM=config.BM,
            BN=config.BN,
        )
    if not need_weight:
        return dx, None
    config = TILES["topk_dw"][EP]
    parts = max(1, min(_PARTS, cdiv(tokens, 4 * config.BM)))
    dw = x.new_empty(parts, experts, wide, dtype=torch.float32)
    launch(
        topk_dw,
        (cdiv(wide, config.BN), parts),
        {"x": x, **given, "dw": dw},
        config,
        stride=x.stride(0),
        **common,
        BM=config.BM,
        BN=config.BN,
    )
    return dx, (dw[0] if parts == 1 else dw.sum(0)).to(weight.dtype)


def _padded(experts: int) -> int:
    """Columns of a tile: a matrix product has at least 16."""
    return max(16, power_of_2(experts))


class TopK(torch.autograd.Function):
    """Autograd around the kernels; saves x, W, logits and gates."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        x = unit_stride(x)
        logits, gates = gates_of(x, weight, *rest)
        ctx.save_for_backward(x, weight, logits, gates)
        ctx.rest = rest[2:]
        ctx.set_materialize_grads(False)
        return logits, gates

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dlogits: Tensor | None, dgates: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if dlogits is None and dgates is None:
            return (None,) * 6
        # read as they lie in memory
        dlogits = None if dlogits is None else dlogits.contiguous()
        dgates = None if dgates is None else dgates.contiguous()
        x, weight, logits, gates = ctx.saved_tensors
        given = (x, weight, logits, gates, dlogits, dgates)
        dx, dw = backward(
            *given,
            temperature=ctx.rest[0],
            renormalize=ctx.rest[1],
            need_x=ctx.needs_input_grad[0],
            need_weight=ctx.needs_input_grad[1],
        )
        return dx, dw, *[None] * 4
