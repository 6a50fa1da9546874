"""Decoding on a CPU: only the factors of the experts in use are read.

One token takes as long as reading the weights. The concatenated form reads the factors
of all E experts; this one walks over those with a gate that is not zero,

    y <- y + gates_e * scale_e * (x A_e^T) Bt_e        for every e in use

and so reads those of K experts for one token. Which they are is a number that only the
host knows, hence CPUs. Forward only: a call that needs a gradient is declined.

Shape legend
    T tokens   E experts   I in features   O out features   r rank of one expert
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from molora.kernels.torch_path import cast, dtype_of, keep_mask


def why_not(
    x: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float | Tensor,
    base: Tensor | None,
    top_k: int | None,
) -> list[str]:
    """Reasons against this form."""
    reasons = []
    if gates is None:
        reasons.append("one expert: nothing to gather")
    if x.device.type != "cpu":
        reasons.append(f"tensors on {x.device.type}: it waits for the host, CPU only")
    given = (x, A, Bt, gates, scale, base)
    tensors = [value for value in given if isinstance(value, Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        reasons.append("a gradient is needed: this form decodes only")
    return reasons


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
    """Result, and nothing for backward; arguments as in ``lowrank_mixture``."""
    assert gates_TE is not None
    dtype = dtype_of(x_TI, A)
    y_TO = x_TI.new_zeros(len(x_TI), Bt.shape[2]) if base_TO is None else base_TO
    made = y_TO.dtype
    x_TI, y_TO = cast(x_TI, dtype), cast(y_TO, dtype)
    if dropout:
        x_TI = x_TI * keep_mask(x_TI, dropout, seed)
    z_Tr = F.linear(x_TI, cast(A[0], dtype)) if len(A) == 1 else None
    for expert, weight in _used(gates_TE, scale):
        if len(A) > 1:
            z_Tr = F.linear(x_TI, cast(A[expert], dtype))
        assert z_Tr is not None
        b_rO = cast(Bt[expert if len(Bt) > 1 else 0], dtype)
        if isinstance(weight, float):
            # one token: the product with B applies its gate for free
            y_TO = torch.addmm(y_TO, z_Tr, b_rO, alpha=weight)
        else:
            y_TO = torch.addmm(y_TO, cast(z_Tr * weight, dtype), b_rO)
    # an operator returns nothing that is a view of its inputs
    y_TO = y_TO.clone() if y_TO is base_TO else y_TO
    return cast(y_TO, made), x_TI.new_empty(0)


def _used(gates_TE: Tensor, scale: float | Tensor) -> list[tuple[int, float | Tensor]]:
    """Experts in use with gate times scale: a number for one token, else [T, 1]."""
    if len(gates_TE) > 1:
        weight_TE = gates_TE * scale
        used = gates_TE.any(0).tolist()
        return [(e, weight_TE[:, e, None]) for e, is_used in enumerate(used) if is_used]
    if isinstance(scale, Tensor):
        gates_TE, scale = gates_TE * scale, 1.0
    rows = gates_TE.tolist()
    gates = rows[0] if rows else []
    return [(e, gate * scale) for e, gate in enumerate(gates) if gate]
