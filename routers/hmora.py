"""HMoRA: a token router and a task router, mixed by a weight that grows with depth.

    q = (1 - a) softmax(R x + r) + a softmax(R' h + r')[row],    a = sigmoid(alpha)
    h  mean input of the layer over the prompt of the row
    alpha starts at alpha_shift + epsilon (2 depth - 1),  depth 0 first, 1 last layer
    g_e = q_e / sum_{j in top-K} q_j               for e in the top K of q, else 0
    g_e = exp(q_e) / sum_{j in top-K} exp(q_j)     likewise    (second_softmax)
    g = q                                          (top_k: null)

Lower layers route by the token, upper ones by the task, which is read from the prompt,
so that tasks need no names.

Reference: Liao et al. 2025 (HMoRA), openreview:lTkHiXeuDl, ICLR 2025; the start of
alpha and the second softmax as in the authors' code.
Shape legend: see base.py.
"""

from typing import Literal

import pydantic
import torch
from torch import Tensor, nn

from molora.context import ForwardContext
from molora.errors import WrapError
from molora.kernels import router_logits
from molora.routers.base import ROUTERS, AbstractRouter, RouterConfig, Routing
from molora.routers.gates import require_finite


@ROUTERS.register("hmora", paper="openreview:lTkHiXeuDl")
class HMoRARouter(AbstractRouter):
    """Token and task routing mixed by depth, then the K likeliest experts or all.

    Gates are divided by their sum. In the authors' code a second softmax, over the kept
    probabilities, makes them nearly even whatever the router says: p = 0.9, 0.1 becomes
    0.69, 0.31; ``second_softmax`` asks for it.

    Limitations: h is the mean of the layer's own input, where the authors train a
    transformer on the embedded prompt; every layer has both routers, where the authors'
    script drops one if a starts below 0.2 or above 0.8; no dropout before the routers.
    Objectives other than ``gjs`` read the mixed q, where the authors balance the token
    router alone.

    Args:
        config: Settings.
        in_features: I.
        num_experts: E.
        site: Module path of the target layer, for messages.
        generator: Source of the initial weights.
    """

    reads_prompt = True

    class Config(RouterConfig):
        """Settings of HMoRA; defaults are those of the authors' code, gates aside."""

        input: Literal["token"] = "token"
        """It reads the token and the prompt, both."""
        top_k: int | None = pydantic.Field(default=2, ge=2)
        """Experts used per token, at most num_experts; null uses all."""
        second_softmax: bool = False
        """Gates are a softmax of the kept probabilities, not their shares."""
        epsilon: float = pydantic.Field(default=2.0, ge=0)
        """Alpha starts so far below alpha_shift in the first layer, above it in the
        last."""
        alpha_shift: float = 0.0
        """Where alpha starts in the middle layer."""
        init_range: float = pydantic.Field(default=0.02, ge=0)
        """Standard deviation of the initial weights; small means near uniform."""

    config: Config

    @classmethod
    def check(cls, config: RouterConfig, num_experts: int) -> str | None:
        """See base class."""
        assert isinstance(config, cls.Config)
        if config.top_k is not None and config.top_k > num_experts:
            return f"router.top_k={config.top_k} exceeds num_experts={num_experts}"
        if config.top_k is None and config.second_softmax:
            return (
                "router.second_softmax: has no effect with top_k: null, which keeps "
                "every expert; drop it, or set router.top_k"
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
        self.gate = nn.utils.skip_init(nn.Linear, in_features, num_experts)
        self.task_gate = nn.utils.skip_init(nn.Linear, in_features, num_experts)
        self.alpha = nn.Parameter(torch.tensor(config.alpha_shift))
        for gate in (self.gate, self.task_gate):
            nn.init.normal_(gate.weight, 0.0, config.init_range, generator)
            nn.init.zeros_(gate.bias)

    def place(self, depth: float | None) -> None:
        """See base class."""
        epsilon = self.config.epsilon
        if depth is None and epsilon:
            raise WrapError(
                f"site {self.site!r}: router.epsilon={epsilon} mixes by depth, and "
                "this layer belongs to no numbered one; add it to exclude_modules, or "
                "set router.epsilon: 0"
            )
        with torch.no_grad():
            self.alpha.add_(epsilon * (2 * (depth or 0.0) - 1))

    def forward(self, x: Tensor, context: ForwardContext) -> Routing:
        """See base class; also raises where the prompt cannot be told."""
        mean_BI = context.prompt_mean(x, self.site)
        logits_TE = self._logits(self.gate, x)
        rows_BE = torch.softmax(self._logits(self.task_gate, mean_BI), -1)
        share = torch.sigmoid(self.alpha)
        task_TE = rows_BE.repeat_interleave(len(x) // len(rows_BE), 0)
        full_TE = (1 - share) * torch.softmax(logits_TE, -1) + share * task_TE
        gates_TE = self.select(full_TE)
        return Routing(gates_TE, full_TE, logits_TE, self.config.top_k, rows=rows_BE)

    def select(self, full: Tensor) -> Tensor:
        """Gates from the mixed distribution, [T, E] both."""
        if self.config.top_k is None:
            return full
        kept_TK, ids_TK = full.topk(self.config.top_k)
        if self.config.second_softmax:
            kept_TK = torch.softmax(kept_TK, -1)
        else:
            kept_TK = kept_TK / kept_TK.sum(-1, keepdim=True)
        return torch.zeros_like(full).scatter_(-1, ids_TK, kept_TK)

    def _logits(self, gate: nn.Linear, x: Tensor) -> Tensor:
        logits = router_logits(x, gate.weight) + gate.bias
        require_finite(logits, self.site)
        return logits
