"""Grouped low-rank matmul in Triton for a total rank that is too long to concatenate.

The work follows the K experts that a token uses and not E. For each slot (the k-th
expert of a token) the tokens are sorted by expert, so a tile of them has one expert:

    route      order of the tokens for every slot
    forward    z = A x of all slots, then y = base + gated z Bt slot by slot
    backward   dz and dgates of all slots, dx slot by slot, dA and dBt by experts

x is read once per slot; the slots of y are K launches that add their updates in one
buffer of its size, and the last adds base: no atomics, nothing of size [T, K, O], and
the same sum every time. Everything happens on the device, on a grid that depends on
shapes only.

Limitations: traffic grows with K; for K near E the concatenated form is faster. The
gradient of a factor is one program per expert and column tile, which all the tokens of
a much used expert share.

A gate of zero means that the token does not use the expert, and its gradient is zero,
as top-k routing has it.

Shape legend
    T tokens   E experts   I in features   O out features   r rank of one expert
    K experts per token, at most
"""

from typing import NamedTuple

import torch
from torch import Tensor

from molora.kernels import triton_dense
from molora.kernels.configs import Config, pick
from molora.kernels.gradients import Gradients, Needs
from molora.kernels.triton_grouped_kernels import (
    grouped_expand,
    grouped_shrink,
    grouped_wgrad,
)
from molora.kernels.triton_route import Route, block_of, route
from molora.kernels.triton_tiles import (
    arch_of,
    cdiv,
    launch,
    power_of_2,
    ready,
    unit_stride,
)


class Call(NamedTuple):
    """What all launches of a call share."""

    gates: Tensor
    scale: float
    scales: Tensor | None
    route: Route
    top_k: int

    @classmethod
    def of(cls, gates: Tensor, scale: float | Tensor, top_k: int) -> "Call":
        """Arrange the tokens."""
        number, scales = (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
        if scales is not None:
            scales = scales.float().contiguous()
        gates = gates.contiguous()
        return cls(gates, number, scales, route(gates, top_k), top_k)

    def tensors(self, is_gated: bool) -> dict[str, Tensor | None]:
        """Order of the tokens; gates and scales, or None where they do not apply."""
        return {
            "order": self.route.order_P,
            "offsets": self.route.offsets,
            "gates": self.gates if is_gated else None,
            "scales": self.scales if is_gated else None,
        }

    def tiles(self, BM: int) -> int:
        """Tiles that one slot has, at most."""
        tokens, experts = self.gates.shape
        return tokens // BM + min(tokens, experts + 1)


def _config(kernel: str, wide: Tensor, r: int) -> Config:
    # one expert at a time, and a matrix instruction needs 16 columns
    columns, arch = max(16, power_of_2(r)), arch_of(wide.device)
    tokens, features = wide.shape
    return pick(kernel, arch, columns, tokens, features, wide.element_size())


def shrink(
    call: Call,
    wide_in: Tensor,
    factor: Tensor,
    out: Tensor,
    dropout: float = 0.0,
    seed: int = 0,
    z: Tensor | None = None,
    dgates: Tensor | None = None,
) -> None:
    """Fill compact out with the product; with z given, with dz, and dgates."""
    r, experts = factor.shape[1], call.gates.shape[1]
    config = _config("grouped_shrink", wide_in, r)
    tensors: dict[str, Tensor | None]
    tensors = {"wide_in": wide_in, "factor": ready(factor, out), "out": out, "z": z}
    launch(
        grouped_shrink,
        (call.top_k * call.tiles(config.BM),),
        tensors | call.tensors(z is not None) | {"dgates": dgates},
        config,
        blocks=call.route.blocks,
        wide=wide_in.shape[1],
        stride=wide_in.stride(0),
        scale=call.scale,
        seed=seed,
        p=dropout,
        E=experts,
        K=call.top_k,
        GP=power_of_2(call.top_k * (experts + 1)),
        r=r,
        RP=max(16, power_of_2(r)),
        SHARED=factor.shape[0] == 1,
        EVEN=wide_in.shape[1] % config.BN == 0,
        DROP=dropout > 0,
        BM=config.BM,
        BN=config.BN,
    )


def expand(
    call: Call,
    z: Tensor,
    factor: Tensor,
    base: Tensor | None,
    y: Tensor,
    is_gated: bool,
    dropout: float = 0.0,
    seed: int = 0,
) -> None:
    """Fill y with base plus the product of z, gated or not, and the factor."""
    r, experts = factor.shape[1], call.gates.shape[1]
    config = _config("grouped_expand", y, r)
    factor = ready(factor, z)
    # the sum of the updates of all slots but the first
    update = torch.empty_like(y) if call.top_k > 1 else None
    for slot in reversed(range(call.top_k)):
        tensors: dict[str, Tensor | None] = {
            "z": z,
            "factor": factor,
            "base": base if slot == 0 else None,
            "more": None if slot == call.top_k - 1 else update,
            "y": y if slot == 0 else update,
        }
        launch(
            grouped_expand,
            (cdiv(y.shape[1], config.BN), call.tiles(config.BM)),
            tensors | call.tensors(is_gated),
            config,
            blocks=call.route.blocks,
            slot=slot,
            wide=y.shape[1],
            stride=0 if base is None else base.stride(0),
            scale=call.scale,
            seed=seed,
            p=dropout,
            E=experts,
            K=call.top_k,
            GP=power_of_2(experts + 1),
            r=r,
            RP=max(16, power_of_2(r)),
            SHARED=factor.shape[0] == 1,
            EVEN=y.shape[1] % config.BN == 0,
            DROP=dropout > 0,
            BM=config.BM,
            BN=config.BN,
        )


def wgrad(
    call: Call,
    z: Tensor,
    wide_in: Tensor,
    factor: Tensor,
    is_gated: bool,
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Gradient of a factor from compact z and a wide matrix."""
    shared, experts = factor.shape[0] == 1, call.gates.shape[1]
    shape = experts, *factor.shape[1:]
    out = z.new_empty(shape, dtype=torch.float32 if shared else factor.dtype)
    config = _config("grouped_wgrad", wide_in, factor.shape[1])
    tensors: dict[str, Tensor | None] = {"z": z, "wide_in": wide_in, "out": out}
    launch(
        grouped_wgrad,
        (cdiv(wide_in.shape[1], config.BN), experts),
        tensors | call.tensors(is_gated),
        config,
        blocks=call.route.blocks,
        wide=wide_in.shape[1],
        stride=wide_in.stride(0),
        scale=call.scale,
        seed=seed,
        p=dropout,
        E=experts,
        K=call.top_k,
        r=factor.shape[1],
        RP=max(16, power_of_2(factor.shape[1])),
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
    elif gates is not None and top_k is not None:
        blocks = cdiv(len(x), block_of(len(x), gates.shape[1]))
        if top_k * (gates.shape[1] + 1) * blocks >= 2**31:
            reasons.append("2**31 places or more to sort tokens into")
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
        call = Call.of(gates, scale, top_k)
        shrink(call, x, A, z, dropout, seed)
        expand(call, z, Bt, base, y, is_gated=True)
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
    onto: Tensor | None = None,
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
        onto: [T, I] another gradient of x, added to ours in the same pass.

    Returns:
        dx in the dtype of x, dA and dBt in that of the factors, dgates float32.
    """
    assert gates is not None and top_k is not None
    if not len(x):
        return _empty(x, A, Bt, gates, needs)
    dx = dA = dBt = dgates = None
    x, dy = unit_stride(x), unit_stride(dy)
    call = Call.of(gates, scale, top_k)
    if needs.Bt:
        dBt = wgrad(call, z, dy, Bt, is_gated=True)
    if needs.x or needs.A or needs.gates:
        dz = torch.empty_like(z)
        dgates = torch.zeros_like(call.gates) if needs.gates else None
        shrink(call, dy, Bt, dz, z=z, dgates=dgates)
        if needs.x:
            dx = x.new_empty(x.shape)
            expand(call, dz, A, _unit_stride(onto), dx, False, dropout, seed)
        if needs.A:
            dA = wgrad(call, dz, x, A, False, dropout, seed)
    return Gradients(dx, dA, dBt, dgates)


def _empty(x: Tensor, A: Tensor, Bt: Tensor, gates: Tensor, needs: Needs) -> Gradients:
    """Gradients of a call without tokens."""
    wanted = zip((x, A, Bt, gates), needs, strict=True)
    return Gradients(*(torch.zeros_like(t) if want else None for t, want in wanted))
