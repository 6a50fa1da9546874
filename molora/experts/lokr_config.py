"""Settings of LoKr experts, and the sizes of their factors; see lokr.py.

Shape legend: see base.py; o_k, i_k sizes of factor k of K.
"""

import math
from typing import Annotated, Literal, Self

import pydantic

from molora.experts.base import ExpertsConfig

Divisor = Annotated[int, pydantic.Field(ge=-1)]
Sizes = list[tuple[int, int]]
"""(o_k, i_k) of every factor."""


class LoKrConfig(ExpertsConfig):
    """Settings of LoKr experts."""

    kind: Literal["lokr"] = "lokr"
    """Registered name."""
    r: Annotated[int, pydantic.Field(ge=1)] | None = 8
    """Rank of factors that are split; null keeps all of them whole (KronA)."""
    alpha: float = pydantic.Field(default=8.0, gt=0)
    """Numerator of the scale; the scale itself where r is null."""
    decompose_factor: Divisor | list[Divisor] = -1
    """How sizes are split in two; a list splits what is left again (LoNKr)."""
    decompose_both: bool = False
    """Whether factors before the last may be products of rank r as well."""
    sort_factors: bool = False
    """Put the smaller of two sizes first, as LyCORIS does; PEFT does not."""
    init_weights: Literal[True, "lycoris"] = True
    """Which factor starts at zero: the first (true, as PEFT) or the last."""
    use_effective_conv2d: bool = False
    """A core for the window of a convolution (LyCORIS: tucker)."""
    residual: bool = False
    """Add a learned multiple of x, zero at the start (square layers)."""

    @pydantic.model_validator(mode="after")
    def _is_read(self) -> Self:
        if self.r is None and self.decompose_both:
            raise ValueError("decompose_both: r null keeps all factors whole")
        if 0 in self.divisors() or not self.divisors():
            raise ValueError(
                "decompose_factor: give -1, a number above 0, or a list of these"
            )
        return self

    def divisors(self) -> list[int]:
        """What sizes are split by, one after the other."""
        f = self.decompose_factor
        return f if isinstance(f, list) else [f]

    def sizes(self, in_features: int, out_features: int) -> Sizes:
        """Sizes of all factors."""
        outs, ins = (self._split(d) for d in (out_features, in_features))
        return list(zip(outs, ins, strict=True))

    def pieces(
        self, in_features: int, out_features: int, area: int
    ) -> tuple[Sizes, list[tuple[str, ...]]]:
        """Sizes and parameters of all factors; the last one holds the window."""
        sizes = self.sizes(in_features // area, out_features)
        names, (o, i) = self.names(sizes), sizes[-1]
        return [*sizes[:-1], (o, i * area)], names

    def _split(self, rest: int) -> list[int]:
        parts = []
        for f in self.divisors():
            first, rest = _factors(rest, f)
            if self.sort_factors:
                first, rest = sorted((first, rest))
            parts.append(first)
        return [*parts, rest]

    def names(self, sizes: Sizes) -> list[tuple[str, ...]]:
        """Parameters of every factor: the matrix, or its two parts."""
        found: list[tuple[str, ...]] = []
        for k, size in enumerate(sizes, 1):
            small = self.r is not None and self.r < max(size) / 2
            split = small and (self.decompose_both or k == len(sizes))
            found.append((f"w{k}_a", f"w{k}_b") if split else (f"w{k}",))
        return found


def _factors(dimension: int, factor: int) -> tuple[int, int]:
    """Two factors of a number; see the head of this file."""
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    bound = dimension if factor == -1 else factor
    pairs = [
        (m, dimension // m)
        for m in range(1, math.isqrt(dimension) + 1)
        if dimension % m == 0 and m <= bound
    ]
    # the smallest sum is that of the pair next to the root
    return pairs[-1]
