"""Router logits: one small product that must not be rounded.

Shape legend
    T tokens   E experts   I in features
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from molora.kernels.torch_path import cast


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
        if x_TI.dtype == weight_EI.dtype == torch.float32:
            return F.linear(x_TI, weight_EI)
        return _logits(x_TI, weight_EI)
    logits_TE: Tensor = _Logits.apply(  # type: ignore[no-untyped-call]
        x_TI, weight_EI
    )
    return logits_TE


def _logits(x_TI: Tensor, weight_EI: Tensor) -> Tensor:
    dtype = torch.float64 if x_TI.dtype == torch.float64 else torch.float32
    return F.linear(cast(x_TI, dtype), cast(weight_EI, dtype))


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
