"""One expert stands for all: the given one, or the most used one of each site.

    W = s_e B_e A_e    e = argmax_e sum_t g_te over the calibration tokens

Chen et al. 2022 (task-specific expert pruning), arXiv:2206.00277, which goes on to
fine-tune; this does not. For one task, calibrate with ``tasks: [name]``.

Shape legend: see factors.py.
"""

from typing import Any

import pydantic

from molora.collapse.base import COLLAPSERS, CollapseConfig, Collapser, Experts
from molora.collapse.factors import LowRank, SiteFactors, truncate
from molora.collapse.moments import Evidence, Usage
from molora.errors import ConfigError


@COLLAPSERS.register("select", paper="arXiv:2206.00277")
class Select(Collapser):
    """One expert with gate 1: by index, or the one with the most weight at each site.

    Limitations: what the other experts learned is lost.
    """

    class Config(CollapseConfig):
        """Settings of selection."""

        expert: int | None = pydantic.Field(default=None, ge=0)
        """Index of the expert, at every site; None takes the most used of each site."""
        rank: int | None = pydantic.Field(default=None, ge=1)
        """Truncate the expert to this rank if its own is larger; None keeps its own."""

    config: Config

    def why_calibration(self) -> str | None:
        """See base class."""
        if self.config.expert is None:
            return "the most used expert is measured (or give expert=<index>)"
        return None

    def check(self, factors: Experts) -> None:
        """See base class."""
        expert = self.config.expert
        if expert is not None and 1 < factors.num_experts <= expert:
            raise ConfigError(
                f"collapse.select.expert={expert}: site {factors.path!r} has experts "
                f"0 to {factors.num_experts - 1}"
            )

    def solve(
        self, factors: SiteFactors, data: Evidence, tuned: dict[str, float]
    ) -> tuple[LowRank, dict[str, Any]]:
        """See base class."""
        expert = self.chosen(factors.num_experts, data.usage)
        delta = factors.expert(expert)
        if self.config.rank is not None and self.config.rank < delta.rank:
            delta = truncate(delta, self.config.rank)
        return delta, {"expert": expert}

    def chosen(self, num_experts: int, usage: Usage) -> int:
        """Number of the expert that stays."""
        if num_experts == 1:
            return 0
        if self.config.expert is None:
            return int(usage.mean().argmax())
        return self.config.expert
