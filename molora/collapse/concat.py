"""Concatenation: the mean-gate update, exactly, at the rank of all experts together.

    A = [A_1; ...; A_E]    B = [g_1 s_1 B_1, ..., g_E s_E B_E]    rank R = sum_e r_e

with g the mean gates over the calibration tokens, or even gates without any. The
stacked form is that of Wang et al. 2024 (FLoRA), arXiv:2409.05976.

Shape legend: see factors.py.
"""

from collections.abc import Mapping
from typing import Any

import pydantic

from molora.collapse.base import COLLAPSERS, CollapseConfig, Collapser
from molora.collapse.factors import LowRank, SiteFactors
from molora.collapse.moments import Evidence
from molora.errors import ConfigError


@COLLAPSERS.register("concat", paper="arXiv:2409.05976")
class Concat(Collapser):
    """Mean-gate update in concatenated form, not truncated.

    Where the experts share A or B, the rank is that of one expert. Limitations: equals
    the mixture only where the gates do not depend on the token.
    """

    class Config(CollapseConfig):
        """Settings of concatenation."""

        @pydantic.model_validator(mode="before")
        @classmethod
        def _has_no_rank(cls, raw: Any) -> Any:
            if isinstance(raw, Mapping) and "rank" in raw:
                raise ConfigError(
                    "rank: concat keeps the rank R of all experts together and takes "
                    "no other; drop rank, or use svd to truncate"
                )
            return raw

    def solve(
        self, factors: SiteFactors, data: Evidence, tuned: dict[str, float]
    ) -> tuple[LowRank, dict[str, Any]]:
        """See base class."""
        return factors.combine(data.usage.mean()), {}
