"""Top-p routing: as many of the likeliest experts as it takes to reach a probability.

    p = softmax(W x / temperature), sorted from the largest
    chosen: every expert before which the likelier ones sum to at most top_p
    g_e = p_e / sum_{chosen} p_j  (renormalize), else p_e;  0 where not chosen

Reference: Huang et al. 2024, arXiv:2403.07652; the dynamic variant of
MixLoRA (Li et al. 2024, arXiv:2404.15159).
Shape legend: see base.py.
"""

import pydantic
import torch
from torch import Tensor

from molora.context import ForwardContext
from molora.routers.base import (
    ROUTERS,
    GateConfig,
    LinearGateRouter,
    RouterConfig,
    Routing,
)
from molora.routers.gates import share


@ROUTERS.register("topp", paper="arXiv:2403.07652")
class TopPRouter(LinearGateRouter):
    """The likeliest experts that together reach probability top_p.

    Limitations: near uniform gates choose about top_p * E experts, so a fresh router
    saves little. Unlike in MixLoRA's code, the temperature divides the logits, not the
    probabilities, and gates are divided by their sum unless told otherwise.
    """

    class Config(GateConfig):
        """Settings of top-p routing."""

        top_p: float = pydantic.Field(default=0.8, gt=0, le=1)
        """Probability to reach, in (0, 1]."""
        min_experts: int = pydantic.Field(default=1, ge=1)
        """Experts that every token uses at least."""
        renormalize: bool = True
        """Divide the kept gates by their sum."""

    config: Config

    @classmethod
    def check(cls, config: RouterConfig, num_experts: int) -> str | None:
        """See base class."""
        assert isinstance(config, cls.Config)
        if config.min_experts > num_experts:
            return (
                f"router.min_experts={config.min_experts} exceeds "
                f"num_experts={num_experts}"
            )
        return super().check(config, num_experts)

    def sums_to_one(self) -> bool:
        """See base class."""
        return self.config.renormalize

    def forward(self, x: Tensor, context: ForwardContext) -> Routing:
        """See base class."""
        logits_TE = self.logits(x)
        probs_TE, full_TE = self.probs(logits_TE)
        chosen_TE = self.choose(probs_TE.detach())
        if self.config.renormalize:
            gates_TE = share(probs_TE, chosen_TE)
        else:
            gates_TE = torch.where(chosen_TE, probs_TE, probs_TE.new_zeros(()))
        return Routing(gates_TE, full_TE, logits_TE, top_k=logits_TE.shape[-1])

    def choose(self, probs: Tensor) -> Tensor:
        """Which experts a token uses.

        Args:
            probs: [T, E].

        Returns:
            Bool [T, E].
        """
        # stable: equal probabilities are cut alike in every batch
        sorted_TE, ids_TE = probs.sort(dim=-1, descending=True, stable=True)
        kept_TE = torch.ones_like(probs, dtype=torch.bool)
        kept_TE[:, 1:] = sorted_TE.cumsum(-1)[:, :-1] <= self.config.top_p
        kept_TE[:, : self.config.min_experts] = True
        return torch.zeros_like(kept_TE).scatter_(-1, ids_TE, kept_TE)
