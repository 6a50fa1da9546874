"""What a magnitude per output does to a frozen layer, and row norms by factors.

Shape legend: see base.py; R ranks of all experts together.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from molora.errors import WrapError

_ROWS = 1024
"""Rows of the frozen weight that are in float32 at a time."""


def magnified(
    y: Tensor, bias: Tensor | None, gates: Tensor | None, ratio: Tensor
) -> Tensor:
    """Y + (y - bias) * (gates (ratio - 1)), the base term of experts with magnitudes.

    Args:
        y: [T, O] output of the frozen layer; the only [T, O] kept for backward.
        bias: [O] of the layer, if it has one; not differentiated.
        gates: [T, E]; None means one expert with gate 1.
        ratio: [E, O], magnitude by norm.

    Returns:
        [T, O] in the dtype of y.
    """
    with torch.autocast(y.device.type, enabled=False):
        result: Tensor = _Magnified.apply(y, bias, gates, ratio)  # type: ignore[no-untyped-call]
    return result


def row_norms(weight: Tensor, A: Tensor, Bt: Tensor, scale: float | Tensor) -> Tensor:
    """Norms of the rows of W + s B A of every expert, without forming it.

    Args:
        weight: W, [O, I], any floating dtype.
        A: [E or 1, r, I].
        Bt: [E or 1, r, O].
        scale: s, a number or [E].

    Returns:
        [E or 1, O], at least float32.
    """
    dtype = torch.promote_types(weight.dtype, A.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    A, Bt = A.to(dtype), Bt.to(dtype)
    a_RI = A.reshape(-1, A.shape[-1])
    squares, products = [], []
    for rows_OI in weight.split(_ROWS):
        wide_OI = rows_OI.to(dtype)
        squares.append(torch.linalg.vector_norm(wide_OI, dim=1).square())
        products.append(a_RI @ wide_OI.t())
    product_ErO = torch.cat(products, 1).view(*A.shape[:2], -1)
    crossed_EO = (product_ErO * Bt).sum(1)
    gram_Err = A @ A.transpose(1, 2)
    own_EO = ((gram_Err @ Bt) * Bt).sum(1)
    s = scale if isinstance(scale, float) else scale.to(dtype).unsqueeze(1)
    total_EO = torch.cat(squares) + 2 * s * crossed_EO + s * s * own_EO
    # rounding may leave less than nothing
    return total_EO.clamp(min=0).sqrt()


def require_norms(norms_EO: Tensor, weight: Tensor) -> None:
    """Refuse rows without a direction."""
    if not (norms_EO > 0).all():
        row = int((~(norms_EO > 0)).any(0).nonzero()[0])
        raise WrapError(
            f"experts.kind dora divides by the norm of every row of a frozen "
            f"weight [{weight.shape[0]}, {weight.shape[1]}], and row {row} is zero "
            "or not a number; leave this layer out of target_modules"
        )


class _Magnified(torch.autograd.Function):
    """y + (y - bias) * (gates (ratio - 1)); keeps y, and no [T, O] product."""

    @staticmethod
    def forward(
        ctx: Any,
        y_TO: Tensor,
        bias_O: Tensor | None,
        gates_TE: Tensor | None,
        ratio_EO: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(y_TO, bias_O, gates_TE, ratio_EO)
        change = _change(gates_TE, ratio_EO)
        return torch.addcmul(y_TO, _linear(y_TO, bias_O), change).to(y_TO.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
        y_TO, bias_O, gates_TE, ratio_EO = ctx.saved_tensors
        need_y, _, need_gates, _ = ctx.needs_input_grad
        dbase = dgates_TE = None
        if need_y:
            change = _change(gates_TE, ratio_EO)
            dbase = torch.addcmul(dy_TO, dy_TO, change).to(y_TO.dtype)
        weighted_TO = (dy_TO * _linear(y_TO, bias_O)).to(ratio_EO.dtype)
        if gates_TE is None:
            return dbase, None, None, weighted_TO.sum(0, keepdim=True)
        dratio_EO = gates_TE.to(ratio_EO.dtype).t() @ weighted_TO
        if need_gates:
            dgates_TE = (weighted_TO @ (ratio_EO - 1).t()).to(gates_TE.dtype)
        return dbase, None, dgates_TE, dratio_EO


def _change(gates_TE: Tensor | None, ratio_EO: Tensor) -> Tensor:
    """What multiplies the base term, [T or 1, O]."""
    change_EO = ratio_EO - 1
    return change_EO if gates_TE is None else gates_TE.to(change_EO.dtype) @ change_EO


def _linear(y_TO: Tensor, bias_O: Tensor | None) -> Tensor:
    """Output of the layer without its bias."""
    return y_TO if bias_O is None else y_TO - bias_O.to(y_TO.dtype)
