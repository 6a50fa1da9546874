"""Grouped low-rank matmul in plain torch: CPU path, fallback, and yardstick.

The experts are concatenated along the rank, so x is read once however many there are:

    z  = x A_cat^T                      [T, R]
    zg = gates * scale * z              in rank space, float32
    y  = base + zg Bt_cat               [T, O]

and backward, with h = dy Bt_cat^T, stays in rank space as well:

    dgates = scale * sum_r h * z        dz = gates * scale * h
    dBt = zg^T dy      dA = dz^T x      dx = dz A_cat

Saved for backward: x (which the caller shares with other consumers), z, the gates and
the parameters themselves, never their low-precision copies.

Shape legend
    T tokens   E experts   I in features   O out features
    r rank of one expert   R = E * r, or r where A or B is shared by all experts
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def torch_mixture(
    x_TI: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates_TE: Tensor | None,
    scale: float | Tensor,
    base_TO: Tensor | None,
) -> Tensor:
    """Concatenated form; arguments and result as in ``lowrank_mixture``."""
    out_dtype = x_TI.dtype if base_TO is None else base_TO.dtype
    if A.dtype != x_TI.dtype and x_TI.shape[0] < A.shape[0] * A.shape[1]:
        # few tokens: casting them up costs less than casting the experts down
        x_TI = x_TI.to(A.dtype)
    if base_TO is None:
        base_TO = x_TI.new_zeros(x_TI.shape[0], Bt.shape[-1])
    y_TO: Tensor = _Mixture.apply(
        x_TI, base_TO.to(x_TI.dtype), A, Bt, gates_TE, scale
    )  # type: ignore[no-untyped-call]
    return y_TO.to(out_dtype)


class _Mixture(torch.autograd.Function):
    """The concatenated form with a hand-written backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        base_TO: Tensor,
        A: Tensor,
        Bt: Tensor,
        gates_TE: Tensor | None,
        scale: float | Tensor,
    ) -> Tensor:
        a_RI, b_RO = _cat(A, x_TI.dtype), _cat(Bt, x_TI.dtype)
        z_TR = x_TI @ a_RI.t()
        ctx.scale = scale
        if gates_TE is None and isinstance(scale, float):
            ctx.save_for_backward(x_TI, z_TR, None, A, Bt)
            return torch.addmm(base_TO, z_TR, b_RO, alpha=scale)
        ctx.save_for_backward(x_TI, z_TR, gates_TE, A, Bt)
        zg_TR = _gate(z_TR, A, Bt, gates_TE, scale)
        return torch.addmm(base_TO, zg_TR, b_RO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, z_TR, gates_TE, A, Bt = ctx.saved_tensors
        need_x, need_base, need_A, need_Bt, need_gates, _ = ctx.needs_input_grad
        a_RI, b_RO = _cat(A, x_TI.dtype), _cat(Bt, x_TI.dtype)
        ea, eb, r = A.shape[0], Bt.shape[0], A.shape[1]
        dA = dBt = dgates_TE = dx_TI = None
        if need_Bt:
            zg_TR = _gate(z_TR, A, Bt, gates_TE, ctx.scale)
            dBt = (zg_TR.t() @ dy_TO).to(Bt.dtype).view_as(Bt)
        h_TER = (dy_TO @ b_RO.t()).view(-1, eb, r)
        if need_gates:
            products = h_TER.to(gates_TE.dtype) * z_TR.view(-1, ea, r)
            dgates_TE = products.sum(-1) * ctx.scale
        if need_A or need_x:
            dz_TER = h_TER * _weight(gates_TE, ctx.scale)
            if ea < dz_TER.shape[1]:
                dz_TER = dz_TER.sum(1, keepdim=True)
            dz_TR = dz_TER.to(x_TI.dtype).view(-1, ea * r)
            dA = (dz_TR.t() @ x_TI).to(A.dtype).view_as(A) if need_A else None
            dx_TI = dz_TR @ a_RI if need_x else None
        return dx_TI, dy_TO if need_base else None, dA, dBt, dgates_TE, None


def _cat(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """View [E, r, wide] as [R, wide] in the dtype of the computation."""
    return factor.detach().reshape(-1, factor.shape[-1]).to(dtype)


def _weight(gates_TE: Tensor | None, scale: float | Tensor) -> Any:
    """Factor of every rank column: gates * scale as [T, E, 1], or just the scale."""
    if gates_TE is None:
        return scale if isinstance(scale, float) else scale.view(1, -1, 1)
    return (gates_TE * scale).unsqueeze(-1)


def _gate(
    z_TR: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates_TE: Tensor | None,
    scale: float | Tensor,
) -> Tensor:
    """Multiply by gates and scale in rank space; sum over experts where B is shared."""
    z_TER = z_TR.view(-1, A.shape[0], A.shape[1])
    zg_TER = z_TER * _weight(gates_TE, scale)
    if Bt.shape[0] < zg_TER.shape[1]:
        zg_TER = zg_TER.sum(1, keepdim=True)
    return zg_TER.to(z_TR.dtype).reshape(z_TR.shape[0], -1)


def router_logits(x_TI: Tensor, weight_EI: Tensor) -> Tensor:
    """Router logits in float32 (float64 for float64 inputs), x saved as it is.

    Args:
        x_TI: Inputs in any floating dtype.
        weight_EI: Weight of a linear gate.

    Returns:
        [T, E] logits. A plain ``linear`` on ``x.float()`` would keep a float32 copy of
        x alive for backward; this does not.
    """
    logits: Tensor = _Logits.apply(x_TI, weight_EI)  # type: ignore[no-untyped-call]
    return logits


class _Logits(torch.autograd.Function):
    """x W^T, accumulated and returned in at least float32."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_EI: Tensor) -> Tensor:
        ctx.save_for_backward(x_TI, weight_EI)
        dtype = torch.promote_types(x_TI.dtype, torch.float32)
        return x_TI.to(dtype) @ weight_EI.to(dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_TE: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight_EI = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad
        dx = (d_TE @ weight_EI.to(d_TE.dtype)).to(x_TI.dtype) if need_x else None
        dw = None
        if need_weight:
            dw = (d_TE.t() @ x_TI.to(d_TE.dtype)).to(weight_EI.dtype)
        return dx, dw
