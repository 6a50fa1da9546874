"""AdaLoRA experts: an update in the form of an SVD, whose ranks can be taken away.

    delta_e(x) = alpha / (init_r + 1e-5) * B_e diag(E_e) A_e x

A and B are drawn from N(0, 0.02^2), E is zero. The 1e-5 is that of the authors' code
and of PEFT; the scale stays when ranks are pruned (``mask_ranks``).

Reference: Zhang et al. 2023, arXiv:2303.10512, equation 3.

Shape legend: see base.py.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pydantic
from torch import Tensor

from molora.experts.base import EXPERTS
from molora.experts.diagonal import DiagonalExperts
from molora.experts.factor_config import FactorConfig, Side
from molora.experts.factors import normal
from molora.experts.peft_form import PeftForm


@EXPERTS.register("adalora", paper="arXiv:2303.10512")
class AdaLoRAExperts(DiagonalExperts):
    """E pseudo-SVDs with singular values of their own.

    Limitations: ranks are pruned by ``training.recipe`` adalora, which also adds the
    orthogonality penalty, or by hand with ``mask_ranks``.

    Args:
        config: Settings.
        in_features: I.
        out_features: O.
        generator: Source of the initial values.
        places: See ``FactorExperts``.
    """

    MIDDLE = "E"
    peft_type = "ADALORA"

    class Config(FactorConfig):
        """Settings of AdaLoRA experts."""

        TENSORS: ClassVar[Mapping[str, Side]] = {"A": "in", "B": "out", "E": "rank"}
        ZERO: ClassVar[tuple[str, ...]] = ("E",)

        kind: Literal["adalora"] = "adalora"
        """Registered name."""
        init_r: int = pydantic.Field(default=12, ge=1)
        """Rank of one expert before any is pruned."""
        lora_alpha: float = pydantic.Field(default=8.0, gt=0)
        """Numerator of the scale."""

    config: Config
    E: Tensor
    """[E or 1, r], at the layer that owns it."""

    def build(self, in_features: int, out_features: int) -> None:
        """See base class."""
        config = self.config
        r = config.init_r
        self.scale = config.lora_alpha / (r + 1e-5)
        self.add("A", (r, in_features), normal(0.02))
        self.add("B", (r, out_features), normal(0.02))
        self.add("E", (r,))

    def diagonal(self) -> Tensor:
        """See base class."""
        return self.value("E")

    def to_peft(self, expert: int) -> PeftForm:
        """See base class; pruned ranks stay as zeros."""
        A, Bt, E = (
            self.value(name)[expert % len(self.value(name))].detach()
            for name in ("A", "B", "E")
        )
        assert isinstance(self.config, AdaLoRAExperts.Config)
        r, alpha = self.config.init_r, self.config.lora_alpha
        # PEFT insists on a schedule; this one is over
        settings = {"init_r": r, "target_r": r, "lora_alpha": alpha, "total_step": 1}
        tensors = {"lora_A": A, "lora_B": Bt.t().contiguous(), "lora_E": E.unsqueeze(1)}
        return PeftForm("ADALORA", settings, tensors)

    @classmethod
    def from_peft(
        cls,
        settings: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        in_features: int,
        out_features: int,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See base class; ranks that PEFT has cut off come back as zeros."""
        r = settings["init_r"]
        block = {"kind": "adalora", "init_r": r, "lora_alpha": settings["lora_alpha"]}
        lines = {
            "A": tensors["lora_A"],
            "Bt": tensors["lora_B"].t(),
            "E": tensors["lora_E"].flatten(),
        }
        state = {}
        for name, values in lines.items():
            state[name] = values.new_zeros(1, r, *values.shape[1:])
            state[name][0, : len(values)] = values
        return block, state
