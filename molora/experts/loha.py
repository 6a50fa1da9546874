"""LoHa experts: the Hadamard product of two low-rank products.

    Delta W_e = s (w1_a w1_b) * (w2_a w2_b)    s = alpha / r, elementwise *

of rank up to r^2 with 2 r (I + O) parameters (FedPara, Hyeon-Woo et al. 2021,
arXiv:2108.06098, proposition 1; as LyCORIS and PEFT have it). It is a product of rank
r^2 with row-wise Khatri-Rao factors, and so runs through the low-rank op:

    A[(p, q), i] = w1_b[p, i] w2_b[q, i]    B[o, (p, q)] = w1_a[o, p] w2_a[o, q]

On a convolution I = C k k. With ``use_effective_conv2d`` each product has a core for
the window positions k instead (kernel_core.py), a is [r, O] and b is [r, C]:

    (w_a w_b)[o, (c, k)] becomes sum_pq t[p, q, k] w_a[p, o] w_b[q, c]

At the start one of the four factors is zero: w2_b under PEFT's initialisation, where
the others are uniform as Kaiming has it with a = sqrt(5); w2_a under that of LyCORIS,
with w1_b, w2_b ~ N(0, 1) and w1_a ~ N(0, 0.1^2).

Shape legend: see base.py; p, q each run over r.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor, nn

from molora.errors import WrapError
from molora.experts.base import EXPERTS, BilinearExperts, ExpertsConfig
from molora.experts.kernel_core import core_size, cored, window_of
from molora.experts.peft_form import PeftForm

_NAMES = ("w1_a", "w1_b", "w2_a", "w2_b")
_CORES = ("t1", "t2")


@EXPERTS.register("loha", paper="arXiv:2108.06098")
class LoHaExperts(BilinearExperts):
    """E Hadamard products of two low-rank products.

    Limitations: each expert costs what a LoRA of rank r^2 costs, and its factors
    [r^2, I] and [r^2, O] are held in training. PEFT's rank_dropout and module_dropout
    are not there.

    Args:
        config: Settings.
        in_features: I.
        out_features: O.
        generator: Source of the initial values.
        kernel: Window of a convolution; empty for other layers.
    """

    class Config(ExpertsConfig):
        """Settings of LoHa experts."""

        kind: Literal["loha"] = "loha"
        """Registered name."""
        r: int = pydantic.Field(default=8, ge=1)
        """Rank of each of the two products."""
        alpha: float = pydantic.Field(default=8.0, gt=0)
        """Numerator of the scale."""
        use_rslora: bool = False
        """Divide alpha by sqrt(r) instead of r (LyCORIS: rs_lora)."""
        init_weights: Literal[True, "lycoris"] = True
        """Initial values of PEFT (true) or of LyCORIS."""
        use_effective_conv2d: bool = False
        """A core for the window of a convolution (LyCORIS: tucker)."""

    peft_type = "LOHA"
    reads_kernel = True
    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor

    def __init__(
        self,
        config: Config,
        *,
        in_features: int,
        out_features: int,
        generator: torch.Generator,
        kernel: tuple[int, ...] = (),
    ):
        super().__init__()
        self.config = config
        self.num_experts = E = config.num_experts
        r = config.r
        self.scale = config.alpha / (math.sqrt(r) if config.use_rslora else r)
        self.kernel = kernel
        self.core = core_size(config.use_effective_conv2d, kernel)
        left = (r, out_features) if self.core else (out_features, r)
        right = (r, in_features // max(self.core, 1))
        for name, shape in zip(_NAMES, 2 * (left, right), strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(E, *shape)))
        for name in _CORES if self.core else ():
            core = torch.empty(E, r, r, self.core)
            self.register_parameter(name, nn.Parameter(core))
        with torch.no_grad():
            if config.init_weights == "lycoris":
                self.w1_b.normal_(generator=generator)
                self.w1_a.normal_(std=0.1, generator=generator)
                self.w2_b.normal_(generator=generator)
                self.w2_a.zero_()
                for name in _CORES if self.core else ():
                    getattr(self, name).normal_(std=0.1, generator=generator)
            else:
                for name in self.names[:3] + self.names[4:]:
                    factor = getattr(self, name)
                    bound = 1 / math.sqrt(math.prod(factor.shape[2:]))
                    factor.uniform_(-bound, bound, generator=generator)
                self.w2_b.zero_()

    @property
    def names(self) -> tuple[str, ...]:
        """Parameters of an expert."""
        return _NAMES + _CORES if self.core else _NAMES

    def _product(self, which: int) -> tuple[Tensor, Tensor]:
        """One of the two products as its factors, [E, O, r] and [E, r, I]."""
        a, b = getattr(self, f"w{which}_a"), getattr(self, f"w{which}_b")
        if not self.core:
            return a, b
        return a.transpose(1, 2), cored(getattr(self, f"t{which}"), b)

    def factors(self) -> tuple[Tensor, Tensor, float | Tensor]:
        """See base class."""
        (a1, b1), (a2, b2) = self._product(1), self._product(2)
        A = b1.unsqueeze(2) * b2.unsqueeze(1)
        B = a1.unsqueeze(3) * a2.unsqueeze(2)
        return A.flatten(1, 2), B.flatten(2).transpose(1, 2), self.scale

    @torch.no_grad()
    def delta_weight(self, expert: int, weight: Tensor | None = None) -> Tensor:
        """See base class; two small products instead of one of rank r^2."""
        wide = torch.promote_types(self.w1_a.dtype, torch.float32)
        products = (*self._product(1), *self._product(2))
        a1, b1, a2, b2 = (factor[expert].to(wide) for factor in products)
        delta_OI: Tensor = self.scale * (a1 @ b1) * (a2 @ b2)
        return delta_OI

    def count(self) -> int:
        """See base class."""
        return sum(factor.numel() for factor in self.parameters())

    def to_peft(self, expert: int) -> PeftForm:
        """See base class; a scale of its own is written into alpha."""
        r = self.config.r
        settings: dict[str, Any] = {"r": r, "alpha": self.scale * r}
        if math.prod(self.kernel) > 1:
            settings["use_effective_conv2d"] = bool(self.core)
        tensors = {
            f"hada_{name}": getattr(self, name)[expert].detach().clone()
            for name in self.names
        }
        for name in _CORES if self.core else ():
            core = tensors[f"hada_{name}"]
            tensors[f"hada_{name}"] = core.unflatten(-1, window_of(self.kernel))
        return PeftForm("LOHA", settings, tensors)

    @classmethod
    def from_peft(
        cls,
        settings: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        in_features: int,
        out_features: int,
        kernel: tuple[int, ...] = (),
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See base class."""
        cores = kernel and "hada_t1" in tensors
        names = _NAMES + _CORES if cores else _NAMES
        strange = sorted(set(tensors) - {f"hada_{name}" for name in names})
        if strange:
            raise WrapError(
                f"{', '.join(strange)}: a LoHa of a linear layer holds hada_w1_a, "
                "hada_w1_b, hada_w2_a and hada_w2_b alone"
            )
        block = {
            "kind": "loha",
            "num_experts": 1,
            "r": int(settings["r"]),
            "alpha": float(settings["alpha"]),
        }
        if cores:
            block["use_effective_conv2d"] = True
        found = {name: tensors[f"hada_{name}"].unsqueeze(0) for name in names}
        return block, {
            name: values.flatten(3) if name in _CORES else values
            for name, values in found.items()
        }
