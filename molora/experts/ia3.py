"""(IA)^3 experts: one learned vector each, by which the layer's values are multiplied.

    output:  y = (W x + b) * (1 + sum_e g_e (l_e - 1))
    input:   y = W (x * (1 + sum_e g_e (l_e - 1))) + b

One expert with gate 1 is (IA)^3 (Liu et al. 2022, arXiv:2205.05638, section 3.3), as in
PEFT: ``output`` for keys and values, ``input`` for the second linear of the MLP. Behind
a soft router it is MoV (Zadouri et al. 2023, arXiv:2309.05444, equation 1), whose
gates sum to one, so that 1 + sum_e g_e (l_e - 1) = sum_e g_e l_e. Where they do not,
what is missing falls to the base.

All vectors start at 1, where the update is zero.

Shape legend: see base.py; n features that are scaled (I or O).
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from molora.errors import WrapError
from molora.experts.base import EXPERTS, AbstractExperts, ExpertsConfig
from molora.experts.peft_form import PeftForm


@EXPERTS.register("ia3", paper="arXiv:2205.05638")
class IA3Experts(AbstractExperts):
    """E vectors that scale the values of the layer (MoV behind a soft router).

    Limitations: the update diag(l - 1) W has full rank, so a mixture of vectors has no
    low-rank collapse, and a LoRA of it is an approximation; a single vector merges
    exactly. The router reads the layer's input; MoV's own one reads the keys and
    values, head by head.

    Args:
        config: Settings.
        in_features: I.
        out_features: O.
        generator: Not drawn from: every vector starts at 1.
    """

    class Config(ExpertsConfig):
        """Settings of (IA)^3 experts."""

        kind: Literal["ia3"] = "ia3"
        """Registered name."""
        position: Literal["output", "input"] = "output"
        """Values that are scaled: the layer's output, or its input (PEFT's
        feedforward_modules)."""

    peft_type = "IA3"

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
        self.num_experts = config.num_experts
        self.on_input = config.position == "input"
        wide = in_features if self.on_input else out_features
        self.vectors = nn.Parameter(torch.ones(self.num_experts, wide))

    def edit_input(
        self, x: Tensor, gates: Tensor | None, top_k: int | None = None
    ) -> Tensor:
        """See base class."""
        return self._scaled(x, gates) if self.on_input else x

    def forward(
        self,
        x: Tensor,
        gates: Tensor | None,
        base: Tensor,
        top_k: int | None = None,
    ) -> Tensor:
        """See base class."""
        return base if self.on_input else self._scaled(base, gates)

    def _scaled(self, values_Tn: Tensor, gates: Tensor | None) -> Tensor:
        """Values times 1 + sum_e g_e (l_e - 1), in their dtype."""
        change_En = self.vectors - 1
        change = change_En if gates is None else gates.to(change_En.dtype) @ change_En
        return (values_Tn + values_Tn * change).to(values_Tn.dtype)

    def delta_weight(self, expert: int, weight: Tensor) -> Tensor:
        """See base class."""
        change_n = (self.vectors[expert] - 1).detach()
        return weight * (change_n if self.on_input else change_n.unsqueeze(1))

    def delta_bias(self, expert: int, bias: Tensor) -> Tensor | None:
        """See base class; the output is scaled with its bias."""
        if self.on_input:
            return None
        return bias * (self.vectors[expert] - 1).detach()

    def count(self) -> int:
        """See base class."""
        return self.vectors.numel()

    def to_peft(self, expert: int) -> PeftForm:
        """See base class."""
        vector_n = self.vectors[expert].detach().clone()
        shape = (1, -1) if self.on_input else (-1, 1)
        return PeftForm(
            "IA3",
            {"feedforward_modules": self.on_input},
            {"ia3_l": vector_n.view(shape)},
        )

    @classmethod
    def from_peft(
        cls,
        settings: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        in_features: int,
        out_features: int,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See base class; ``feedforward_modules`` says whether the layer is one."""
        on_input = bool(settings.get("feedforward_modules"))
        shape = (1, in_features) if on_input else (out_features, 1)
        vector = tensors["ia3_l"]
        if tuple(vector.shape) != shape:
            raise WrapError(
                f"ia3_l is {list(vector.shape)}, but a layer of {in_features} to "
                f"{out_features} features has {list(shape)}"
            )
        position = "input" if on_input else "output"
        return {"kind": "ia3", "position": position}, {"vectors": vector.view(1, -1)}
