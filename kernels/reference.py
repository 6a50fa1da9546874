"""The definition of the grouped low-rank matmul: slow, float64, token by token.

    y[t] = base[t] + sum_e gates[t, e] * scale[e] * B_e (A_e x[t])

Shape legend
    T tokens   E experts   I in features   O out features   r rank of one expert
"""

import torch
from torch import Tensor

from molora.kernels.gradients import Gradients, Needs
from molora.kernels.torch_path import added, keep_mask


def reference(
    x_TI: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates_TE: Tensor | None,
    scale: float | Tensor,
    base_TO: Tensor | None,
) -> Tensor:
    """Evaluate the definition in float64, one token and one expert at a time.

    It is differentiable, and every other backend must match it.

    Args:
        x_TI: Inputs.
        A: [E or 1, r, I].
        Bt: [E or 1, r, O], the transposed B of each expert.
        gates_TE: Gate of each expert for each token; None means one expert, gate 1.
        scale: One number, or [E].
        base_TO: Added to the update; None means zero.

    Returns:
        [T, O] float64.
    """
    x_TI, A, Bt = x_TI.double(), A.double(), Bt.double()
    if gates_TE is None:
        gates_TE = x_TI.new_ones(x_TI.shape[0], 1)
    gates_TE = gates_TE.double()
    experts = gates_TE.shape[1]
    scale_E = torch.as_tensor(scale, dtype=torch.float64).expand(experts)
    rows = []
    for t in range(x_TI.shape[0]):
        total = x_TI.new_zeros(Bt.shape[-1])
        for e in range(experts):
            a_rI, b_rO = A[e % A.shape[0]], Bt[e % Bt.shape[0]]
            update = (a_rI @ x_TI[t]) @ b_rO
            total = total + gates_TE[t, e] * scale_E[e] * update
        rows.append(total if base_TO is None else base_TO[t].double() + total)
    if rows:
        return torch.stack(rows)
    none_TO = x_TI.new_zeros(0, Bt.shape[-1])
    return none_TO if base_TO is None else none_TO + base_TO.double()


def why_not(
    x: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float | Tensor,
    base: Tensor | None,
    top_k: int | None,
) -> list[str]:
    """No reason: the definition holds for every call."""
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
    """The definition as a backend; dropout as the torch form draws it."""
    if dropout:
        x_TI = x_TI * keep_mask(x_TI, dropout, seed)
    return reference(x_TI, A, Bt, gates_TE, scale, base_TO), x_TI.new_empty(0)


def backward(
    dy_TO: Tensor,
    x_TI: Tensor,
    z: Tensor,
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
    """Gradients of the definition, by autograd."""
    if not any(needs):
        return Gradients(None, None, None, None)
    with torch.enable_grad():
        x_TI, A, Bt = (v.detach().requires_grad_() for v in (x_TI, A, Bt))
        if gates_TE is not None:
            gates_TE = gates_TE.detach().requires_grad_()
        given = zip((x_TI, A, Bt, gates_TE), needs, strict=True)
        wanted = [v for v, needed in given if needed and v is not None]
        if x_TI.shape[0]:
            y_TO, _ = forward(x_TI, None, A, Bt, gates_TE, scale, top_k, dropout, seed)
            made = iter(torch.autograd.grad(y_TO, wanted, dy_TO.to(y_TO.dtype)))
        else:
            made = iter([torch.zeros_like(v) for v in wanted])
    grads = Gradients(*(next(made) if needed else None for needed in needs))
    return grads if grads.x is None else grads._replace(x=added(grads.x, onto))
