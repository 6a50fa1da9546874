"""Top-k routing: the K likeliest experts of each token.

    p = softmax(W x / temperature)
    g_e = p_e / sum_{j in top-K} p_j   for e in the top K, else 0    (renormalize)
    g_e = p_e                          for e in the top K, else 0    (otherwise)

Reference: Shazeer et al. 2017, arXiv:1701.06538, section 2.1 (without its noise
network); selection after the softmax as in Gao et al. 2024 (MoLA), arXiv:2402.08562.
Shape legend: see base.py.
"""

import math
from collections.abc import Callable
from typing import ClassVar

import pydantic
import torch
from torch import Tensor

from molora.context import ForwardContext
from molora.kernels import can_route, topk_route
from molora.routers.base import (
    ROUTERS,
    GateConfig,
    LinearGateRouter,
    RouterConfig,
    Routing,
)
from molora.routers.gates import not_finite


@ROUTERS.register("topk", paper="arXiv:1701.06538")
class TopKRouter(LinearGateRouter):
    """The K likeliest experts of each token, by a linear gate.

    Limitations: with ``top_k: 1`` and ``renormalize: true`` the gate is constant 1 and
    the task loss does not train the router, so that combination is refused.
    """

    ranks = True
    epsilon: ClassVar[float] = 0.0
    """Added to the sum that gates are divided by."""

    class Config(GateConfig):
        """Settings of top-k routing."""

        top_k: int = pydantic.Field(default=2, ge=1)
        """Experts used per token, at most num_experts."""
        renormalize: bool = True
        """Divide the kept gates by their sum."""

    config: Config

    @classmethod
    def check(cls, config: RouterConfig, num_experts: int) -> str | None:
        """See base class."""
        assert isinstance(config, cls.Config)
        if config.top_k > num_experts:
            return f"router.top_k={config.top_k} exceeds num_experts={num_experts}"
        if config.top_k == 1 and config.renormalize and num_experts > 1:
            return (
                "router.top_k=1 with renormalize: true makes every gate exactly 1, so "
                "the router would never learn from the task; set renormalize: false"
            )
        return super().check(config, num_experts)

    @classmethod
    def can_grow(cls, config: RouterConfig) -> bool:
        """See base class."""
        assert isinstance(config, cls.Config)
        # those that derive from it score experts in other ways
        return cls is TopKRouter and config.renormalize

    def sums_to_one(self) -> bool:
        """See base class."""
        return self.config.renormalize and not self.epsilon

    def in_one(self, x: Tensor) -> Routing | None:
        """See base class."""
        config, weight_EI = self.config, self.gate.weight
        drawn = self.training and (config.noise or config.expert_dropout)
        kind, plain = type(self), LinearGateRouter
        steps = ("scores", "logits", "available")
        own = any(getattr(kind, step) is not getattr(plain, step) for step in steps)
        if drawn or own or self.epsilon or self.bias_E is not None:
            return None
        if not can_route(x, weight_EI):
            return None
        settings = (config.top_k, config.temperature, config.renormalize)
        said = not_finite(self.site)
        logits_TE, gates_TE = topk_route(x, weight_EI, *settings, said)
        return Routing(gates_TE, None, logits_TE, config.top_k)

    def chooser(self) -> Callable[[list[float]], list[tuple[int, float]] | None] | None:
        """See base class."""
        # those that derive from it score experts in other ways
        plain = type(self) is TopKRouter and self.bias_E is None
        return self._choose if plain else None

    def _choose(self, scores: list[float]) -> list[tuple[int, float]] | None:
        """Gates of one token, as ``forward`` has them."""
        config = self.config
        order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
        kept, left = order[: config.top_k], order[config.top_k :]
        tied = left and scores[kept[-1]] == scores[left[0]]
        if tied or not math.isfinite(sum(scores)):
            return None
        top, heat = scores[kept[0]], config.temperature
        powers = {e: math.exp((scores[e] - top) / heat) for e in kept}
        total = sum(powers.values())
        if not config.renormalize:
            total += sum(math.exp((scores[e] - top) / heat) for e in left)
        return [(e, power / total) for e, power in powers.items()]

    def forward(self, x: Tensor, context: ForwardContext) -> Routing:
        """See base class."""
        routing = self.in_one(x)
        if routing is not None:
            return routing
        logits_TE = self.logits(x)
        seen_TE = self.available(logits_TE)
        if self.bias_E is None:
            kept_TK, ids_TK = seen_TE.topk(self.config.top_k)
        else:
            ids_TK = self.biased(seen_TE).topk(self.config.top_k).indices
            kept_TK = seen_TE.gather(-1, ids_TK)
        if not self.config.renormalize:
            kept_TK = torch.softmax(seen_TE, -1).gather(-1, ids_TK)
        elif self.epsilon:
            kept_TK = torch.softmax(seen_TE, -1).gather(-1, ids_TK)
            kept_TK = kept_TK / (kept_TK.sum(-1, keepdim=True) + self.epsilon)
        else:
            # the softmax over the kept logits is the kept probabilities over their sum
            kept_TK = torch.softmax(kept_TK, -1)
        gates_TE = torch.zeros_like(logits_TE).scatter_(-1, ids_TK, kept_TK)
        # softmax(logits) is left to those who read it: decoding does not
        return Routing(gates_TE, None, logits_TE, self.config.top_k)
