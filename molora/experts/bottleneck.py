"""Bottleneck experts: each one is a small network with one hidden layer.

    parallel:  y = base(x) + s sum_e g_e f_e(x)
    serial:    y = h + s sum_e g_e f_e(h), h = base(x)

    f_e(z) = U_e phi(D_e z + d_e) + u_e

Reference: He et al. 2021, arXiv:2110.04366 (parallel); Houlsby et al. 2019,
arXiv:1902.00751 (serial).

All experts are computed as one hidden layer [T, E k], times the gates there, and one
product with all U. Every U and bias starts at 0, where the update is zero. D starts as
published: as LoRA's A, U(-1/sqrt(I), 1/sqrt(I)), where the adapter is parallel; from
N(0, 0.01^2) cut at two deviations where it is serial. (Houlsby et al. draw U from that
too, so that theirs starts near zero.)

The scale multiplies u as well, as in the ``adapters`` package.

Shape legend: see base.py; k hidden features of one expert   n features read (I or O).
"""

import math
from collections.abc import Callable
from typing import Literal, Self

import pydantic
import torch
from torch import Tensor, nn

from molora.errors import WrapError
from molora.experts.base import EXPERTS, AbstractExperts, ExpertsConfig

_WIDTH = 64
"""Hidden features where none are given."""
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
}


@EXPERTS.register("bottleneck", paper="arXiv:1902.00751")
class BottleneckExperts(AbstractExperts):
    """E adapters with a nonlinearity, beside the layer or after it.

    Limitations: no change of a weight, so nothing can be merged, collapsed or exported.
    The published adapters stand at a whole attention or FFN block; here a serial one
    stands after a linear layer (after o_proj and down_proj it is the published place,
    before the residual sum), a parallel one beside a linear layer. Norms are not
    trained. Every expert's hidden features are computed for every token. The router
    reads the layer's input, also where the adapter is serial.

    Args:
        config: Settings.
        in_features: I.
        out_features: O.
        generator: Source of the initial values of D.

    Raises:
        WrapError: ``reduction_factor`` leaves no hidden feature.
    """

    class Config(ExpertsConfig):
        """Settings of bottleneck experts."""

        kind: Literal["bottleneck"] = "bottleneck"
        """Registered name."""
        position: Literal["parallel", "serial"] = "parallel"
        """What it reads: the layer's input, or its output."""
        bottleneck: int | None = pydantic.Field(default=None, ge=1)
        """Hidden features of one expert; 64 where reduction_factor is not given
        either."""
        reduction_factor: float | None = pydantic.Field(default=None, gt=0)
        """In place of bottleneck: features read, divided by this and rounded down."""
        activation: Literal["relu", "gelu", "silu", "identity"] = "relu"
        """The function phi; identity without biases is LoRA with this scale."""
        bias: bool = True
        """Whether D and U have biases."""
        scale: float = pydantic.Field(default=1.0, gt=0)
        """The number s; 4 in the paper of parallel adapters."""

        @pydantic.model_validator(mode="after")
        def _one_width(self) -> Self:
            if self.bottleneck is not None and self.reduction_factor is not None:
                raise ValueError(
                    "bottleneck and reduction_factor both set the hidden features; "
                    "give one of them"
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
        self.parallel = config.position == "parallel"
        wide = in_features if self.parallel else out_features
        k = config.bottleneck or _WIDTH
        if config.reduction_factor is not None:
            k = int(wide / config.reduction_factor)
        if k == 0:
            raise WrapError(
                f"experts.reduction_factor={config.reduction_factor:g}: it leaves no "
                f"hidden feature of the {wide} that a {config.position} adapter reads "
                f"here; give at most {wide}, or bottleneck"
            )
        down = torch.empty(E, k, wide)
        if self.parallel:
            bound = 1 / math.sqrt(wide)
            down.uniform_(-bound, bound, generator=generator)
        else:
            nn.init.trunc_normal_(down, 0, 0.01, -0.02, 0.02, generator=generator)
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(E, k, out_features))
        self.down_bias: nn.Parameter | None = None
        self.up_bias: nn.Parameter | None = None
        if config.bias:
            self.down_bias = nn.Parameter(torch.zeros(E, k))
            self.up_bias = nn.Parameter(torch.zeros(E, out_features))

    def forward(
        self,
        x: Tensor,
        gates: Tensor | None,
        base: Tensor,
        top_k: int | None = None,
    ) -> Tensor:
        """See base class."""
        read_Tn = x if self.parallel else base
        hidden_TEk = self._hidden(read_Tn)
        if gates is not None:
            hidden_TEk = hidden_TEk * gates.unsqueeze(-1).to(hidden_TEk.dtype)
        up = self.up.flatten(0, 1).to(hidden_TEk.dtype)
        update_TO = hidden_TEk.flatten(1) @ up
        if self.up_bias is not None:
            bias_EO = self.up_bias
            mixed = bias_EO if gates is None else gates.to(bias_EO.dtype) @ bias_EO
            update_TO = update_TO + mixed
        return (base + self.config.scale * update_TO).to(base.dtype)

    def _hidden(self, read_Tn: Tensor) -> Tensor:
        """Hidden features phi(D z + d) of all experts, [T, E, k]."""
        E, k, _ = self.down.shape
        bias_Ek = self.down_bias
        bias = None if bias_Ek is None else bias_Ek.flatten().to(read_Tn.dtype)
        down = self.down.flatten(0, 1).to(read_Tn.dtype)
        hidden: Tensor = nn.functional.linear(read_Tn, down, bias)
        hidden_TEk: Tensor = hidden.unflatten(1, (E, k))
        if self.config.activation == "identity":
            return hidden_TEk
        return _ACTIVATIONS[self.config.activation](hidden_TEk)

    def delta_weight(self, expert: int, weight: Tensor) -> Tensor:
        """See base class.

        Raises:
            WrapError: Always: the update is nonlinear.
        """
        raise WrapError(
            "bottleneck experts have a nonlinearity, so no weight equals them; keep "
            "the adapter beside the model"
        )

    def count(self) -> int:
        """See base class: E k (n + O), and E (k + O) with biases."""
        return sum(parameter.numel() for parameter in self.parameters())
