"""PRoLoRA experts: LoRA whose factors repeat a chunk, turned by some ranks each time.

    A = [A_0 turned 0, 1, ... m-1 times, side by side; A_u]    likewise B, n times

Chunk k of A is A_0 with its rows rolled by k * max(floor((r - u) / m), 1), so that the
copies differ; u ranks (A_u, B_u) are not shared. The copies are cut at the width of the
layer.

    delta_e(x) = alpha / r * B_e A_e x

A_0 and A_u are drawn from U(-1/sqrt(I), 1/sqrt(I)) with the I of the whole layer (the
paper's rectified initialisation), B is zero.

Reference: Wang et al. 2024, arXiv:2402.16902, section 3.

Shape legend: see base.py; u ranks that are not shared   m, n chunks   s = r - u.
"""

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, Self

import pydantic
import torch
from torch import Tensor

from molora.errors import WrapError
from molora.experts.base import EXPERTS
from molora.experts.factor_config import FactorConfig, Side
from molora.experts.factors import FactorExperts, uniform


@EXPERTS.register("prolora", paper="arXiv:2402.16902")
class PRoLoRAExperts(FactorExperts):
    """E pairs of factors made of rotated copies of a chunk.

    Args:
        config: Settings.
        in_features: I.
        out_features: O.
        generator: Source of the initial values.
        places: See ``FactorExperts``.

    Raises:
        WrapError: A layer has fewer inputs or outputs than chunks.
    """

    class Config(FactorConfig):
        """Settings of PRoLoRA experts."""

        TENSORS: ClassVar[Mapping[str, Side]] = {
            "A": "in",
            "B": "out",
            "A_unshared": "in",
            "B_unshared": "out",
        }
        ZERO: ClassVar[tuple[str, ...]] = ("B", "B_unshared")

        kind: Literal["prolora"] = "prolora"
        """Registered name."""
        r: int = pydantic.Field(default=8, ge=2)
        """Rank of one expert."""
        unshared_r: int = pydantic.Field(default=1, ge=0)
        """u, how many of the ranks are not made of chunks."""
        in_chunks: int = pydantic.Field(default=2, ge=1)
        """m, copies along the input."""
        out_chunks: int = pydantic.Field(default=2, ge=1)
        """n, copies along the output."""
        lora_alpha: float = pydantic.Field(default=16.0, gt=0)
        """Numerator of the scale lora_alpha / r."""

        @pydantic.model_validator(mode="after")
        def _ranks_add_up(self) -> Self:
            if self.unshared_r >= self.r:
                raise ValueError(
                    f"unshared_r={self.unshared_r} leaves none of r={self.r} ranks to "
                    "the chunks; lower it, or use kind lora"
                )
            for field, named in (
                ("shared", self.scopes()),
                ("trainability", self.trainability),
            ):
                missing = [name for name in named if name not in self.tensors()]
                if missing:
                    raise ValueError(
                        f"{field}: with unshared_r=0 there is no {missing[0]}; drop it"
                    )
            return self

        def tensors(self) -> tuple[str, ...]:
            """See base class."""
            return tuple(self.TENSORS) if self.unshared_r else ("A", "B")

    config: Config

    def build(self, in_features: int, out_features: int) -> None:
        """See base class."""
        config = self.config
        r, u = config.r, config.unshared_r
        self.scale, self.unshared_r = config.lora_alpha / r, u
        self.chunks = {"A": config.in_chunks, "B": config.out_chunks}
        for name, wide in (("A", in_features), ("B", out_features)):
            count, fan_in = self.chunks[name], self.features("A")
            if wide < count:
                raise WrapError(
                    f"experts.{'in' if name == 'A' else 'out'}_chunks={count}: a layer "
                    f"has {wide} values there; give at most as many chunks"
                )
            draw = uniform(fan_in) if name == "A" else None
            whole = math.ceil(self.features(name) / count)
            self.add(name, (r - u, math.ceil(wide / count)), draw, whole)
            if u:
                self.add(f"{name}_unshared", (u, wide), draw)
        self._wide = {"A": in_features, "B": out_features}

    def factors(self) -> tuple[Tensor, Tensor, float | Tensor]:
        """See base class."""
        return self._factor("A"), self._factor("B"), self.scale

    def _factor(self, name: str) -> Tensor:
        """A whole factor, [E or 1, r, I or O]."""
        chunk = self.value(name)
        count, rows = self.chunks[name], chunk.shape[1]
        step = max(rows // count, 1)
        copies = [chunk.roll(-k * step, 1) for k in range(count)]
        shared = torch.cat(copies, -1)[..., : self._wide[name]]
        if not self.unshared_r:
            return shared
        own = self.value(f"{name}_unshared")
        stack = max(len(shared), len(own))
        parts = [part.expand(stack, -1, -1) for part in (shared, own)]
        return torch.cat(parts, 1)
