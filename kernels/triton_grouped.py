"""Grouped low-rank matmul in Triton for a total rank that is too long to concatenate.

The work follows the experts that tiles of tokens use and not E:

    route      order of the tokens, experts of each tile, pairs by expert
    forward    z = A x by tiles, then y = base + gated z Bt by tiles
    backward   dz and dgates by tiles, dx by tiles, dA and dBt by experts

x and y are touched once each, as in the concatenated form; only the gradients of the
factors read a row once per expert that uses it. Everything happens on the device, on a
grid that depends on shapes only; no atomics, so results are the same every time.

Limitations: with routing at random a tile of 64 of 8192 tokens uses 17 of 64 experts
for K = 2, 43 for K = 4 and 54 for K = 8, because tokens can be ordered by two of their
experts and not by all. For large K and r, multiplications outweigh what x and y save.

A gate of zero means that the token does not use the expert, and its gradient is zero,
as top-k routing has it.

Shape legend
    T tokens   E experts   I in features   O out features   r rank of one expert
    K experts per token, at most   L experts per tile, at most
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from molora.kernels import triton_dense
from molora.kernels.configs import Config, pick
from molora.kernels.gradients import Gradients, Needs
from molora.kernels.triton_grouped_kernels import (
    grouped_expand,
    grouped_shrink,
    grouped_wgrad,
)
from molora.kernels.triton_route import Route, route
from molora.kernels.triton_tiles import arch_of, launch, unit_stride

CHUNK = 128
"""Rank columns of one chunk of experts, unless one expert alone has more."""


class _Call(NamedTuple):
    """What all launches of a call share."""

    gates: Tensor
    scale: float
    scales: Tensor | None
    route: Route
    sizes: dict[str, int]
    """Compile-time sizes of rank space."""
    BM: int
    """Tokens in a tile."""

    @classmethod
    def of(
        cls, x: Tensor, A: Tensor, gates: Tensor, scale: float | Tensor, top_k: int
    ) -> "_Call":
        r, experts = A.shape[1], gates.shape[1]
        RP = triton.next_power_of_2(r)
        held = min(triton.next_power_of_2(experts), max(1, CHUNK // RP))
        # a matrix instruction needs 16 columns
        RP = max(RP, 16 // held)
        BM = _config("grouped_shrink", x, held * RP).BM
        sizes = {"E": experts, "K": top_k, "L": min(experts, BM * top_k)}
        sizes |= {"r": r, "EC": held, "RP": RP}
        number, scales = (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
        if scales is not None:
            scales = scales.float().contiguous()
        arranged = route(gates, top_k, BM)
        return cls(gates.contiguous(), number, scales, arranged, sizes, BM)

    @property
    def by_tiles(self) -> dict[str, Tensor | None]:
        """Tensors that a kernel reads to find the experts of a tile."""
        return {
            "order": self.route.order_T,
            "lists": self.route.lists_NL,
            "counts": self.route.counts_N,
            "slots": self.route.slots_TE,
        }

    def weights(self, wanted: bool) -> dict[str, Tensor | None]:
        """Gates and scales, or None where a kernel does not apply them."""
        if not wanted:
            return {"gates": None, "scales": None}
        return {"gates": self.gates, "scales": self.scales}


def _config(kernel: str, wide: Tensor, rank: int) -> Config:
    arch = arch_of(wide.device)
    return pick(kernel, arch, rank, len(wide), wide.shape[1], wide.element_size())


def _shrink(
    call: _Call,
    wide_in: Tensor,
    factor: Tensor,
    out: Tensor,
    dropout: float = 0.0,
    seed: int = 0,
    z: Tensor | None = None,
    dgates: Tensor | None = None,
) -> None:
    """Fill compact out with the product; with z given, with dz, and dgates."""
    sizes = call.sizes
    config = _config("grouped_shrink", wide_in, sizes["EC"] * sizes["RP"])
    tensors: dict[str, Tensor | None]
    tensors = {"wide_in": wide_in, "factor": factor.contiguous(), "out": out}
    tensors |= call.by_tiles | call.weights(z is not None)
    launch(
        grouped_shrink,
        (triton.cdiv(sizes["L"], sizes["EC"]), triton.cdiv(len(wide_in), call.BM)),
        tensors | {"z": z, "dgates": dgates},
        config,
        T=len(wide_in),
        wide=wide_in.shape[1],
        stride=wide_in.stride(0),
        scale=call.scale,
        seed=seed,
        p=dropout,
        SHARED=factor.shape[0] == 1,
        EVEN=wide_in.shape[1] % config.BN == 0,
        DROP=dropout > 0,
        BM=call.BM,
        BN=config.BN,
        **sizes,
    )


def _expand(
    call: _Call,
    z: Tensor,
    factor: Tensor,
    base: Tensor | None,
    y: Tensor,
    is_gated: bool,
    dropout: float = 0.0,
    seed: int = 0,
) -> None:
    """Fill y with base plus the product of z, gated or not, and the factor."""
    sizes = call.sizes
    config = _config("grouped_expand", y, sizes["EC"] * sizes["RP"])
    tensors = {"z": z, "factor": factor.contiguous(), "base": base, "y": y}
    launch(
        grouped_expand,
        (triton.cdiv(y.shape[1], config.BN), triton.cdiv(len(y), call.BM)),
        tensors | call.by_tiles | call.weights(is_gated),
        config,
        T=len(y),
        wide=y.shape[1],
        stride=0 if base is None else base.stride(0),
        scale=call.scale,
        seed=seed,
        p=dropout,
        SHARED=factor.shape[0] == 1,
        EVEN=y.shape[1] % config.BN == 0,
        DROP=dropout > 0,
        BM=call.BM,
        BN=config.BN,
        **sizes,
    )


def _wgrad(
    call: _Call,
    z: Tensor,
    wide_in: Tensor,
    factor: Tensor,
    is_gated: bool,
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Gradient of a factor from compact z and a wide matrix."""
    shared = factor.shape[0] == 1
    shape = call.sizes["E"], *factor.shape[1:]
    out = z.new_empty(shape, dtype=torch.float32 if shared else factor.dtype)
    # one expert at a time, and a matrix instruction needs 16 columns
    columns = max(16, triton.next_power_of_2(factor.shape[1]))
    config = _config("grouped_wgrad", wide_in, columns)
    tensors: dict[str, Tensor | None] = {"z": z, "wide_in": wide_in, "out": out}
    tensors |= {"pairs": call.route.pairs_P, "starts": call.route.starts_E}
    launch(
        grouped_wgrad,
        (triton.cdiv(wide_in.shape[1], config.BN), shape[0]),
        tensors | call.weights(is_gated),
        config,
        wide=wide_in.shape[1],
        stride=wide_in.stride(0),
        scale=call.scale,
        seed=seed,
        p=dropout,
        E=shape[0],
        K=call.sizes["K"],
        r=shape[1],
        RP=columns,
        EVEN=wide_in.shape[1] % config.BN == 0,
        DROP=dropout > 0,
        BM=config.BM,
        BN=config.BN,
    )
    return out.sum(0, keepdim=True).to(factor.dtype) if shared else out


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
        reasons.append("one expert: nothing to group")
    elif top_k is None:
        reasons.append("the number of experts per token is not known (top_k)")
    if gates is not None and A.shape[0] == Bt.shape[0] == 1 < gates.shape[1]:
        reasons.append("A and Bt are both shared by all experts: one product for all")
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
    """Routed low-rank update and the compact rank vector that its backward needs.

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
        z: [T, K, r] A_e x in the dtype of x for the experts of each token in ascending
            order; not written where a token has fewer experts.
    """
    assert gates is not None and top_k is not None
    x, base = unit_stride(x), _unit_stride(base)
    y = x.new_empty(len(x), Bt.shape[2], dtype=(x if base is None else base).dtype)
    z = x.new_empty(len(x), top_k, A.shape[1])
    if len(x):
        call = _Call.of(x, A, gates, scale, top_k)
        _shrink(call, x, A, z, dropout, seed)
        _expand(call, z, Bt, base, y, is_gated=True)
    return y, z


def _unit_stride(base: Tensor | None) -> Tensor | None:
    return None if base is None else unit_stride(base)


def backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float | Tensor,
    top_k: int | None,
    dropout: float,
    seed: int,
    needs: Needs,
) -> Gradients:
    """Gradients of ``forward``; that of base is dy itself.

    Args:
        dy: [T, O] gradient of y.
        x: As in forward.
        z: From forward.
        A: As in forward.
        Bt: As in forward.
        gates: As in forward.
        scale: As in forward.
        top_k: As in forward.
        dropout: As in forward.
        seed: As in forward.
        needs: Gradients that are wanted.

    Returns:
        dx in the dtype of x, dA and dBt in that of the factors, dgates float32.
    """
    assert gates is not None and top_k is not None
    if not len(x):
        return _empty(x, A, Bt, gates, needs)
    dx = dA = dBt = dgates = None
    x, dy = unit_stride(x), unit_stride(dy)
    call = _Call.of(x, A, gates, scale, top_k)
    if needs.Bt:
        dBt = _wgrad(call, z, dy, Bt, is_gated=True)
    if needs.x or needs.A or needs.gates:
        dz = torch.empty_like(z)
        dgates = torch.zeros_like(call.gates) if needs.gates else None
        _shrink(call, dy, Bt, dz, z=z, dgates=dgates)
        if needs.x:
            dx = x.new_empty(x.shape)
            _expand(call, dz, A, None, dx, False, dropout, seed)
        if needs.A:
            dA = _wgrad(call, dz, x, A, False, dropout, seed)
    return Gradients(dx, dA, dBt, dgates)


def _empty(x: Tensor, A: Tensor, Bt: Tensor, gates: Tensor, needs: Needs) -> Gradients:
    """Gradients of a call without tokens."""
    wanted = zip((x, A, Bt, gates), needs, strict=True)
    return Gradients(*(torch.zeros_like(t) if want else None for t, want in wanted))
