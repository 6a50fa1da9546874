"""LD-MoLE's penalties on lambda, which sets how many experts a token uses.

    experts: mean relu(low - lambda),  low = 1 - (u_1 + ... + u_k) + k u_{k+1}
    sparse:  mean (1 - lambda)

u are the logits sorted from the largest, without a gradient. With lambda at least low,
a token uses at most k experts: sparsegen gives u_{k+1} no weight. Both means are over
real tokens, where the authors' code counts padding.

Reference: Zhuang et al. 2025 (LD-MoLE), arXiv:2509.25684, section 3; their k is 2.
Shape legend: see base.py.
"""

from typing import Literal

import pydantic
import torch
from torch import Tensor

from molora.context import TokenRows
from molora.routers.balance import (
    OBJECTIVES,
    Objective,
    ObjectiveConfig,
    mean_over_tokens,
)
from molora.routers.base import AbstractRouter, Routing


@OBJECTIVES.register("lambda", paper="arXiv:2509.25684")
class LambdaPenalty(Objective):
    """Keeps the number of experts per token at k or below (router ldmole).

    Limitations: not scaled to 1 at uniform routing, where ``experts`` costs
    relu(1 - lambda) and ``sparse`` 1 - lambda. A token that obeys has no gradient.
    """

    class Config(ObjectiveConfig):
        """Settings of the penalty on lambda."""

        form: Literal["experts", "sparse"] = "experts"
        """Only tokens with too many experts, or all tokens."""
        max_experts: int = pydantic.Field(default=2, ge=1)
        """k, below num_experts; read by ``experts`` alone."""

        @pydantic.model_validator(mode="after")
        def _k_is_read(self) -> "LambdaPenalty.Config":
            if self.form == "sparse" and "max_experts" in self.model_fields_set:
                raise ValueError("max_experts is read with form: experts only; drop it")
            return self

    config: Config

    @classmethod
    def check(
        cls, config: ObjectiveConfig, router: type[AbstractRouter], num_experts: int
    ) -> str | None:
        """See base class."""
        assert isinstance(config, cls.Config)
        if not router.has_sparsity:
            return (
                "lambda is what router.kind ldmole sets the number of experts by, and "
                "this one has none; drop the objective"
            )
        if config.form == "experts" and config.max_experts >= num_experts:
            return (
                f"max_experts={config.max_experts} is not below "
                f"num_experts={num_experts}, so every token obeys; lower it"
            )
        return super().check(config, router, num_experts)

    def __call__(
        self,
        routing: Routing,
        weight_T: Tensor | None,
        rows: TokenRows | None = None,
    ) -> Tensor:
        """See base class."""
        lambda_T = routing.sparsity
        assert lambda_T is not None
        if self.config.form == "sparse":
            return mean_over_tokens(1 - lambda_T, weight_T)
        k = self.config.max_experts
        top_TK = routing.logits.detach().topk(k + 1, -1).values
        low_T = 1 - top_TK[:, :k].sum(-1) + k * top_TK[:, k]
        return mean_over_tokens(torch.relu(low_T - lambda_T), weight_T)
