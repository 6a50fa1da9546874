"""LoRA experts: delta_e(x) = scale_e * B_e A_e x, zero at initialisation.

    scale_e = lora_alpha_e / r_e          (Hu et al. 2021, arXiv:2106.09685, 4.1)
    scale_e = lora_alpha_e / sqrt(r_e)    (Kalajdzievski 2023, arXiv:2312.03732)

A is drawn per expert from U(-1/sqrt(I), 1/sqrt(I)), which is what Kaiming
initialisation with a = sqrt(5) gives one expert; B is zero. ``shared: [A]`` keeps one A
for all experts (HydraLoRA, Tian et al. 2024, arXiv:2404.19245), ``shared: [B]`` one B.

Experts of different rank are stored padded to the largest: the padding rows of A and B
are zero, and stay zero under any optimiser whose update of a zero parameter with a zero
gradient is zero, because each one's gradient is a multiple of the other.

Shape legend: see base.py.
"""

import math
from typing import Annotated, Literal, Self

import pydantic
import torch
from torch import Tensor, nn

from molora.experts.base import EXPERTS, BilinearExperts, ExpertsConfig

Rank = Annotated[int, pydantic.Field(ge=1)]
Alpha = Annotated[float, pydantic.Field(gt=0)]


@EXPERTS.register("lora", paper="arXiv:2106.09685")
class LoRAExperts(BilinearExperts):
    """E pairs of low-rank factors with per-expert ranks and scales.

    Args:
        config: Settings.
        in_features: I.
        out_features: O.
        generator: Source of the initial values of A.
    """

    class Config(ExpertsConfig):
        """Settings of LoRA experts."""

        kind: Literal["lora"] = "lora"
        """Registered name."""
        r: Rank | list[Rank] = 8
        """Rank of one expert, or a list with the rank of each."""
        lora_alpha: Alpha | list[Alpha] = 16.0
        """Numerator of the scale, or a list with that of each expert."""
        use_rslora: bool = False
        """Divide lora_alpha by sqrt(r) instead of r."""
        lora_dropout: float = pydantic.Field(default=0.0, ge=0, lt=1)
        """Dropout on the bank's input in training, one mask for all experts."""
        shared: list[Literal["A", "B"]] = []
        """Factors that all experts share: [], [A] or [B]."""

        @pydantic.model_validator(mode="after")
        def _lists_fit(self) -> Self:
            for name in ("r", "lora_alpha"):
                value = getattr(self, name)
                if isinstance(value, list) and len(value) != self.num_experts:
                    raise ValueError(
                        f"{name} lists {len(value)} values for "
                        f"num_experts={self.num_experts}"
                    )
            if len(self.shared) > 1:
                raise ValueError(
                    "shared: experts that share A and B would all be the same expert; "
                    "share one of them"
                )
            if self.shared and len(set(self.ranks())) > 1:
                raise ValueError("shared: experts that share a factor need equal ranks")
            return self

        def ranks(self) -> list[int]:
            """Rank of each expert."""
            return self.r if isinstance(self.r, list) else [self.r] * self.num_experts

        def scales(self) -> list[float]:
            """Scale of each expert."""
            alphas = self.lora_alpha
            if not isinstance(alphas, list):
                alphas = [alphas] * self.num_experts
            power = 0.5 if self.use_rslora else 1.0
            return [a / r**power for a, r in zip(alphas, self.ranks(), strict=True)]

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
        self.lora_dropout = config.lora_dropout
        self.ranks = config.ranks()
        a_stack = 1 if "A" in config.shared else config.num_experts
        b_stack = 1 if "B" in config.shared else config.num_experts
        widest = max(self.ranks)
        bound = 1 / math.sqrt(in_features)
        A = torch.empty(a_stack, widest, in_features)
        A.uniform_(-bound, bound, generator=generator)
        for expert, rank in enumerate(self.ranks[:a_stack]):
            A[expert, rank:] = 0
        self.A = nn.Parameter(A)
        self.Bt = nn.Parameter(torch.zeros(b_stack, widest, out_features))
        scales = config.scales()
        self.scale: float | None = scales[0] if len(set(scales)) == 1 else None
        self.scale_E = torch.tensor(scales)

    def factors(self) -> tuple[Tensor, Tensor, float | Tensor]:
        """See base class."""
        if self.scale is not None:
            return self.A, self.Bt, self.scale
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        if self.scale_E.dtype != dtype or self.scale_E.device != self.A.device:
            # no buffer: casting the model to half precision would round the scales
            self.scale_E = torch.tensor(
                self.config.scales(), dtype=dtype, device=self.A.device
            )
        return self.A, self.Bt, self.scale_E

    def count(self) -> int:
        """See base class; padding rows do not count."""
        a_rows = sum(self.ranks[: self.A.shape[0]])
        b_rows = sum(self.ranks[: self.Bt.shape[0]])
        return a_rows * self.A.shape[-1] + b_rows * self.Bt.shape[-1]
