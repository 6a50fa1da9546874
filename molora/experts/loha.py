"""LoHa experts: the Hadamard product of two low-rank products.

    Delta W_e = s (w1_a w1_b) * (w2_a w2_b)    s = alpha / r, elementwise *

of rank up to r^2 with 2 r (I + O) parameters (FedPara, Hyeon-Woo et al. 2021,
arXiv:2108.06098, proposition 1; as LyCORIS and PEFT have it). It is a product of rank
r^2 with row-wise Khatri-Rao factors, and so runs through the low-rank op:

    A[(p, q), i] = w1_b[p, i] w2_b[q, i]    B[o, (p, q)] = w1_a[o, p] w2_a[o, q]

At the start one of the four factors is zero: w2_b under PEFT's initialisation, where
the others are uniform as Kaiming has it with a = sqrt(5); w2_a under that of LyCORIS,
with w1_b, w2_b ~ N(0, 1) and w1_a ~ N(0, 0.1^2).

Shape legend: see base.py; p, q each run over r.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor, nn

from molora.errors import WrapError
from molora.experts.base import EXPERTS, BilinearExperts, ExpertsConfig
from molora.experts.peft_form import PeftForm

_NAMES = ("w1_a", "w1_b", "w2_a", "w2_b")


@EXPERTS.register("loha", paper="arXiv:2108.06098")
class LoHaExperts(BilinearExperts):
    """E Hadamard products of two low-rank products.

    Limitations: each expert costs what a LoRA of rank r^2 costs, and its factors
    [r^2, I] and [r^2, O] are held in training. PEFT's rank_dropout and module_dropout
    are not there.

    Args:
        config: Settings.
        in_features: I.
        out_features: O.
        generator: Source of the initial values.
    """

    class Config(ExpertsConfig):
        """Settings of LoHa experts."""

        kind: Literal["loha"] = "loha"
        """Registered name."""
        r: int = pydantic.Field(default=8, ge=1)
        """Rank of each of the two products."""
        alpha: float = pydantic.Field(default=8.0, gt=0)
        """Numerator of the scale."""
        use_rslora: bool = False
        """Divide alpha by sqrt(r) instead of r (LyCORIS: rs_lora)."""
        init_weights: Literal[True, "lycoris"] = True
        """Initial values of PEFT (true) or of LyCORIS."""

    peft_type = "LOHA"

    def __init__(
        self,
        config: Config,
        *,
        in_features: int,
        out_features: int,
        generator: torch.Generator,
    ):
        super().__init__()
        self.config = config
        self.num_experts = E = config.num_experts
        r = config.r
        self.scale = config.alpha / (math.sqrt(r) if config.use_rslora else r)
        self.w1_a = nn.Parameter(torch.empty(E, out_features, r))
        self.w1_b = nn.Parameter(torch.empty(E, r, in_features))
        self.w2_a = nn.Parameter(torch.empty(E, out_features, r))
        self.w2_b = nn.Parameter(torch.empty(E, r, in_features))
        with torch.no_grad():
            if config.init_weights == "lycoris":
                self.w1_b.normal_(generator=generator)
                self.w1_a.normal_(std=0.1, generator=generator)
                self.w2_b.normal_(generator=generator)
                self.w2_a.zero_()
            else:
                for factor in (self.w1_a, self.w1_b, self.w2_a):
                    bound = 1 / math.sqrt(factor.shape[-1])
                    factor.uniform_(-bound, bound, generator=generator)
                self.w2_b.zero_()

    def factors(self) -> tuple[Tensor, Tensor, float | Tensor]:
        """See base class."""
        A = self.w1_b.unsqueeze(2) * self.w2_b.unsqueeze(1)
        B = self.w1_a.unsqueeze(3) * self.w2_a.unsqueeze(2)
        return A.flatten(1, 2), B.flatten(2).transpose(1, 2), self.scale

    @torch.no_grad()
    def delta_weight(self, expert: int, weight: Tensor | None = None) -> Tensor:
        """See base class; two small products instead of one of rank r^2."""
        wide = torch.promote_types(self.w1_a.dtype, torch.float32)
        a1, b1, a2, b2 = (getattr(self, name)[expert].to(wide) for name in _NAMES)
        delta_OI: Tensor = self.scale * (a1 @ b1) * (a2 @ b2)
        return delta_OI

    def count(self) -> int:
        """See base class."""
        return sum(factor.numel() for factor in self.parameters())

    def to_peft(self, expert: int) -> PeftForm:
        """See base class; a scale of its own is written into alpha."""
        r = self.config.r
        settings = {"r": r, "alpha": self.scale * r, "use_effective_conv2d": False}
        tensors = {
            f"hada_{name}": getattr(self, name)[expert].detach().clone()
            for name in _NAMES
        }
        return PeftForm("LOHA", settings, tensors)

    @classmethod
    def from_peft(
        cls,
        settings: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        in_features: int,
        out_features: int,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See base class."""
        strange = sorted(set(tensors) - {f"hada_{name}" for name in _NAMES})
        if strange:
            raise WrapError(
                f"{', '.join(strange)}: a LoHa of a linear layer holds hada_w1_a, "
                "hada_w1_b, hada_w2_a and hada_w2_b alone"
            )
        block = {
            "kind": "loha",
            "num_experts": 1,
            "r": int(settings["r"]),
            "alpha": float(settings["alpha"]),
        }
        return block, {name: tensors[f"hada_{name}"].unsqueeze(0) for name in _NAMES}
