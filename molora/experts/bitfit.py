"""Bias experts: each one shifts the layer's output.

    y = W x + b + sum_e g_e v_e

Reference: Ben Zaken et al. 2021, arXiv:2106.10199 (BitFit). BitFit trains the bias
itself, b_e = b + v_e, which is the same function and the same gradient; the shift form
keeps the base frozen and lets experts be mixed. A layer that has no bias, such as those
of Llama, gets one (PEFT's BEFT). BitFit's variant that trains a part of the biases, for
example those of queries, is ``target_modules``.

All shifts start at 0, where the update is zero.

Shape legend: see base.py.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from molora.experts.base import EXPERTS, AbstractExperts, ExpertsConfig
from molora.experts.peft_form import PeftForm


@EXPERTS.register("bitfit", paper="arXiv:2106.10199")
class BitFitExperts(AbstractExperts):
    """E shifts of the layer's output.

    Limitations: biases of modules that are no linear layer, such as norms, are not
    trained. Merging into a layer without a bias gives it one; whoever saves the merged
    model has to load it into a class that has that bias too (for Llama
    ``attention_bias`` and ``mlp_bias``).

    Args:
        config: Settings.
        in_features: I.
        out_features: O.
        generator: Not drawn from: every shift starts at 0.
    """

    class Config(ExpertsConfig):
        """Settings of bias experts."""

        kind: Literal["bitfit"] = "bitfit"
        """Registered name."""

    adds = True
    peft_type = "BEFT"

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
        self.shifts = nn.Parameter(torch.zeros(self.num_experts, out_features))

    def forward(
        self,
        x: Tensor,
        gates: Tensor | None,
        base: Tensor,
        top_k: int | None = None,
    ) -> Tensor:
        """See base class."""
        shifts_EO = self.shifts
        shift = shifts_EO if gates is None else gates.to(shifts_EO.dtype) @ shifts_EO
        return (base + shift).to(base.dtype)

    def delta_weight(self, expert: int, weight: Tensor) -> Tensor:
        """See base class; the weight is left as it is."""
        return torch.zeros_like(weight)

    def delta_bias(self, expert: int, bias: Tensor) -> Tensor | None:
        """See base class."""
        return self.shifts[expert].detach()

    def count(self) -> int:
        """See base class: E O."""
        return self.shifts.numel()

    def to_peft(self, expert: int) -> PeftForm:
        """See base class. PEFT merges it only where the layer has a bias."""
        shift_1O = self.shifts[expert : expert + 1].detach().clone()
        return PeftForm("BEFT", {}, {"beft_bias": shift_1O})

    @classmethod
    def from_peft(
        cls,
        settings: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        in_features: int,
        out_features: int,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See base class."""
        return {"kind": "bitfit"}, {"shifts": tensors["beft_bias"].reshape(1, -1)}
