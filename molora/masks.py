"""Masks that keep the largest entries of all masked tensors of a model.

    tau = the k-th largest |b| over all sites    k = int(density * number of entries)
    mask = |b| >= tau

after which the masked tensors start again from zero, beside the same other tensors.

Reference: Zhang et al. 2025 (LoRI), arXiv:2504.07448, section 3.2; the authors' scripts
cut k off in the same way.
"""

import torch
from torch import Tensor, nn

from molora.errors import WrapError
from molora.experts import FactorExperts
from molora.model import sites


@torch.no_grad()
def mask_by_magnitude(model: nn.Module, density: float) -> int:
    """Train on with the largest entries of the masked tensors alone, from zero.

    Train a model whose ``experts.trainability`` masks a tensor (``{B: masked}``), call
    this, and train again with a new optimizer.

    Args:
        model: A wrapped model that is not merged.
        density: Share of the entries that is kept, over all sites and experts together;
            ties keep more.

    Returns:
        How many entries are kept.

    Raises:
        WrapError: The model is not wrapped, is merged, masks no tensor, is not trained
            in as many entries, or density is not in (0, 1].
    """
    found = sites(model).values()
    if any(site.merged for site in found):
        raise WrapError("the model is merged; call molora.unmerge first")
    if not 0 < density <= 1:
        raise WrapError(f"density={density} is not in (0, 1]")
    pairs: list[tuple[Tensor, Tensor]] = []
    for site in found:
        for part in site.experts.modules():
            if isinstance(part, FactorExperts):
                pairs += part.masked().values()
    if not pairs:
        raise WrapError(
            "no tensor of this model is masked; set experts.trainability, for example "
            "{B: masked}"
        )
    sizes_N = torch.cat([(b * m).abs().flatten().cpu() for b, m in pairs])
    kept = int(density * len(sizes_N))
    if kept == 0 or int(sizes_N.count_nonzero()) < kept:
        raise WrapError(
            f"{int(sizes_N.count_nonzero())} of {len(sizes_N)} entries of the masked "
            f"tensors are not zero, and density={density} keeps {kept}; train first, "
            "or choose another density"
        )
    tau = sizes_N.kthvalue(len(sizes_N) - kept + 1).values
    for values, mask in pairs:
        mask.copy_((values * mask).abs() >= tau.to(values.device))
        values.zero_()
    return sum(int(mask.sum()) for _, mask in pairs)
