"""AdaMoLE: every expert whose probability reaches a threshold learned from the token.

    p = softmax(W x / temperature),  tau = max_threshold * sigmoid(w x + b)
    g_e = (p_e - tau) / sum_{p_j >= tau} (p_j - tau)  where p_e >= tau, else 0

Reference: Liu and Luo 2024 (AdaMoLE), arXiv:2405.00361, section 3.
Shape legend: see base.py.
"""

import pydantic
import torch
from torch import Tensor, nn

from molora.context import ForwardContext
from molora.kernels import router_logits
from molora.routers.base import (
    ROUTERS,
    GateConfig,
    LinearGateRouter,
    RouterConfig,
    Routing,
)
from molora.routers.gates import require_finite, share


@ROUTERS.register("adamole", paper="arXiv:2405.00361")
class AdaMoLERouter(LinearGateRouter):
    """Every expert whose probability reaches a threshold learned from the token.

    Limitations: balance objectives read p, not p - tau as in the authors' code, where
    raising the threshold lowers the loss. The threshold starts at half its maximum for
    every token.

    Args:
        config: Settings.
        in_features: I.
        num_experts: E.
        site: Module path of the target layer, for messages.
        generator: Source of the gate's initial weights.
    """

    class Config(GateConfig):
        """Settings of AdaMoLE."""

        max_threshold: float | None = pydantic.Field(default=None, gt=0, lt=1)
        """Largest threshold; None means 1 / num_experts."""

    config: Config

    @classmethod
    def check(cls, config: RouterConfig, num_experts: int) -> str | None:
        """See base class."""
        assert isinstance(config, cls.Config)
        highest = config.max_threshold
        if num_experts > 1 and highest is not None and highest >= 2 / num_experts:
            return (
                f"router.max_threshold={highest}: a threshold starts at half of it, "
                f"and a near uniform router of num_experts={num_experts} reaches only "
                f"{1 / num_experts:.4g}, so it would choose no expert and never learn"
                f"; set it below {2 / num_experts:.4g}"
            )
        return super().check(config, num_experts)

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
        self.highest = config.max_threshold or 1 / num_experts
        self.threshold = nn.utils.skip_init(nn.Linear, in_features, 1)
        nn.init.zeros_(self.threshold.weight)
        nn.init.zeros_(self.threshold.bias)

    def forward(self, x: Tensor, context: ForwardContext) -> Routing:
        """See base class."""
        logits_TE = self.logits(x)
        probs_TE, full_TE = self.probs(logits_TE)
        above_TE = probs_TE - self.tau(x)
        gates_TE = share(above_TE, above_TE >= 0)
        return Routing(gates_TE, full_TE, logits_TE, top_k=logits_TE.shape[-1])

    def tau(self, x: Tensor) -> Tensor:
        """Threshold of each token, [T, 1] in at least float32."""
        raw_T1 = router_logits(x, self.threshold.weight)
        raw_T1 = require_finite(raw_T1, self.site)
        return self.highest * torch.sigmoid(raw_T1 + self.threshold.bias)
