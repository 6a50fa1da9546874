"""One product with x for several linears that read it: q, k and v; gate and up.

    [z_1 ... z_n] = x [A_1; ...; A_n]^T          shrink, once
    y_i = base_i + (gates * scale_i * z_i) Bt_i   expand, for each linear

which is ``lowrank_mixture`` of each, with x read once in forward, and the gradient of x
written once in backward. In plain torch: what the Triton kernels gain from reading x
once is what they have already for one linear.

Shape legend
    T tokens   E experts   I in features   O out features   r rank of one expert
    R = E * r
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from molora.errors import ConfigError
from molora.kernels.torch_path import cast, cat, dtype_of


def shrink(x: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
    """Bring x into the rank space of several linears.

    Args:
        x: [T, I].
        factors: A of each linear, [E, r, I]; numbers of experts and ranks may differ.

    Returns:
        z of each linear, [T, R], in the dtype that ``lowrank_mixture`` computes in.

    Raises:
        ConfigError: Factors of another width or dtype.
    """
    widths = {(A.shape[-1], A.dtype) for A in factors}
    if widths != {(x.shape[-1], factors[0].dtype)}:
        raise ConfigError(
            f"shrink: x has {x.shape[-1]} features, and the factors read "
            f"{sorted(width for width, _ in widths)} in "
            f"{sorted(str(dtype) for _, dtype in widths)}; they must agree"
        )
    with torch.autocast(x.device.type, enabled=False):
        dtype = dtype_of(x, factors[0])
        a_QI = torch.cat([cat(A, dtype) for A in factors])
        z_TQ = F.linear(cast(x, dtype), a_QI)
    return list(z_TQ.split([A.shape[0] * A.shape[1] for A in factors], -1))


def expand(
    z: Tensor, Bt: Tensor, gates: Tensor, scale: float | Tensor, base: Tensor
) -> Tensor:
    """Gate in rank space and add to the output of the frozen linear.

    Args:
        z: [T, R] of ``shrink``.
        Bt: [E, r, O].
        gates: [T, E] in at least float32.
        scale: alpha / r, one number or [E].
        base: [T, O].

    Returns:
        [T, O] in the dtype of base.
    """
    T, (E, r, _) = z.shape[0], Bt.shape
    with torch.autocast(z.device.type, enabled=False):
        weight_TE = gates if isinstance(scale, float) else gates * scale
        alpha = scale if isinstance(scale, float) else 1.0
        zg_TER = cast(z.reshape(T, E, r) * weight_TE.unsqueeze(-1), z.dtype)
        zg_TR, b_RO = zg_TER.reshape(T, E * r), cat(Bt, z.dtype)
        if base.dtype == z.dtype:
            return torch.addmm(base, zg_TR, b_RO, alpha=alpha)
        return torch.add(base, zg_TR @ b_RO, alpha=alpha).to(base.dtype)
