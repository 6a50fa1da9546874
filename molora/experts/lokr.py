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

On a convolution C is split and the last factor is [o_K, i_K k k], as PEFT has it;
with ``use_effective_conv2d`` its parts are [r, o_K], [r, i_K] and a core [r, r, k k]
(kernel_core.py) where it is a product. Inside of other families (sum, dora) I = C k k
is split as that of a linear layer.

Delta W is not formed: x as [T, i_1, ..., i_K] is multiplied along one axis at a time.

Shape legend: see base.py; o_k, i_k sizes of factor k of K.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molora.errors import WrapError
from molora.experts.base import EXPERTS, AbstractExperts
from molora.experts.gated_sum import gated_sum
from molora.experts.kernel_core import core_size, cored, window_of
from molora.experts.lokr_config import LoKrConfig
from molora.experts.peft_form import PeftForm


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

    class Config(LoKrConfig):
        """Settings of LoKr experts; see its base class."""

    adds = True
    peft_type = "LOKR"
    reads_kernel = True

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
        if config.residual and in_features != out_features:
            raise WrapError(
                f"experts.residual: adds a multiple of x, which a layer from "
                f"{in_features} to {out_features} features cannot; set it to false, or "
                "target square layers alone"
            )
        self.config = config
        self.num_experts = config.num_experts
        self.scale = config.alpha / (config.r or 1)
        self.kernel, area = kernel, math.prod(kernel)
        self.core = core_size(config.use_effective_conv2d, kernel)
        self.sizes, self.names = config.pieces(in_features, out_features, area)
        zero = self.names[-1][-1] if config.init_weights == "lycoris" else "w1"
        r = config.r or 0
        for k, ((o, i), names) in enumerate(zip(self.sizes, self.names, strict=True)):
            shapes: list[tuple[int, ...]] = [(o, r), (r, i)]
            if len(names) == 1:
                shapes = [(o, i)]
            elif self.core and k == len(self.sizes) - 1:
                shapes = [(r, o), (r, i // area), (r, r, area)]
                self.names[k] = names = (*names, f"t{k + 1}")
            for name, shape in zip(names, shapes, strict=True):
                values = torch.zeros(self.num_experts, *shape)
                if name.removesuffix("_a") != zero:
                    bound = 1 / math.sqrt(math.prod(shape[1:]))
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
            matrices = self._matrices([mine[name] for name in self.names[k]])
            for i, matrix in reversed(list(enumerate(matrices))):
                y = F.linear(y, matrix if i + k else self.scale * matrix)
            y = y.transpose(1, 2)
        y = y.flatten(1)
        return y + mine["s_res"] * x_TI if self.config.residual else y

    def _matrices(self, parts: list[Tensor]) -> list[Tensor]:
        """Matrices whose product is one factor."""
        if len(parts) < 3:
            return parts
        a_ro, b_ri, core = parts
        return [a_ro.t(), cored(core, b_ri)]

    @torch.no_grad()
    def delta_weight(self, expert: int, weight: Tensor) -> Tensor:
        """See base class."""
        first = getattr(self, self.all_names[0])
        wide = torch.promote_types(first.dtype, torch.float32)
        delta = torch.full((1, 1), self.scale, dtype=wide, device=first.device)
        for names in self.names:
            parts = [getattr(self, name)[expert].to(wide) for name in names]
            parts = self._matrices(parts)
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
        area = math.prod(self.kernel)
        r = config.r or max(max(size) for size in self.sizes)
        settings: dict[str, Any] = {
            "r": r,
            "alpha": self.scale * r,
            "decompose_both": config.decompose_both,
            "decompose_factor": config.divisors()[0],
        }
        again = type(self).Config(**settings, sort_factors=False)
        outs, ins = zip(*self.sizes, strict=True)
        if again.pieces(math.prod(ins), math.prod(outs), area)[0] != self.sizes:
            raise WrapError(
                f"experts.sort_factors: PEFT would split the layer into other factors "
                f"than {self.sizes}; train with sort_factors: false to export"
            )
        tensors = {
            f"lokr_{name}": getattr(self, name)[expert].detach().clone()
            for name in self.all_names
        }
        if area > 1:
            settings["use_effective_conv2d"] = bool(self.core)
        _check_whole(self.kernel, "w2" in self.all_names)
        if self.kernel and "lokr_w2" in tensors:
            whole = tensors["lokr_w2"]
            tensors["lokr_w2"] = whole.unflatten(1, (-1, *self.kernel))
        if "lokr_t2" in tensors:
            core = tensors["lokr_t2"]
            tensors["lokr_t2"] = core.unflatten(-1, window_of(self.kernel))
        return PeftForm("LOKR", settings, tensors)

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
        block = {
            "kind": "lokr",
            "r": int(settings["r"]),
            "alpha": float(settings["alpha"]),
            "decompose_both": bool(settings["decompose_both"]),
            "decompose_factor": int(settings["decompose_factor"]),
        }
        config = cls.Config.from_dict(block)
        found = config.pieces(in_features, out_features, math.prod(kernel))[1]
        names = [name for names in found for name in names]
        if kernel and "lokr_t2" in tensors:
            block["use_effective_conv2d"] = True
            names.append("t2")
        _check_whole(kernel, "w2" in names)
        if set(tensors) != {f"lokr_{name}" for name in names}:
            raise WrapError(
                f"a LoKr with these settings holds "
                f"{', '.join(f'lokr_{name}' for name in names)} in a linear layer from "
                f"{in_features} to {out_features}, not {', '.join(sorted(tensors))}"
            )
        return block, {
            name: tensors[f"lokr_{name}"].flatten(2 if name == "t2" else 1).unsqueeze(0)
            for name in names
        }


def _check_whole(kernel: tuple[int, ...], whole: bool) -> None:
    """Refuse what PEFT multiplies along other axes: w1 [o, i] with w2 [o, i, k]."""
    if len(kernel) == 1 and whole:
        raise WrapError(
            "PEFT 0.21 computes another product where the last factor on a Conv1d is "
            "whole; LoKr with a smaller r, which splits it, is the same in both"
        )
