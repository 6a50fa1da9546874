"""The definition of the grouped low-rank matmul: slow, float64, token by token.

    y[t] = base[t] + sum_e gates[t, e] * scale[e] * B_e (A_e x[t])

Shape legend
    T tokens   E experts   I in features   O out features   r rank of one expert
"""

import torch
from torch import Tensor


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
    return torch.stack(rows) if rows else x_TI.new_zeros(0, Bt.shape[-1])
