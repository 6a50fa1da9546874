"""LoKr experts: a Kronecker product of small factors.

    Delta W_e = s w1 (x) w2 [(x) w3 ...]    s = alpha / r, or alpha where r is null

Each factor w_k [o_k, i_k] is a matrix or, where r < max(o_k, i_k) / 2, a product of
w_k_a [o_k, r] and w_k_b [r, i_k]; the last one always may be, the others with
``decompose_both``. Splitting a number d by f gives (f, d / f) where f divides d, and
else the pair m <= n of divisors with the smallest sum, m <= f (f = -1: no bound).

    LoKr    LyCORIS (Yeh et al. 2023, arXiv:2309.14859), shapes and scale as in PEFT
    KronA   r null: full factors and a constant scale; ``residual`` adds s_res x with
            one learned number per expert (KronA^B_res; Edalati et al. 2022,
            arXiv:2212.10650)
    LoNKr   a list of factors gives one factor more than it is long (SuperLoRA, Chen et
            al. 2024, arXiv:2403.11887)

Delta W is not formed: x as [T, i_1, ..., i_K] is multiplied along one axis at a time.

Shape legend: see base.py; o_k, i_k sizes of factor k of K.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import pydantic
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molora.errors import WrapError
from molora.experts.base import EXPERTS, AbstractExperts, ExpertsConfig
from molora.experts.gated_sum import gated_sum
from molora.experts.peft_form import PeftForm

Divisor = Annotated[int, pydantic.Field(ge=-1)]
Sizes = list[tuple[int, int]]
"""(o_k, i_k) of every factor."""


@EXPERTS.register("lokr", paper="arXiv:2309.14859")
class LoKrExperts(AbstractExperts):
    """E Kronecker products (LoKr, KronA, LoNKr).

    Limitations: a layer of prime size has no factors but 1 and itself, where LoKr is a
    LoRA. The rank of the update is the product of those of its factors, so collapse to
    a LoRA is an approximation. PEFT's rank_dropout and module_dropout are not there.

    Args:
        config: Settings.
        in_features: I.
        out_features: O.
        generator: Source of the initial values.

    Raises:
        WrapError: A residual on a layer that is not square.
    """

    class Config(ExpertsConfig):
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

    adds = True
    peft_type = "LOKR"

    def __init__(
        self,
        config: Config,
        *,
        in_features: int,
        out_features: int,
        generator: torch.Generator,
    ):
        super().__init__()
        if config.residual and in_features != out_features:
            raise WrapError(
                f"experts.residual: adds a multiple of x, which a layer from "
                f"{in_features} to {out_features} features cannot; set it to false, or "
                "target square layers alone"
            )
        self.config = config
        self.num_experts = config.num_experts
        self.scale = config.alpha / (config.r or 1)
        self.sizes = config.sizes(in_features, out_features)
        self.names = config.names(self.sizes)
        zero = self.names[-1][-1] if config.init_weights == "lycoris" else "w1"
        for (o, i), names in zip(self.sizes, self.names, strict=True):
            shapes = [(o, i)] if len(names) == 1 else [(o, config.r), (config.r, i)]
            for name, shape in zip(names, shapes, strict=True):
                values = torch.zeros(self.num_experts, *shape)  # type: ignore[arg-type]
                if name.removesuffix("_a") != zero:
                    bound = 1 / math.sqrt(values.shape[2])
                    values.uniform_(-bound, bound, generator=generator)
                self.register_parameter(name, nn.Parameter(values))
        self.all_names = [name for names in self.names for name in names]
        if config.residual:
            self.s_res = nn.Parameter(torch.zeros(self.num_experts))
            self.all_names.append("s_res")

    def forward(
        self,
        x: Tensor,
        gates: Tensor | None,
        base: Tensor,
        top_k: int | None = None,
    ) -> Tensor:
        """See base class."""
        values = [getattr(self, name) for name in self.all_names]
        return (base + gated_sum(self._update, x, values, gates, top_k)).to(base.dtype)

    def _update(self, x_TI: Tensor, *values: Tensor) -> Tensor:
        """One expert; values in the order of the names."""
        mine = dict(zip(self.all_names, values, strict=True))
        y = x_TI
        for k in reversed(range(len(self.sizes))):
            # the axis that was multiplied goes to the front, so the next one is last
            y = y.flatten(1).unflatten(1, (-1, self.sizes[k][1]))
            for name in reversed(self.names[k]):
                scale = self.scale if name == self.names[0][0] else 1.0
                y = F.linear(y, scale * mine[name])
            y = y.transpose(1, 2)
        y = y.flatten(1)
        return y + mine["s_res"] * x_TI if self.config.residual else y

    @torch.no_grad()
    def delta_weight(self, expert: int, weight: Tensor) -> Tensor:
        """See base class."""
        first = getattr(self, self.all_names[0])
        wide = torch.promote_types(first.dtype, torch.float32)
        delta = torch.full((1, 1), self.scale, dtype=wide, device=first.device)
        for names in self.names:
            parts = [getattr(self, name)[expert].to(wide) for name in names]
            factor = parts[0] if len(parts) == 1 else parts[0] @ parts[1]
            delta = torch.kron(delta, factor)
        if self.config.residual:
            delta.diagonal().add_(self.s_res[expert])
        return delta

    def count(self) -> int:
        """See base class."""
        return sum(getattr(self, name).numel() for name in self.all_names)

    def to_peft(self, expert: int) -> PeftForm:
        """See base class.

        Raises:
            WrapError: PEFT's LoKr has no such factors.
        """
        config = self.config
        if config.residual or len(self.sizes) > 2:
            raise WrapError(
                "PEFT's LoKr has two factors and no residual; these experts have "
                f"{len(self.sizes)} factors and residual {config.residual}"
            )
        # whole factors are those whose rank is not small
        r = config.r or max(max(size) for size in self.sizes)
        settings: dict[str, Any] = {
            "r": r,
            "alpha": self.scale * r,
            "decompose_both": config.decompose_both,
            "decompose_factor": config.divisors()[0],
        }
        again = type(self).Config(**settings, sort_factors=False)
        outs, ins = zip(*self.sizes, strict=True)
        if again.sizes(math.prod(ins), math.prod(outs)) != self.sizes:
            raise WrapError(
                f"experts.sort_factors: PEFT would split the layer into other factors "
                f"than {self.sizes}; train with sort_factors: false to export"
            )
        tensors = {
            f"lokr_{name}": getattr(self, name)[expert].detach().clone()
            for name in self.all_names
        }
        return PeftForm("LOKR", settings, tensors)

    @classmethod
    def from_peft(
        cls,
        settings: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        in_features: int,
        out_features: int,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See base class."""
        block = {
            "kind": "lokr",
            "r": int(settings["r"]),
            "alpha": float(settings["alpha"]),
            "decompose_both": bool(settings["decompose_both"]),
            "decompose_factor": int(settings["decompose_factor"]),
        }
        config = cls.Config.from_dict(block)
        found = config.names(config.sizes(in_features, out_features))
        names = [name for names in found for name in names]
        if set(tensors) != {f"lokr_{name}" for name in names}:
            raise WrapError(
                f"a LoKr with these settings holds "
                f"{', '.join(f'lokr_{name}' for name in names)} in a linear layer from "
                f"{in_features} to {out_features}, not {', '.join(sorted(tensors))}"
            )
        return block, {name: tensors[f"lokr_{name}"].unsqueeze(0) for name in names}


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
