"""HMoRA's objective: a generalised Jensen-Shannon divergence between two bounds.

    GJS(q) = relu((b - c) ln E - min(H(mean q), b ln E) + mean max(H(q), c ln E)) / ln E
    H(q) = -sum_e q_e ln(q_e + 1e-9),    b gamma_balance, c gamma_certain

The means are over real tokens. Where rows are routed too, GJS of their distributions,
each row counted once, is added. With b = 1 and c = 0 tokens routed uniformly cost 1.

Reference: Liao et al. 2025 (HMoRA), openreview:lTkHiXeuDl, ICLR 2025; constants as in
the authors' code.
Shape legend: see base.py; Q tokens or rows.
"""

import math
from typing import Self

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
from molora.routers.base import Routing

_EPSILON = 1e-9
"""Added within logarithms, as in the authors' code."""


def entropy(q: Tensor) -> Tensor:
    """Shannon's entropy in nats over the last dimension; near 0 where all is 0."""
    return -(q * (q + _EPSILON).log()).sum(-1)


@OBJECTIVES.register("gjs", paper="openreview:lTkHiXeuDl")
class GJSDivergence(Objective):
    """Tokens sure of different experts, up to bounds on balance and certainty.

    Beyond the bounds nothing more is asked, so neither drowns the other.

    Limitations: the means are of one forward, so with a single row the task router of
    ``hmora`` learns from its bounds alone; the authors gather the rows of an optimizer
    step. One pair of bounds serves tokens and rows, which the authors set apart.
    """

    class Config(ObjectiveConfig):
        """Settings of the GJS objective."""

        gamma_balance: float = pydantic.Field(default=1.0, gt=0, le=1)
        """b, share of ln E that the entropy of the mean need not exceed."""
        gamma_certain: float = pydantic.Field(default=0.0, ge=0, lt=1)
        """c, share of ln E that the entropy of a token need not fall below."""

        @pydantic.model_validator(mode="after")
        def _bounds_are_apart(self) -> Self:
            if self.gamma_certain >= self.gamma_balance:
                raise ValueError(
                    f"gamma_certain={self.gamma_certain} must be below "
                    f"gamma_balance={self.gamma_balance}, or nothing is asked"
                )
            return self

    config: Config

    def __call__(
        self,
        routing: Routing,
        weight_T: Tensor | None,
        rows: TokenRows | None = None,
    ) -> Tensor:
        """See base class."""
        if routing.rows is None:
            return self.divergence(routing.probs, weight_T)
        tokens_TE = torch.softmax(routing.logits, -1)
        return self.divergence(tokens_TE, weight_T) + self.divergence(
            routing.rows, None
        )

    def divergence(self, q_QE: Tensor, weight_Q: Tensor | None) -> Tensor:
        """GJS as defined at the top of this file.

        Args:
            q_QE: Distributions.
            weight_Q: 1 where one counts, else 0; None when all do.

        Returns:
            Scalar, zero with a graph when none counts.
        """
        most = math.log(q_QE.shape[-1])
        high, low = self.config.gamma_balance * most, self.config.gamma_certain * most
        mean_E = mean_over_tokens(q_QE, weight_Q)
        each = mean_over_tokens(entropy(q_QE).clamp(min=low), weight_Q)
        is_any = (mean_E.detach().sum() > 0).to(q_QE.dtype)
        gained = entropy(mean_E).clamp(max=high) - each
        return torch.relu((high - low) * is_any - gained) / most
