"""Weighted sum of the experts' updates under given weights, truncated.

    W = sum_e w_e s_e B_e A_e, then the best approximation of rank r

The sum is of updates, never of A and B apart: the product of averaged factors holds
cross terms B_i A_j that no expert has. Ilharco et al. 2022 (task arithmetic),
arXiv:2212.04089.

Shape legend: see factors.py.
"""

from typing import Any

import pydantic
import torch
from torch import Tensor

from molora.collapse.base import COLLAPSERS, CollapseConfig, Collapser, Experts
from molora.collapse.factors import LowRank, SiteFactors, truncate
from molora.collapse.moments import Evidence
from molora.errors import ConfigError


@COLLAPSERS.register("linear", paper="arXiv:2212.04089")
class Linear(Collapser):
    """Sum of updates under weights that you choose, truncated to a rank.

    Limitations: the same weights at every site; ``svd`` measures them instead.
    """

    class Config(CollapseConfig):
        """Settings of the weighted sum."""

        rank: int = pydantic.Field(default=16, ge=1)
        """Rank of the result, at most; a site that holds less keeps what it holds."""
        weights: list[float] | dict[str | int, float] | None = None
        """One per expert; or one per task, which multiplies the mean gates on that
        task's calibration rows; None weighs all experts the same, and vectors of
        (IA)^3 by their mean gates where these are measured."""

    config: Config

    def why_calibration(self) -> str | None:
        """See base class."""
        if isinstance(self.config.weights, dict):
            return "weights per task multiply that task's measured mean gates"
        return None

    def check(self, factors: Experts) -> None:
        """See base class."""
        weights = self.config.weights
        if isinstance(weights, list) and len(weights) != factors.num_experts:
            raise ConfigError(
                f"collapse.linear.weights: {len(weights)} weights for "
                f"{factors.num_experts} experts at site {factors.path!r}"
            )

    def solve(
        self, factors: SiteFactors, data: Evidence, tuned: dict[str, float]
    ) -> tuple[LowRank, dict[str, Any]]:
        """See base class."""
        weights_E = self.weights(factors, data)
        delta = truncate(factors.combine(weights_E), self.config.rank)
        return delta, {"weights": weights_E.tolist()}

    def weights(self, factors: Experts, data: Evidence) -> Tensor:
        """Weight of each expert of a site, [E] float64."""
        weights = self.config.weights
        if weights is None:
            return factors.even_E
        if isinstance(weights, list):
            return torch.tensor(weights).to(factors.even_E)
        total = torch.zeros_like(factors.even_E)
        for task, weight in weights.items():
            if task not in data.usage.tokens:
                known = sorted(str(name) for name in data.usage.tokens)
                raise ConfigError(
                    f"collapse.linear.weights: no calibration row of task {task!r}; "
                    f"the rows have {', '.join(known)}"
                )
            total += weight * data.usage.mean([task])
        return total
