"""Grouped low-rank matmul in plain torch: CPU path, fallback, and yardstick.

The experts are concatenated along the rank, so x is read once however many there are:

    z  = x A_cat^T                      [T, R]
    zg = gates * scale * z              in rank space, float32
    y  = base + zg Bt_cat               [T, O]

and backward, with h = dy Bt_cat^T, stays in rank space as well:

    dgates = scale * sum_r h * z        dz = gates * scale * h
    dBt = zg^T dy      dA = dz^T x      dx = dz A_cat

Saved for backward: x (which the caller shares with other consumers), z, the gates and
the parameters themselves, never their low-precision copies nor a dropout mask.

Shape legend
    T tokens   E experts   I in features   O out features
    r rank of one expert   R = E * r, or r where A or B is shared by all experts
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from molora.kernels.gradients import Gradients, Needs


def why_not(
    x: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float | Tensor,
    base: Tensor | None,
    top_k: int | None,
) -> list[str]:
    """No reason: this form computes every call."""
    return []


def forward(
    x_TI: Tensor,
    base_TO: Tensor | None,
    A: Tensor,
    Bt: Tensor,
    gates_TE: Tensor | None,
    scale: float | Tensor,
    top_k: int | None,
    dropout: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Result and z; arguments as in ``lowrank_mixture``."""
    if base_TO is None:
        base_TO = x_TI.new_zeros(x_TI.shape[0], Bt.shape[-1])
    dtype = dtype_of(x_TI, A)
    x_TI = cast(x_TI, dtype)
    if dropout:
        x_TI = x_TI * keep_mask(x_TI, dropout, seed)
    a_RI, b_RO = cat(A, dtype), cat(Bt, dtype)
    z_TR = F.linear(x_TI, a_RI)
    if isinstance(scale, float):
        # the product with B applies a common scale for free
        zg_TR, alpha = _gate(z_TR, A, Bt, gates_TE, 1.0), scale
    else:
        zg_TR, alpha = _gate(z_TR, A, Bt, gates_TE, scale), 1.0
    if base_TO.dtype == dtype:
        return torch.addmm(base_TO, zg_TR, b_RO, alpha=alpha), z_TR
    y_TO = torch.add(base_TO, zg_TR @ b_RO, alpha=alpha)
    return y_TO.to(base_TO.dtype), z_TR


def backward(
    dy_TO: Tensor,
    x_TI: Tensor,
    z_TR: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates_TE: Tensor | None,
    scale: float | Tensor,
    top_k: int | None,
    dropout: float,
    seed: int,
    needs: Needs,
    onto: Tensor | None = None,
) -> Gradients:
    """Gradients of x, A, Bt and the gates, those that are needed."""
    dtype = z_TR.dtype
    ea, eb, r = A.shape[0], Bt.shape[0], A.shape[1]
    dx_TI = dA = dBt = dgates_TE = None
    dy_TO = dy_TO.to(dtype)
    if needs.Bt:
        zg_TR = _gate(z_TR, A, Bt, gates_TE, scale)
        dBt = (zg_TR.t() @ dy_TO).to(Bt.dtype).view_as(Bt)
    if not (needs.gates or needs.A or needs.x):
        return Gradients(None, None, dBt, None)
    h_TER = (dy_TO @ cat(Bt, dtype).t()).view(-1, eb, r)
    if needs.gates:
        assert gates_TE is not None
        products = h_TER.to(gates_TE.dtype) * z_TR.view(-1, ea, r)
        dgates_TE = (products.sum(-1) * scale).expand_as(gates_TE)
    dz_TER = h_TER * _weight(gates_TE, scale)
    if ea < dz_TER.shape[1]:
        dz_TER = dz_TER.sum(1, keepdim=True)
    dz_TR = dz_TER.to(dtype).reshape(-1, ea * r)
    keep_TI = keep_mask(cast(x_TI, dtype), dropout, seed) if dropout else None
    if needs.A:
        kept_TI = cast(x_TI, dtype) if keep_TI is None else cast(x_TI, dtype) * keep_TI
        dA = (dz_TR.t() @ kept_TI).to(A.dtype).view_as(A)
    if needs.x:
        a_RI = cat(A, dtype)
        if onto is not None and onto.dtype == dtype and keep_TI is None:
            dx_TI = torch.addmm(onto, dz_TR, a_RI)
        else:
            dx_TI = dz_TR @ a_RI
            dx_TI = dx_TI if keep_TI is None else dx_TI.mul_(keep_TI)
            dx_TI = added(dx_TI, onto).to(x_TI.dtype)
    return Gradients(dx_TI, dA, dBt, dgates_TE)


def compute_dtype(
    tokens: int, dtype: torch.dtype, device: str, ranks: int, expert_dtype: torch.dtype
) -> torch.dtype:
    """Dtype of the products: that of x, or of the experts where that is cheaper.

    For fewer tokens than ranks, casting x up costs less than casting the experts down;
    and a CPU without half-precision matrix instructions multiplies float32 many times
    faster than bfloat16. Either way the result is at least as exact.
    """
    if dtype == expert_dtype:
        return dtype
    if tokens < ranks or slow_on_cpu(dtype, device):
        return torch.promote_types(dtype, expert_dtype)
    return dtype


def dtype_of(x_TI: Tensor, A: Tensor) -> torch.dtype:
    """Dtype of the products of a call, see ``compute_dtype``."""
    if x_TI.dtype == A.dtype:
        return x_TI.dtype
    ranks = A.shape[0] * A.shape[1]
    return compute_dtype(x_TI.shape[0], x_TI.dtype, x_TI.device.type, ranks, A.dtype)


@functools.cache
def slow_on_cpu(dtype: torch.dtype, device: str) -> bool:
    """Whether this CPU emulates matrix products in dtype."""
    if device != "cpu":
        return False
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return False


def keep_mask(x_TI: Tensor, dropout: float, seed: int) -> Tensor:
    """Factor of every input value, 0 or 1 / (1 - dropout), the same for a seed.

    Drawn again in backward rather than kept: it is as large as x.
    """
    generator = torch.Generator(x_TI.device).manual_seed(seed)
    keep_TI = torch.empty(x_TI.shape, dtype=x_TI.dtype, device=x_TI.device)
    keep_TI.bernoulli_(1 - dropout, generator=generator)
    return keep_TI.div_(1 - dropout)


def added(dx_TI: Tensor, onto: Tensor | None) -> Tensor:
    """Sum of a gradient of the update, which is ours to change, and another one."""
    return dx_TI if onto is None else dx_TI.add_(onto)


def cat(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """View [E, r, wide] as [R, wide] in the dtype of the computation."""
    # for decoding: half the time of flatten
    flat = factor.reshape(-1, factor.shape[-1])
    return flat if flat.dtype == dtype else flat.to(dtype)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
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
    z_TER = z_TR.view(-1, *A.shape[:2])
    zg_TER: Tensor = z_TER * _weight(gates_TE, scale)
    if Bt.shape[0] < zg_TER.shape[1]:
        zg_TER = zg_TER.sum(1, keepdim=True)
    return cast(zg_TER, z_TR.dtype).reshape(-1, Bt.shape[0] * Bt.shape[1])
