"""Sum of gated updates whose weights have to be formed, one expert at a time.

    base + sum_e g_e W(theta_e) x

For linear families whose weight has no factors along its sides. Nothing of the size of
a weight is kept; backward forms each weight once more, and takes the gradients of x and
the gates from one product with it:

    h = W^T dy    dx = sum_e g_e h_e    dg_e = <h_e, x>    dW_e = (g_e dy) x^T

Shape legend: see base.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Weight = Callable[..., Tensor]
"""From the parameters of one expert to its weight [O, I]."""


def dense_sum(
    weight: Weight,
    x: Tensor,
    parameters: Sequence[Tensor],
    gates: Tensor | None,
    features: int,
    top_k: int | None = None,
) -> Tensor:
    """Add the updates of all experts, each times its gate.

    Args:
        weight: Forms the weight of one expert.
        x: [T, I] inputs.
        parameters: Each [E, ...].
        gates: [T, E]; None means one expert with gate 1.
        features: O.
        top_k: At most so many gates of a token are not zero, and the gradient of the
            others is not read: an expert then computes the tokens that use it, and one
            that none uses is not formed. None promises nothing.

    Returns:
        [T, O] in the dtype of x, or in that of autocast; sums are float32.
    """
    device = x.device.type
    # like every op under autocast, leave float64 alone
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        if not torch.compiler.is_compiling():
            sparse = gates is not None and top_k is not None and top_k < gates.shape[1]
            return _DenseSum.apply(  # type: ignore[no-any-return, no-untyped-call]
                weight, sparse, features, x, gates, *parameters
            )
        parts = [
            F.linear(x, weight(*_of(parameters, e)).to(x.dtype))
            for e in range(len(parameters[0]))
        ]
        if gates is None:
            return parts[0]
        summed = sum(gates[:, e : e + 1] * part for e, part in enumerate(parts))
        assert isinstance(summed, Tensor)
        return summed.to(x.dtype)


def _of(parameters: Sequence[Tensor], expert: int) -> list[Tensor]:
    """Parameters of one expert."""
    return [parameter[expert] for parameter in parameters]


def _tokens(gates_TE: Tensor | None, expert: int, sparse: bool) -> Tensor | slice:
    """Tokens that an expert computes."""
    if gates_TE is None or not sparse:
        return slice(None)
    return gates_TE[:, expert].nonzero().squeeze(1)


def _gate(gates_TE: Tensor | None, expert: int, tokens: Tensor | slice) -> Any:
    """Gates of some tokens, to multiply [T, ...] with."""
    return 1.0 if gates_TE is None else gates_TE[tokens, expert].unsqueeze(1)


class _DenseSum(torch.autograd.Function):
    """The sum, with weights that are formed again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Weight,
        sparse: bool,
        features: int,
        x: Tensor,
        gates: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.weight, ctx.sparse = weight, sparse
        ctx.save_for_backward(x, gates, *parameters)
        wide = torch.promote_types(x.dtype, torch.float32)
        total = x.new_zeros(len(x), features, dtype=wide)
        for e in range(len(parameters[0])):
            tokens = _tokens(gates, e, sparse)
            if isinstance(tokens, Tensor) and not len(tokens):
                continue
            part = F.linear(x[tokens], weight(*_of(parameters, e)).to(x.dtype))
            total[tokens] += part.to(wide) * _gate(gates, e, tokens)
        return total.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gates, *parameters = ctx.saved_tensors
        needs_x, needs_gates, *needed = ctx.needs_input_grad[3:]
        dx = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        d_gates = torch.zeros_like(gates) if needs_gates else None
        d_parameters = [torch.zeros_like(p) for p in parameters]
        for e in range(len(parameters[0])):
            tokens = _tokens(gates, e, ctx.sparse)
            if isinstance(tokens, Tensor) and not len(tokens):
                continue
            leaves = [p.detach().requires_grad_() for p in _of(parameters, e)]
            with torch.set_grad_enabled(any(needed)):
                W_OI = ctx.weight(*leaves)
            gate, dy_e, x_e = _gate(gates, e, tokens), dy[tokens], x[tokens]
            if needs_x or needs_gates:
                h_TI = (dy_e @ W_OI.detach().to(dy.dtype)).to(dx.dtype)
                dx[tokens] += gate * h_TI
                if d_gates is not None:
                    d_gates[tokens, e] = (h_TI * x_e).sum(1).to(d_gates.dtype)
            if any(needed):
                dW_OI = (gate * dy_e).to(dy.dtype).t() @ x_e.to(dy.dtype)
                found = torch.autograd.grad(W_OI, leaves, dW_OI.to(W_OI.dtype))
                for d_parameter, d_one in zip(d_parameters, found, strict=True):
                    d_parameter[e] = d_one
        return (
            None,
            None,
            None,
            dx.to(x.dtype) if needs_x else None,
            d_gates,
            *(d if n else None for d, n in zip(d_parameters, needed, strict=True)),
        )
