"""ALoRA experts: LoRA with a fixed gate of 0 or 1 at every rank.

    delta_e(x) = alpha / r * B_e diag(gates_e) A_e x

The gates are not trained: they are set between phases of training, by what an ablation
of each rank costs. All are 1 at the start; A and B as in LoRA.

Reference: Liu et al. 2024, arXiv:2403.16187, section 3.

Shape legend: see base.py.
"""

from typing import Literal

import pydantic
import torch
from torch import Tensor, nn

from molora.experts.base import EXPERTS
from molora.experts.diagonal import DiagonalExperts
from molora.experts.factor_config import FactorConfig
from molora.experts.factors import uniform


@EXPERTS.register("alora", paper="arXiv:2403.16187")
class ALoRAExperts(DiagonalExperts):
    """E pairs of factors whose ranks are switched on and off.

    Limitations: a layer never has more than r ranks; ``training.recipe`` alora scores
    them and hands them on, ``mask_ranks`` sets the gates by hand.

    Args:
        config: Settings.
        in_features: I.
        out_features: O.
        generator: Source of the initial values.
        places: See ``FactorExperts``.
    """

    MIDDLE = "gates"

    class Config(FactorConfig):
        """Settings of ALoRA experts."""

        kind: Literal["alora"] = "alora"
        """Registered name."""
        r: int = pydantic.Field(default=8, ge=1)
        """Rank of one expert with all gates open."""
        lora_alpha: float = pydantic.Field(default=16.0, gt=0)
        """Numerator of the scale lora_alpha / r, which the gates do not change."""

    config: Config

    def build(self, in_features: int, out_features: int) -> None:
        """See base class."""
        config = self.config
        r = config.r
        self.scale = config.lora_alpha / r
        self.add("A", (r, in_features), uniform(self.features("A")))
        self.add("B", (r, out_features))
        self.gates = nn.Parameter(torch.ones(self.num_experts, r))
        self.frozen = (*self.frozen, "gates")

    def diagonal(self) -> Tensor:
        """See base class."""
        return self.gates

    @torch.no_grad()
    def mask_ranks(self, keep: Tensor) -> None:
        """Open the gates of the ranks that are kept, and close the others.

        Args:
            keep: Bool [E, r].

        Raises:
            WrapError: It has another shape or is not bool.
        """
        self._middle(keep).copy_(keep)
