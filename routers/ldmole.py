"""LD-MoLE: sparsegen gates whose sparsity is learned from the token.

    z = W x / temperature
    lambda = logsigmoid(w2 relu(w1 x + b1) + b2) + 0.99            below 0.99
    g_e = max(z_e - tau, 0) / (1 - lambda), tau such that the gates sum to 1

The larger lambda, the fewer experts a token uses. With z sorted from the largest and k
the last i with 1 - lambda + i z_i > z_1 + ... + z_i,
tau = (z_1 + ... + z_k - 1 + lambda) / k.

Reference: Zhuang et al. 2025 (LD-MoLE), arXiv:2509.25684, section 3; sparsegen-lin is
that of Laha et al. 2018, arXiv:1810.11975.
Shape legend: see base.py; H hidden width.
"""

import math

import pydantic
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molora.context import ForwardContext
from molora.kernels import router_logits
from molora.routers.base import (
    ROUTERS,
    GateConfig,
    LinearGateRouter,
    Routing,
)
from molora.routers.gates import require_finite


@ROUTERS.register("ldmole", paper="arXiv:2509.25684")
class LDMoLERouter(LinearGateRouter):
    """Sparsegen gates: some are exactly zero, and a small network learns how many.

    Limitations: each site has its own network for lambda, where the authors share one
    among all sites of one input width. It is trained, which the authors' script leaves
    out, and reads the input without dropout. Balance objectives read the gates; the
    paper's penalty on lambda is the objective ``lambda``.

    Args:
        config: Settings.
        in_features: I.
        num_experts: E.
        site: Module path of the target layer, for messages.
        generator: Source of the initial weights.
    """

    class Config(GateConfig):
        """Settings of LD-MoLE."""

        hidden: int = pydantic.Field(default=64, ge=1)
        """Hidden width of the network for lambda."""

    config: Config
    has_sparsity = True

    def __init__(
        self,
        config: Config,
        *,
        in_features: int,
        num_experts: int,
        site: str,
        generator: torch.Generator,
    ):
        super().__init__(
            config,
            in_features=in_features,
            num_experts=num_experts,
            site=site,
            generator=generator,
        )
        self.hidden = nn.utils.skip_init(nn.Linear, in_features, config.hidden)
        self.out = nn.utils.skip_init(nn.Linear, config.hidden, 1)
        for layer in (self.hidden, self.out):
            bound = 1 / math.sqrt(layer.in_features)
            for parameter in (layer.weight, layer.bias):
                nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(self, x: Tensor, context: ForwardContext) -> Routing:
        """See base class."""
        logits_TE = self.logits(x)
        lambda_T1 = self.sparsity(x)
        seen_TE = self.available(logits_TE)
        gates_TE = full_TE = sparsegen(seen_TE, lambda_T1)
        if seen_TE is not logits_TE:
            full_TE = sparsegen(logits_TE, lambda_T1)
        return Routing(
            gates_TE,
            full_TE,
            logits_TE,
            top_k=logits_TE.shape[-1],
            sparsity=lambda_T1.squeeze(-1),
        )

    def sparsity(self, x: Tensor) -> Tensor:
        """Lambda of each token, [T, 1] in at least float32, below 0.99."""
        hidden_TH = torch.relu(router_logits(x, self.hidden.weight) + self.hidden.bias)
        raw_T1 = router_logits(hidden_TH, self.out.weight)
        raw_T1 = require_finite(raw_T1, self.site)
        return F.logsigmoid(raw_T1 + self.out.bias) + 0.99


def sparsegen(z_TE: Tensor, lambda_T1: Tensor) -> Tensor:
    """Project logits to the simplex; defined at the top of this file.

    Args:
        z_TE: Logits; -inf gets no weight.
        lambda_T1: Below 1; larger is sparser.

    Returns:
        [T, E] gates that sum to 1. No gradient is read where one is zero.
    """
    # a shift changes nothing, and keeps the sums small; infinity would have no gradient
    z_TE = (z_TE - z_TE.detach().amax(-1, keepdim=True)).clamp(min=-1e30)
    sorted_TE = z_TE.sort(-1, descending=True).values
    rank_E = torch.arange(1, z_TE.shape[-1] + 1, dtype=z_TE.dtype, device=z_TE.device)
    room_T1 = 1 - lambda_T1
    inside_TE = room_T1 + rank_E * sorted_TE > sorted_TE.cumsum(-1)
    inside_TE = inside_TE.detach()
    total_T1 = sorted_TE.masked_fill(~inside_TE, 0.0).sum(-1, keepdim=True)
    tau_T1 = (total_T1 - room_T1) / inside_TE.sum(-1, keepdim=True)
    gates_TE = (z_TE - tau_T1) / room_T1
    return torch.where(gates_TE > 0, gates_TE, gates_TE.new_zeros(()))
