"""MELoRA experts: n small LoRAs side by side, each on its part of input and output.

    delta_e(x)[part i] = alpha_i / r_i * B_e,i A_e,i x[part i]    i = 1..n

which is block-diagonal and has rank sum_i r_i. Every part goes through the kernels by
itself; zeros are never made, except in ``factors``, for what reads one pair of factors.

A is drawn from U(-1/sqrt(I/n), 1/sqrt(I/n)), B is zero.

Reference: Ren et al. 2024, arXiv:2402.17263, equation 3.

Shape legend: see base.py; n parts   R sum of their ranks.
"""

from typing import Annotated, Literal, Self

import pydantic
import torch
from torch import Tensor

from molora.errors import WrapError
from molora.experts.base import EXPERTS, dropout_seed
from molora.experts.factor_config import FactorConfig
from molora.experts.factors import FactorExperts, uniform
from molora.kernels import Layer, lowrank_mixture

Rank = Annotated[int, pydantic.Field(ge=1)]
Alpha = Annotated[float, pydantic.Field(gt=0)]


@EXPERTS.register("melora", paper="arXiv:2402.17263")
class MELoRAExperts(FactorExperts):
    """E block-diagonal pairs of factors.

    Limitations: for collapse and export every expert has rank R, with zeros.

    Args:
        config: Settings.
        in_features: I.
        out_features: O.
        generator: Source of the initial values.
        places: See ``FactorExperts``.

    Raises:
        WrapError: The number of parts does not divide I and O.
    """

    class Config(FactorConfig):
        """Settings of MELoRA experts."""

        kind: Literal["melora"] = "melora"
        """Registered name."""
        num_parts: int = pydantic.Field(default=2, ge=1)
        """n, small LoRAs of one expert."""
        r: Rank | list[Rank] = 8
        """Rank of one part, or a list with the rank of each."""
        lora_alpha: Alpha | list[Alpha] = 16.0
        """Numerator of a part's scale lora_alpha / r, or a list with that of each."""

        @pydantic.model_validator(mode="after")
        def _lists_fit(self) -> Self:
            for name in ("r", "lora_alpha"):
                value = getattr(self, name)
                if isinstance(value, list) and len(value) != self.num_parts:
                    raise ValueError(
                        f"{name} lists {len(value)} values for "
                        f"num_parts={self.num_parts}"
                    )
            return self

        def ranks(self) -> list[int]:
            """Rank of each part."""
            return self.r if isinstance(self.r, list) else [self.r] * self.num_parts

        def scales(self) -> list[float]:
            """Scale of each part."""
            alphas = self.lora_alpha
            if not isinstance(alphas, list):
                alphas = [alphas] * self.num_parts
            return [a / r for a, r in zip(alphas, self.ranks(), strict=True)]

    config: Config

    def build(self, in_features: int, out_features: int) -> None:
        """See base class."""
        config = self.config
        n, self.ranks = config.num_parts, config.ranks()
        self.part_scales = config.scales()
        for side, wide in (("inputs", in_features), ("outputs", out_features)):
            if wide % n:
                able = [
                    d for d in range(1, 65) if in_features % d == out_features % d == 0
                ]
                raise WrapError(
                    f"experts.num_parts={n} does not divide the {wide} {side} of a "
                    f"layer; {able} would"
                )
        rows, fan_in = sum(self.ranks), self.features("A") // n
        self.add("A", (rows, in_features // n), uniform(fan_in), fan_in)
        self.add("B", (rows, out_features // n), None, self.features("B") // n)

    def forward(
        self,
        x: Tensor,
        gates: Tensor | None,
        base: Tensor | Layer | None,
        top_k: int | None = None,
    ) -> Tensor:
        """See base class. Every part has a dropout mask of its own."""
        n = len(self.ranks)
        if base is not None and not isinstance(base, Tensor):
            base = base(x)
        bases = [None] * n if base is None else base.chunk(n, -1)
        A, Bt = (self.value(name).split(self.ranks, 1) for name in ("A", "B"))
        dropped = self.lora_dropout if self.training else 0.0
        parts = [
            lowrank_mixture(
                part,
                A[i],
                Bt[i],
                gates,
                self.part_scales[i],
                bases[i],
                top_k=top_k,
                dropout=dropped,
                seed=dropout_seed() if dropped else 0,
            )
            for i, part in enumerate(x.chunk(n, -1))
        ]
        return torch.cat(parts, -1)

    def factors(self) -> tuple[Tensor, Tensor, float | Tensor]:
        """See base class: block-diagonal, R rows, the scales in B."""
        A, Bt = (self.value(name).split(self.ranks, 1) for name in ("A", "B"))
        scaled = [s * part for s, part in zip(self.part_scales, Bt, strict=True)]
        return _block_diagonal(A), _block_diagonal(scaled), 1.0


def _block_diagonal(parts: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """[E, sum of rows, sum of columns] of [E, rows, columns] each."""
    experts = range(len(parts[0]))
    return torch.stack([torch.block_diag(*(p[e] for p in parts)) for e in experts])
