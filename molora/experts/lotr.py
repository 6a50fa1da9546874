"""LoTR experts: a small core each, between factors of all layers of one type.

    delta_e(x) = alpha / r * U G_e V x    V = A, U = B

so that the updates of a type form a tensor train. U and V are drawn from N(0, 1) and
trained, G is zero.

Reference: Bershatsky et al. 2024, arXiv:2402.01376, equation 5.

Shape legend: see base.py.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import pydantic
from torch import Tensor

from molora.experts.base import EXPERTS
from molora.experts.factor_config import FactorConfig, Side
from molora.experts.factors import FactorExperts, normal


@EXPERTS.register("lotr", paper="arXiv:2402.01376")
class LoTRExperts(FactorExperts):
    """E cores of r times r between shared factors.

    Args:
        config: Settings.
        in_features: I.
        out_features: O.
        generator: Source of the initial values.
        places: See ``FactorExperts``.
    """

    class Config(FactorConfig):
        """Settings of LoTR experts."""

        TENSORS: ClassVar[Mapping[str, Side]] = {"A": "in", "B": "out", "G": "rank"}
        ZERO: ClassVar[tuple[str, ...]] = ("G",)

        kind: Literal["lotr"] = "lotr"
        """Registered name."""
        r: int = pydantic.Field(default=8, ge=1)
        """Rank of one expert."""
        lora_alpha: float = pydantic.Field(default=16.0, gt=0)
        """Numerator of the scale lora_alpha / r."""
        shared: list[str] | dict[str, str] = {"A": "type", "B": "type"}
        """See base class; all layers of a type share U and V."""

    config: Config

    def build(self, in_features: int, out_features: int) -> None:
        """See base class."""
        config = self.config
        r = config.r
        self.scale = config.lora_alpha / r
        self.add("A", (r, in_features), normal(1.0))
        self.add("B", (r, out_features), normal(1.0))
        self.add("G", (r, r))

    def factors(self) -> tuple[Tensor, Tensor, float | Tensor]:
        """See base class; the core stands in B, or in A where only B is shared."""
        A, Bt, G = (self.value(name) for name in ("A", "B", "G"))
        if len(A) > len(Bt):
            return G @ A, Bt, self.scale
        return A, G.mT @ Bt, self.scale
