"""X-LoRA: one classifier for the model reads what the base model makes of each token.

    h = last hidden state of the base model, adapters off  no gradient
    z = MLP(h) / temperature                               [E], or [L, E] layerwise
    g = weight * softmax(z)

With top_k the other gates are zero. The kept ones stay as they are (masked), are the
softmax over the kept z (softmax), or that over their probabilities (second_softmax).

Reference: Buehler and Buehler 2024 (X-LoRA), arXiv:2402.07148, section 2.
Shape legend: see base.py; D width of the hidden state, L target layers that follow.
"""

import math
from typing import Literal, Self

import pydantic
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molora.context import ForwardContext
from molora.kernels import router_logits
from molora.routers.base import ROUTERS, AbstractRouter, RouterConfig, Routing
from molora.routers.gates import require_finite

SIZE, DROPOUT = 2048, 0.2
"""Defaults of the classifier's hidden layers."""


@ROUTERS.register("xlora", paper="arXiv:2402.07148")
class XLoRARouter(AbstractRouter):
    """One classifier for the model over the last hidden state of a first, base pass.

    Every forward runs the model's body twice; see molora/base_pass.py. The paper's
    experts are trained before and frozen (``molora.import_peft``, ``train: router``).

    Limitations: scope is the model. Models with an encoder are refused, and caches that
    are offloaded. Gates without any softmax are not offered. The first pass always has
    its adapters off, where PEFT can scale them. Activation checkpointing must not be
    reentrant.

    Args:
        config: Settings.
        in_features: D.
        num_experts: E.
        site: Module path of the first target layer, for messages.
        generator: Source of the initial weights.
        num_sites: L.
    """

    reads_base_pass = True

    class Config(RouterConfig):
        """Settings of X-LoRA."""

        scope: Literal["site", "block", "model"] = "model"
        """The model, always."""
        depth: int = pydantic.Field(default=1, ge=1)
        """Linear layers of the classifier."""
        size: int = pydantic.Field(default=SIZE, ge=1)
        """Width of its hidden layers, with depth above 1."""
        dropout: float = pydantic.Field(default=DROPOUT, ge=0, lt=1)
        """Dropout after each of them, in training only, with depth above 1."""
        temperature: float = pydantic.Field(default=1.0, gt=0)
        """Divides the logits; above 1 flattens the gates."""
        layerwise: bool = False
        """Gates of its own for each target layer, from the one classifier."""
        top_k: int | None = pydantic.Field(default=None, ge=1)
        """Experts used per token; None uses all."""
        top_k_gates: Literal["masked", "softmax", "second_softmax"] = "masked"
        """Gates of the K: their probabilities, which sum to less than 1; divided by
        their sum; or a softmax over these probabilities, which flattens them."""
        weight: float = pydantic.Field(default=1.0, gt=0)
        """Multiplies every gate (X-LoRA's global scaling weight)."""

        @pydantic.model_validator(mode="after")
        def _is_read(self) -> Self:
            if self.depth == 1 and (self.size, self.dropout) != (SIZE, DROPOUT):
                raise ValueError("size, dropout: have no effect with depth: 1")
            if self.top_k is None and self.top_k_gates != "masked":
                raise ValueError("top_k_gates: has no effect without top_k")
            return self

    config: Config

    def __init__(
        self,
        config: Config,
        *,
        in_features: int,
        num_experts: int,
        site: str,
        generator: torch.Generator,
        num_sites: int = 1,
    ):
        super().__init__(
            config,
            in_features=in_features,
            num_experts=num_experts,
            site=site,
            generator=generator,
        )
        self.num_experts, self.num_sites = num_experts, num_sites
        out = num_experts * (num_sites if config.layerwise else 1)
        wide = [in_features, *[config.size] * (config.depth - 1), out]
        self.layers = nn.ModuleList(
            nn.utils.skip_init(nn.Linear, a, b)
            for a, b in zip(wide[:-1], wide[1:], strict=True)
        )
        for layer, a in zip(self.layers, wide, strict=False):
            for parameter in layer.parameters():
                bound = 1 / math.sqrt(a)
                nn.init.uniform_(parameter, -bound, bound, generator=generator)

    @classmethod
    def check(cls, config: RouterConfig, num_experts: int) -> str | None:
        """See base class."""
        assert isinstance(config, cls.Config)
        for field, wanted in (("scope", "model"), ("input", "token")):
            value = getattr(config, field)
            if value != wanted:
                return (
                    f"router.{field}={value!r}: router.kind 'xlora' is one classifier "
                    "for the model, over the hidden state of each token; drop it, or "
                    "set router.kind to topk or soft"
                )
        if config.top_k is not None and config.top_k > num_experts:
            return f"router.top_k={config.top_k} exceeds num_experts={num_experts}"
        return super().check(config, num_experts)

    @classmethod
    def check_balance(cls, config: RouterConfig) -> str | None:
        """See base class."""
        assert isinstance(config, cls.Config)
        if config.layerwise:
            return (
                "router.layerwise gives each token as many distributions as there are "
                "target layers, and objectives read one; drop one of them"
            )
        return None

    def forward(self, x: Tensor, context: ForwardContext) -> Routing:
        """Route tokens at the first target layer; see base class.

        Args:
            x: [T, D] hidden states of the first pass.
            context: The running forward.
        """
        return self.routings(x)[0]

    def routings(self, hidden_TD: Tensor) -> list[Routing]:
        """Route tokens at each of the L target layers.

        Args:
            hidden_TD: Hidden states of the first pass.

        Raises:
            RoutingError: A logit is NaN or infinite.
        """
        flat_TN = self.logits(hidden_TD)
        logits_NTE = flat_TN.unflatten(-1, (-1, self.num_experts)).transpose(0, 1)
        logits_NTE = logits_NTE.contiguous()
        probs_NTE = torch.softmax(logits_NTE, -1)
        gates_NTE = self._gates(logits_NTE, probs_NTE)
        parts = zip(gates_NTE, probs_NTE, logits_NTE, strict=True)
        found = [Routing(*part, top_k=self.config.top_k) for part in parts]
        return found if self.config.layerwise else found * self.num_sites

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Output of the classifier over the temperature, [T, E] or [T, L * E]."""
        z = hidden_TD
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Linear)
            if i:
                z = F.dropout(torch.relu(z), self.config.dropout, self.training)
            z = router_logits(z, layer.weight) + layer.bias
        require_finite(z, self.site)
        return z / self.config.temperature

    def _gates(self, logits: Tensor, probs: Tensor) -> Tensor:
        """Gates from the distribution, [..., E]."""
        config = self.config
        gates = probs
        if config.top_k is not None:
            kept, ids = logits.topk(config.top_k)
            if config.top_k_gates == "softmax":
                kept = torch.softmax(kept, -1)
            else:
                kept = probs.gather(-1, ids)
            if config.top_k_gates == "second_softmax":
                kept = torch.softmax(kept, -1)
            gates = torch.zeros_like(probs).scatter(-1, ids, kept)
        return gates if config.weight == 1.0 else gates * config.weight
