"""SuperLoRA experts within a layer: the folded weight as Tucker tensors.

The O I entries of Delta W, row by row, are cut into G groups of N = ceil(O I / G). Each
group is the beginning of a tensor of M axes that is written as

    s C x_1 A_1 x_2 A_2 ... x_M A_M    C [r, ..., r], A_m [n_m, r]    s = alpha / r

folded to sides n_m = n with the smallest n^M >= N, or, with fold: weight (M = 2, G =
1), to the sides O and I of the weight itself. M > 2 is LoRTA. With a fixed diagonal
core C of ones and fold: weight it is LoRA; with a trained core, U G V of LoTR for one
layer. A_M is zero at the start, the other factors and the core are uniform as Kaiming
has it with a = sqrt(5). G (M n r + r^M) parameters, without r^M for a diagonal core.

Reference: Chen et al. 2024, arXiv:2403.11887, sections 3 and 4. Kronecker splits (LoKr,
LoNKr) are family ``lokr``.

Shape legend: see base.py; G groups, M axes, n side of a folded group.
"""

import math
from typing import Any, Literal, Self

import pydantic
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molora.errors import WrapError
from molora.experts.base import EXPERTS, AbstractExperts, ExpertsConfig
from molora.experts.gated_sum import gated_sum


@EXPERTS.register("superlora", paper="arXiv:2403.11887")
class SuperLoRAExperts(AbstractExperts):
    """E updates that are folded Tucker tensors (SuperLoRA, LoRTA).

    Limitations: the update of one expert at a time is formed as [O, I], forward and
    backward, because a folded tensor has no factors along the sides of the weight.
    Groups lie within one layer; weights of several layers are not joined, and there is
    no fixed projection.

    Args:
        config: Settings.
        in_features: I.
        out_features: O.
        generator: Source of the initial values.

    Raises:
        WrapError: More groups than entries.
    """

    class Config(ExpertsConfig):
        """Settings of SuperLoRA experts."""

        kind: Literal["superlora"] = "superlora"
        """Registered name."""
        r: int = pydantic.Field(default=4, ge=1)
        """Rank along every axis."""
        alpha: float = pydantic.Field(default=4.0, gt=0)
        """Numerator of the scale."""
        order: int = pydantic.Field(default=3, ge=2, le=8)
        """M, axes that a group is folded to."""
        groups: int = pydantic.Field(default=1, ge=1)
        """G, parts of the weight with tensors of their own."""
        fold: Literal["square", "weight"] = "square"
        """Fold to equal sides, or leave the weight as it is (order 2, one group)."""
        core: Literal["dense", "diagonal"] = "dense"
        """Trained core, or ones on the diagonal."""

        @pydantic.model_validator(mode="after")
        def _fits(self) -> Self:
            if self.fold == "weight" and (self.order, self.groups) != (2, 1):
                raise ValueError("fold: weight needs order 2 and groups 1")
            return self

    adds = True

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
        self.shape = (out_features, in_features)
        entries = math.prod(self.shape)
        G, M, r = config.groups, config.order, config.r
        if entries < G:
            raise WrapError(
                f"experts.groups={G}: a layer from {in_features} to {out_features} "
                f"features has {entries} entries; groups up to {entries} work"
            )
        self.scale = config.alpha / r
        self.size = -(-entries // G)
        sides = list(self.shape)
        if config.fold == "square":
            sides = [_side(self.size, M)] * M
        self.names = [f"A{m}" for m in range(1, M + 1)]
        for name, side in zip(self.names, sides, strict=True):
            values = torch.zeros(E, G, side, r)
            if name != self.names[-1]:
                values.uniform_(-(r**-0.5), r**-0.5, generator=generator)
            self.register_parameter(name, nn.Parameter(values))
        if config.core == "dense":
            core = torch.empty(E, G, *[r] * M)
            core.uniform_(-(r**-0.5), r**-0.5, generator=generator)
            self.core = nn.Parameter(core)
            self.names.append("core")

    def forward(
        self,
        x: Tensor,
        gates: Tensor | None,
        base: Tensor,
        top_k: int | None = None,
    ) -> Tensor:
        """See base class."""

        def update(x_TI: Tensor, *values: Tensor) -> Tensor:
            return F.linear(x_TI, self._weight(*values))

        values = [getattr(self, name) for name in self.names]
        return (base + gated_sum(update, x, values, gates, top_k)).to(base.dtype)

    def _weight(self, *values: Tensor) -> Tensor:
        """Update of one expert [O, I] from its values, in the order of the names."""
        factors = values[: self.config.order]
        if self.config.core == "dense":
            grown = values[-1]
        else:
            first = factors[0]
            at = torch.arange(self.config.r, device=first.device)
            grown = first.new_zeros(first.shape[0], *[self.config.r] * len(factors))
            diagonal: tuple[Any, ...] = (slice(None), *[at] * len(factors))
            grown[diagonal] = 1
        for A_Gnr in factors:
            # the first axis that is left becomes the last one that is done
            G, r = A_Gnr.shape[0], A_Gnr.shape[2]
            done = A_Gnr @ grown.reshape(G, r, -1)
            grown = done.transpose(1, 2)
        flat = self.scale * grown.reshape(grown.shape[0], -1)[:, : self.size].flatten()
        return flat[: math.prod(self.shape)].view(self.shape)

    @torch.no_grad()
    def delta_weight(self, expert: int, weight: Tensor) -> Tensor:
        """See base class."""
        values = [getattr(self, name)[expert] for name in self.names]
        wide = torch.promote_types(values[0].dtype, torch.float32)
        return self._weight(*[value.to(wide) for value in values])

    def count(self) -> int:
        """See base class."""
        return sum(getattr(self, name).numel() for name in self.names)


def _side(entries: int, order: int) -> int:
    """Smallest n with n^order >= entries."""
    n = int(entries ** (1 / order))
    while n**order < entries:
        n += 1
    while n > 1 and (n - 1) ** order >= entries:
        n -= 1
    return n
