"""Threshold routing: every expert whose probability reaches a fixed value.

    p = softmax(W x / temperature)
    g_e = p_e / sum_{p_j >= threshold} p_j  where p_e >= threshold, else 0

Reference: the MoLE baseline of Liu and Luo 2024 (AdaMoLE), arXiv:2405.00361, section 3.
Shape legend: see base.py.
"""

import pydantic
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


@ROUTERS.register("threshold", paper="arXiv:2405.00361")
class ThresholdRouter(LinearGateRouter):
    """Every expert whose probability reaches a fixed threshold.

    Limitations: a threshold above 1 / E can leave a token without any expert; its
    output is that of the base alone.
    """

    class Config(GateConfig):
        """Settings of threshold routing."""

        threshold: float = pydantic.Field(default=0.1, gt=0, lt=1)
        """Probability that an expert must reach."""

    config: Config

    @classmethod
    def check(cls, config: RouterConfig, num_experts: int) -> str | None:
        """See base class."""
        assert isinstance(config, cls.Config)
        if num_experts > 1 and config.threshold > 1 / num_experts:
            return (
                f"router.threshold={config.threshold} exceeds 1 / num_experts="
                f"{1 / num_experts:.4g}: a near uniform router would choose no expert, "
                "and never learn; lower it"
            )
        return super().check(config, num_experts)

    def forward(self, x: Tensor, context: ForwardContext) -> Routing:
        """See base class."""
        logits_TE = self.logits(x)
        probs_TE, full_TE = self.probs(logits_TE)
        gates_TE = share(probs_TE, probs_TE >= self.config.threshold)
        return Routing(gates_TE, full_TE, logits_TE, top_k=logits_TE.shape[-1])
