"""SoRA experts: LoRA with a gate at every rank, which a proximal step sets to zero.

    delta_e(x) = alpha / r * B_e (gate_e * A_e x)

A as in LoRA, B zero, the gates drawn from N(0, 1) as in the authors' code. Ranks whose
gate is zero add nothing: exports and collapse leave them out.

Reference: Ding et al. 2023, arXiv:2311.11696, equation 6.

Shape legend: see base.py.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import pydantic
from torch import Tensor

from molora.experts.base import EXPERTS
from molora.experts.diagonal import DiagonalExperts
from molora.experts.factor_config import FactorConfig, Side
from molora.experts.factors import normal, uniform


@EXPERTS.register("sora", paper="arXiv:2311.11696")
class SoRAExperts(DiagonalExperts):
    """E pairs of factors with a sparse gate between them.

    Limitations: no gate becomes zero by itself: the proximal step and the L1 term are
    ``training.recipe`` sora; ``mask_ranks`` prunes by hand.

    Args:
        config: Settings.
        in_features: I.
        out_features: O.
        generator: Source of the initial values.
        places: See ``FactorExperts``.
    """

    MIDDLE = "gate"

    class Config(FactorConfig):
        """Settings of SoRA experts."""

        TENSORS: ClassVar[Mapping[str, Side]] = {"A": "in", "B": "out", "gate": "rank"}

        kind: Literal["sora"] = "sora"
        """Registered name."""
        r: int = pydantic.Field(default=8, ge=1)
        """Largest rank of one expert."""
        lora_alpha: float = pydantic.Field(default=16.0, gt=0)
        """Numerator of the scale lora_alpha / r."""

    config: Config

    def build(self, in_features: int, out_features: int) -> None:
        """See base class."""
        config = self.config
        r = config.r
        self.scale = config.lora_alpha / r
        self.add("A", (r, in_features), uniform(self.features("A")))
        self.add("B", (r, out_features))
        self.add("gate", (r,), normal(1.0))

    def diagonal(self) -> Tensor:
        """See base class."""
        return self.value("gate")
