"""Truncated mean-gate update: the nearest update of rank r to sum_e g_e s_e B_e A_e.

The singular values come from the QR of the stacked factors and the SVD of the R x R
core between them (factors.py); g are the mean gates over the calibration tokens, or
even gates without any. Eckart and Young 1936, doi:10.1007/BF02288367.

Shape legend: see factors.py.
"""

from typing import Any, Self

import pydantic

from molora.collapse.base import COLLAPSERS, CollapseConfig, Collapser
from molora.collapse.factors import LowRank, SiteFactors, truncate
from molora.collapse.moments import Evidence


@COLLAPSERS.register("svd", paper="doi:10.1007/BF02288367")
class Svd(Collapser):
    """Mean-gate update, truncated to a rank or to a share of its energy.

    With one expert it lowers the rank of an ordinary adapter. Limitations: near in the
    weights, whatever the layer's inputs are; see ``calibrated``.
    """

    class Config(CollapseConfig):
        """Settings of the truncated mean-gate update."""

        rank: int = pydantic.Field(default=16, ge=1)
        """Rank of the result, at most; a site that holds less keeps what it holds."""
        energy: float | None = pydantic.Field(default=None, gt=0, le=1)
        """Instead of a rank: share of the squared singular values to keep, per site."""

        @pydantic.model_validator(mode="after")
        def _one_of_both(self) -> Self:
            if self.energy is not None and "rank" in self.model_fields_set:
                raise ValueError("give rank or energy, not both")
            return self

    config: Config
    reduces_rank = True

    def solve(
        self, factors: SiteFactors, data: Evidence, tuned: dict[str, float]
    ) -> tuple[LowRank, dict[str, Any]]:
        """See base class."""
        rank = None if self.config.energy is not None else self.config.rank
        mean = factors.combine(data.usage.mean())
        return truncate(mean, rank, self.config.energy), {}
