"""Sum of gated updates, one expert at a time.

    sum_e g_e update(x; theta_e)

For families whose update is no product of two factors. Forward keeps x, gates and
parameters alone; backward computes one expert after the other again, so that no
[T, E, O] is held.

Shape legend: see base.py; n features of an update (I or O).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Update = Callable[..., Tensor]
"""From [T, m] values and the parameters of one expert to [T, n]; row by row."""


def gated_sum(
    update: Update,
    values: Tensor,
    parameters: Sequence[Tensor],
    gates: Tensor | None,
    top_k: int | None = None,
) -> Tensor:
    """Add the updates of all experts, each times its gate.

    Args:
        update: What one expert computes, with parameters in the dtype of the values.
        values: [T, m] that every expert reads.
        parameters: Each [E, ...].
        gates: [T, E]; None means one expert with gate 1.
        top_k: At most so many gates of a token are not zero, and the gradient of the
            others is not read: an expert then computes the tokens that use it. None
            promises nothing.

    Returns:
        [T, n] in the dtype of the values, or in that of autocast; sums are float32.
    """
    device = values.device.type
    # like every op under autocast, leave float64 alone
    if torch.is_autocast_enabled(device) and values.dtype != torch.float64:
        values = values.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        if gates is None:
            return update(values, *_of(parameters, 0, values))
        sparse = top_k is not None and top_k < gates.shape[1]
        if not torch.compiler.is_compiling():
            return _GatedSum.apply(  # type: ignore[no-any-return, no-untyped-call]
                update, sparse, values, gates, *parameters
            )
        parts = [
            gates[:, e : e + 1] * update(values, *_of(parameters, e, values))
            for e in range(gates.shape[1])
        ]
        return torch.stack(parts).sum(0).to(values.dtype)


def _of(parameters: Sequence[Tensor], expert: int, values: Tensor) -> list[Tensor]:
    """Parameters of one expert in the dtype that it computes in."""
    return [parameter[expert].to(values.dtype) for parameter in parameters]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def rows_of(gates_TE: Tensor | None, expert: int, sparse: bool) -> Tensor | slice:
    """Tokens that an expert computes."""
    if gates_TE is None or not sparse:
        return slice(None)
    return gates_TE[:, expert].nonzero().squeeze(1)


def none(rows: Tensor | slice) -> bool:
    """Whether no token uses an expert."""
    return isinstance(rows, Tensor) and not len(rows)


class _GatedSum(torch.autograd.Function):
    """The sum, recomputed in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        update: Update,
        sparse: bool,
        values: Tensor,
        gates: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.update, ctx.sparse = update, sparse
        ctx.save_for_backward(values, gates, *parameters)
        total: Tensor | None = None
        for e in range(gates.shape[1]):
            rows = rows_of(gates, e, sparse)
            if none(rows) and (total is not None or e + 1 < gates.shape[1]):
                continue
            part = update(values[rows], *_of(parameters, e, values))
            part = part * gates[rows, e].unsqueeze(1).to(_wide(values.dtype))
            if total is None:
                total = part.new_zeros(len(values), part.shape[1])
            total[rows] += part
        assert total is not None
        return total.to(values.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, gates, *parameters = ctx.saved_tensors
        needs_values, needs_gates, *needed = ctx.needs_input_grad[2:]
        d_values = torch.zeros_like(values, dtype=_wide(values.dtype))
        d_gates = torch.zeros_like(gates)
        d_parameters = [torch.zeros_like(p) for p in parameters]
        for e in range(gates.shape[1]):
            rows = rows_of(gates, e, ctx.sparse)
            if none(rows):
                continue
            leaves = [values[rows], *_of(parameters, e, values)]
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            with torch.enable_grad():
                part = ctx.update(*leaves)
            grad_part = grad[rows]
            if needs_gates:
                d_gates[rows, e] = (part.detach() * grad_part).sum(1).to(gates.dtype)
            if not (needs_values or any(needed)):
                continue
            weighted = (grad_part * gates[rows, e].unsqueeze(1)).to(part.dtype)
            found = torch.autograd.grad(part, leaves, weighted)
            d_values[rows] += found[0]
            for d_parameter, d_one in zip(d_parameters, found[1:], strict=True):
                d_parameter[e] = d_one
        return (
            None,
            None,
            d_values.to(values.dtype) if needs_values else None,
            d_gates if needs_gates else None,
            *(d if n else None for d, n in zip(d_parameters, needed, strict=True)),
        )
