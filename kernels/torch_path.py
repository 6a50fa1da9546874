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

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def torch_mixture(
    x_TI: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates_TE: Tensor | None,
    scale: float | Tensor,
    base_TO: Tensor | None,
) -> Tensor:
    """Concatenated form; arguments and result as in ``lowrank_mixture``."""
    if base_TO is None:
        base_TO = x_TI.new_zeros(x_TI.shape[0], Bt.shape[-1])
    dtype = compute_dtype(x_TI, A)
    if not torch.is_grad_enabled():
        # an autograd function costs more than the products of one token
        return _mix(x_TI, base_TO, A, Bt, gates_TE, scale, dtype)[0]
    y_TO: Tensor = _Mixture.apply(  # type: ignore[no-untyped-call]
        x_TI, base_TO, A, Bt, gates_TE, scale, dtype
    )
    return y_TO


def compute_dtype(x_TI: Tensor, A: Tensor) -> torch.dtype:
    """Dtype of the products: that of x, or of the experts where that is cheaper.

    For fewer tokens than ranks, casting x up costs less than casting the experts down;
    and a CPU without half-precision matrix instructions multiplies float32 many times
    faster than bfloat16. Either way the result is at least as exact.
    """
    if x_TI.dtype == A.dtype:
        return x_TI.dtype
    few = x_TI.shape[0] < A.shape[0] * A.shape[1]
    if few or _slow_on_cpu(x_TI.dtype, x_TI.device.type):
        return torch.promote_types(x_TI.dtype, A.dtype)
    return x_TI.dtype


@functools.cache
def _slow_on_cpu(dtype: torch.dtype, device: str) -> bool:
    """Whether this CPU emulates matrix products in dtype."""
    if device != "cpu":
        return False
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return False


def _mix(
    x_TI: Tensor,
    base_TO: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates_TE: Tensor | None,
    scale: float | Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Result and z, which backward needs."""
    z_TR = F.linear(_cast(x_TI, dtype), _cat(A, dtype))
    b_RO = _cat(Bt, dtype)
    if isinstance(scale, float):
        # the product with B applies a common scale for free
        zg_TR, alpha = _gate(z_TR, A, Bt, gates_TE, 1.0), scale
    else:
        zg_TR, alpha = _gate(z_TR, A, Bt, gates_TE, scale), 1.0
    if base_TO.dtype == dtype:
        return torch.addmm(base_TO, zg_TR, b_RO, alpha=alpha), z_TR
    y_TO = torch.add(base_TO, zg_TR @ b_RO, alpha=alpha)
    return y_TO.to(base_TO.dtype), z_TR


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
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.scale, ctx.dtype = scale, dtype
        y_TO, z_TR = _mix(x_TI, base_TO, A, Bt, gates_TE, scale, dtype)
        ctx.save_for_backward(x_TI, z_TR, gates_TE, A, Bt)
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, z_TR, gates_TE, A, Bt = ctx.saved_tensors
        need_x, need_base, need_A, need_Bt, need_gates = ctx.needs_input_grad[:5]
        ea, eb, r = A.shape[0], Bt.shape[0], A.shape[1]
        dA = dBt = dgates_TE = dx_TI = None
        dbase_TO = dy_TO if need_base else None
        dy_TO = dy_TO.to(ctx.dtype)
        if need_Bt:
            zg_TR = _gate(z_TR, A, Bt, gates_TE, ctx.scale)
            dBt = (zg_TR.t() @ dy_TO).to(Bt.dtype).view_as(Bt)
        if not (need_gates or need_A or need_x):
            return None, dbase_TO, None, dBt, None, None, None
        h_TER = (dy_TO @ _cat(Bt, ctx.dtype).t()).view(-1, eb, r)
        if need_gates:
            products = h_TER.to(gates_TE.dtype) * z_TR.view(-1, ea, r)
            dgates_TE = (products.sum(-1) * ctx.scale).expand_as(gates_TE)
        dz_TER = h_TER * _weight(gates_TE, ctx.scale)
        if ea < dz_TER.shape[1]:
            dz_TER = dz_TER.sum(1, keepdim=True)
        dz_TR = dz_TER.to(ctx.dtype).reshape(-1, ea * r)
        if need_A:
            dA = (dz_TR.t() @ x_TI.to(ctx.dtype)).to(A.dtype).view_as(A)
        if need_x:
            dx_TI = (dz_TR @ _cat(A, ctx.dtype)).to(x_TI.dtype)
        return dx_TI, dbase_TO, dA, dBt, dgates_TE, None, None


def _cat(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """View [E, r, wide] as [R, wide] in the dtype of the computation."""
    return _cast(factor.flatten(0, 1), dtype)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Like x.to(dtype); one comparison where nothing is to do, which decoding feels."""
    return x if x.dtype == dtype else x.to(dtype)


def _weight(gates_TE: Tensor | None, scale: float | Tensor) -> Any:
    """Factor of every rank column: gates * scale as [T, E, 1], or just the scale."""
    if gates_TE is None:
        return scale if isinstance(scale, float) else scale.view(1, -1, 1)
    if isinstance(scale, float) and scale == 1.0:
        return gates_TE.unsqueeze(-1)
    return (gates_TE * scale).unsqueeze(-1)


def _gate(
    z_TR: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates_TE: Tensor | None,
    scale: float | Tensor,
) -> Tensor:
    """Multiply by gates and scale in rank space; sum over experts where B is shared."""
    if gates_TE is None and isinstance(scale, float) and scale == 1.0:
        return z_TR
    z_TER = z_TR.view(-1, A.shape[0], A.shape[1])
    zg_TER: Tensor = z_TER * _weight(gates_TE, scale)
    if Bt.shape[0] < zg_TER.shape[1]:
        zg_TER = zg_TER.sum(1, keepdim=True)
    return _cast(zg_TER, z_TR.dtype).reshape(-1, Bt.shape[0] * Bt.shape[1])


def router_logits(x_TI: Tensor, weight_EI: Tensor) -> Tensor:
    """Router logits in float32 (float64 for float64 inputs), x saved as it is.

    Args:
        x_TI: Inputs in any floating dtype.
        weight_EI: Weight of a linear gate.

    Returns:
        [T, E] logits. A plain ``linear`` on ``x.float()`` would keep a float32 copy of
        x alive for backward; this does not.
    """
    if torch.is_autocast_enabled(x_TI.device.type):
        with torch.autocast(x_TI.device.type, enabled=False):
            return router_logits(x_TI, weight_EI)
    if not torch.is_grad_enabled():
        return _logits(x_TI, weight_EI)
    logits_TE: Tensor = _Logits.apply(  # type: ignore[no-untyped-call]
        x_TI, weight_EI
    )
    return logits_TE


def _logits(x_TI: Tensor, weight_EI: Tensor) -> Tensor:
    dtype = torch.float64 if x_TI.dtype == torch.float64 else torch.float32
    return F.linear(_cast(x_TI, dtype), _cast(weight_EI, dtype))


class _Logits(torch.autograd.Function):
    """x W^T, accumulated and returned in at least float32."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_EI: Tensor) -> Tensor:
        ctx.save_for_backward(x_TI, weight_EI)
        return _logits(x_TI, weight_EI)

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
