"""LoDA and LoDA+ experts: LoRA whose low-rank path has a nonlinear part.

    z = A x
    delta_e(x) = s (a B z + c phi(B phi(M_m .. phi(M_1 phi(z)))))

with phi(z) = z for z > 0 and negative_slope * z below. LoDA has no mixers M, LoDA+ has
m = 2 of size r x r.

Reference: Liu et al. 2023, MERL TR2023-150. **An interpretation**: the authors say that
the method makes LoRA's path nonlinear, with LoRA as a special case and nearly the same
number of parameters; their formula could not be read, and no code of theirs is public.
The one above, with slope 0.8, s = 1/sqrt(O) and a = c = 1, is that of a third party.
The weights a and c are added here, because without them LoRA is no special case of it:
c = 0 (or slope 1, m = 0 and a + c = 1) is LoRA with scale s.

A is drawn as LoRA's, B is zero, where the update is zero; mixers start as the identity,
where LoDA+ is LoDA but for phi being applied m times more.

Shape legend: see base.py; m mixers.
"""

import math
from typing import Literal, Self

import pydantic
import torch
from torch import Tensor, nn

from molora.errors import WrapError
from molora.experts.base import EXPERTS, AbstractExperts, ExpertsConfig
from molora.experts.gated_sum import gated_sum


@EXPERTS.register("loda", paper="MERL TR2023-150")
class LoDAExperts(AbstractExperts):
    """E pairs of low-rank factors with a nonlinear path through them.

    Limitations: an interpretation; nothing of the authors' could be compared with. No
    change of a weight, so nothing can be merged, collapsed or exported. The last
    nonlinearity stands after B, so each expert computes its [T, O] for itself, on the
    tokens that use it, and once more in backward. R-LoDA and S-LoDA, which approximate
    the frozen weight, are not part of it.

    Args:
        config: Settings.
        in_features: I.
        out_features: O.
        generator: Source of the initial values of A.
    """

    class Config(ExpertsConfig):
        """Settings of LoDA experts."""

        kind: Literal["loda"] = "loda"
        """Registered name."""
        r: int = pydantic.Field(default=8, ge=1)
        """Rank of one expert."""
        mixers: int = pydantic.Field(default=0, ge=0)
        """Matrices between the ranks: 0 is LoDA, 2 is LoDA+."""
        negative_slope: float = pydantic.Field(default=0.8, ge=0, le=1)
        """Slope of phi below zero; 1 makes it the identity."""
        linear_weight: float = pydantic.Field(default=1.0, ge=0)
        """The number a, of LoRA's path."""
        nonlinear_weight: float = pydantic.Field(default=1.0, ge=0)
        """The number c, of the nonlinear path."""
        scale: float | None = pydantic.Field(default=None, gt=0)
        """The number s; None means 1/sqrt(O)."""

        @pydantic.model_validator(mode="after")
        def _all_are_read(self) -> Self:
            if self.nonlinear_weight:
                return self
            if not self.linear_weight:
                raise ValueError(
                    "linear_weight and nonlinear_weight are both 0, so there is no "
                    "update; give one of them"
                )
            if self.mixers or self.negative_slope != 0.8:
                raise ValueError(
                    "mixers and negative_slope belong to the nonlinear path, which "
                    "nonlinear_weight: 0 leaves out"
                )
            return self

    linear = False

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
        self.scale = config.scale or 1 / math.sqrt(out_features)
        bound = 1 / math.sqrt(in_features)
        A = torch.empty(E, config.r, in_features)
        self.A = nn.Parameter(A.uniform_(-bound, bound, generator=generator))
        self.Bt = nn.Parameter(torch.zeros(E, config.r, out_features))
        self.M: nn.Parameter | None = None
        if config.mixers:
            eye = torch.eye(config.r).repeat(E, config.mixers, 1, 1)
            self.M = nn.Parameter(eye)

    def forward(
        self,
        x: Tensor,
        gates: Tensor | None,
        base: Tensor,
        top_k: int | None = None,
    ) -> Tensor:
        """See base class."""
        parameters = [self.A, self.Bt]
        if self.M is not None:
            parameters.append(self.M)
        update_TO = gated_sum(self._update, x, parameters, gates, top_k)
        return (base + self.scale * update_TO).to(base.dtype)

    def _update(
        self, x_TI: Tensor, A_rI: Tensor, Bt_rO: Tensor, M_mrr: Tensor | None = None
    ) -> Tensor:
        """What one expert computes, without s, [T, O]."""
        a, c = self.config.linear_weight, self.config.nonlinear_weight
        z_Tr = x_TI @ A_rI.t()
        if not c:
            return a * (z_Tr @ Bt_rO)
        h_Tr = self._phi(z_Tr)
        for M_rr in () if M_mrr is None else M_mrr:
            h_Tr = self._phi(h_Tr @ M_rr.t())
        return a * (z_Tr @ Bt_rO) + c * self._phi(h_Tr @ Bt_rO)

    def _phi(self, values: Tensor) -> Tensor:
        return nn.functional.leaky_relu(values, self.config.negative_slope)

    def delta_weight(self, expert: int, weight: Tensor) -> Tensor:
        """See base class.

        Raises:
            WrapError: Always: the update is nonlinear.
        """
        raise WrapError(
            "LoDA experts have a nonlinearity, so no weight equals them; keep the "
            "adapter beside the model"
        )

    def count(self) -> int:
        """See base class: E r (I + O + m r)."""
        return sum(parameter.numel() for parameter in self.parameters())
