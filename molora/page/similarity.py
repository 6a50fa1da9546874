"""How alike the experts of one site are: the cosine between their updates.

    cos_ij = <D_i, D_j> / (|D_i| |D_j|)    D_e the dense update of expert e, [O, I]

For D_e = s_e B_e A_e no D_e is built, since

    <D_i, D_j> = s_i s_j tr((B_j^T B_i) (A_i A_j^T))

Legend: E experts   I in features   O out features   r rank of one expert
"""

import torch
from torch import Tensor

from molora.experts import BilinearExperts
from molora.layer import MoloraLinear


@torch.no_grad()
def expert_similarity(site: MoloraLinear) -> Tensor:
    """Cosine between the updates of every two experts, computed in float64.

    Families without low-rank factors need two dense updates in memory at a time. What
    an expert adds to the bias is left out.

    Args:
        site: A target layer.

    Returns:
        [E, E] on the CPU, NaN for an expert whose update is zero.
    """
    if isinstance(site.experts, BilinearExperts):
        gram_EE = _factored(site.experts)
    else:
        gram_EE = _dense(site)
    norm_E = gram_EE.diagonal().clamp(min=0).sqrt()
    cosine_EE = gram_EE / (norm_E.unsqueeze(1) * norm_E)
    # an update of zero has no direction; rounding may leave 1.0000000000000002
    dead_E = norm_E == 0
    cosine_EE[dead_E] = torch.nan
    cosine_EE[:, dead_E] = torch.nan
    return cosine_EE.clamp(-1, 1).cpu()


def _factored(experts: BilinearExperts) -> Tensor:
    """Inner products by the identity above, one row of experts at a time."""
    E = experts.num_experts
    A, Bt, _ = experts.factors()
    A = A.double().expand(E, -1, -1)
    Bt = Bt.double().expand(E, -1, -1)
    rows = []
    for e in range(E):
        # [E, r, r]: entry p, q is of row p of expert e and row q of the other
        inner_Err = (A[e] @ A.mT) * (Bt[e] @ Bt.mT)
        rows.append(inner_Err.sum((1, 2)))
    scale_E = torch.tensor(experts.scales(), dtype=torch.float64, device=A.device)
    return torch.stack(rows) * scale_E.unsqueeze(1) * scale_E


def _dense(site: MoloraLinear) -> Tensor:
    """Inner products of dense updates, two of them at a time."""
    weight_OI = site.host.weight_OI(site.base_weight()).float()
    E = site.experts.num_experts
    gram_EE = torch.zeros(E, E, dtype=torch.float64)
    for i in range(E):
        delta_OI = site.experts.delta_weight(i, weight_OI).double()
        for j in range(i, E):
            other_OI = site.experts.delta_weight(j, weight_OI).double()
            gram_EE[i, j] = gram_EE[j, i] = (delta_OI * other_OI).sum()
    return gram_EE
