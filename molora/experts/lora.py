"""LoRA experts: delta_e(x) = scale_e * B_e A_e x, zero at initialisation.

    scale_e = lora_alpha_e / r_e          (Hu et al. 2021, arXiv:2106.09685, 4.1)
    scale_e = lora_alpha_e / sqrt(r_e)    (Kalajdzievski 2023, arXiv:2312.03732)

A is drawn per expert from U(-1/sqrt(I), 1/sqrt(I)), which is what Kaiming
initialisation with a = sqrt(5) gives one expert; B is zero. ``shared: [A]`` keeps one A
for all experts (HydraLoRA, Tian et al. 2024, arXiv:2404.19245), ``shared: [B]`` one B;
``trainability: {A: frozen}`` is LoRA-FA (Zhang et al. 2023, arXiv:2308.03303), with B
masked LoRI (Zhang et al. 2025, arXiv:2504.07448). See factors.py.

Experts of different rank are stored padded to the largest: the padding rows of A and B
are zero, and stay zero under any optimiser whose update of a zero parameter with a zero
gradient is zero, because each one's gradient is a multiple of the other.

Shape legend: see base.py.
"""

from typing import Annotated, Literal, Self

import pydantic
import torch
from torch import Tensor, nn

from molora.errors import WrapError
from molora.experts.base import EXPERTS
from molora.experts.factor_config import FactorConfig
from molora.experts.factors import FactorExperts, uniform
from molora.experts.start import (
    StartedExperts,
    check_init,
    factors_of,
    loftq_steps,
    orthogonal,
    reads_weight,
    sets_both,
)

Rank = Annotated[int, pydantic.Field(ge=1)]
Alpha = Annotated[float, pydantic.Field(gt=0)]


@EXPERTS.register("lora", paper="arXiv:2106.09685")
class LoRAExperts(StartedExperts, FactorExperts):
    """E pairs of low-rank factors with per-expert ranks and scales.

    Args:
        config: Settings.
        in_features: I.
        out_features: O.
        generator: Source of the initial values of A.
        places: See ``FactorExperts``.
    """

    class Config(FactorConfig):
        """Settings of LoRA experts."""

        kind: Literal["lora"] = "lora"
        """Registered name."""
        r: Rank | list[Rank] = 8
        """Rank of one expert, or a list with the rank of each."""
        lora_alpha: Alpha | list[Alpha] = 16.0
        """Numerator of the scale, or a list with that of each expert."""
        use_rslora: bool = False
        """Divide lora_alpha by sqrt(r) instead of r."""
        init_lora_weights: bool | str = True
        """Start of A and B: true (kaiming), gaussian, orthogonal, pissa,
        pissa_niter_<iterations>, olora, loftq or loftq_iter_<iterations>; see start.py.
        LoftQ is for bases in NF4 and reads the unquantised one; see loftq.py."""
        loftq_r: Rank | None = None
        """Rank of the start of LoftQ where it is not r; set by ``collapse``."""

        @pydantic.field_validator("init_lora_weights")
        @classmethod
        def _is_known(cls, value: bool | str) -> bool | str:
            return check_init(value)

        @pydantic.model_validator(mode="after")
        def _start_fits(self) -> Self:
            init = self.init_lora_weights
            if self.loftq_r is not None and not loftq_steps(init):
                raise ValueError("loftq_r: init_lora_weights is not loftq; drop it")
            if not sets_both(init):
                return self
            told = f"init_lora_weights: {init} sets A and B of every expert together, "
            if len(set(self.ranks())) > 1 or len(set(self.scales())) > 1:
                raise ValueError(told + "so it needs one r and one lora_alpha")
            wider = set(self.scopes().values()) - {"experts"}
            if wider or (self.shared and init == "orthogonal"):
                raise ValueError(told + "so it cannot stand beside this shared")
            if set(self.trainability.values()) - {"frozen"}:
                raise ValueError(told + "so none can be masked or seeded")
            if init == "orthogonal" and self.ranks()[0] % 2:
                raise ValueError(
                    f"init_lora_weights: orthogonal needs an even r, not {self.r}"
                )
            return self

        @pydantic.model_validator(mode="after")
        def _lists_fit(self) -> Self:
            for name in ("r", "lora_alpha"):
                value = getattr(self, name)
                if isinstance(value, list) and len(value) != self.num_experts:
                    raise ValueError(
                        f"{name} lists {len(value)} values for "
                        f"num_experts={self.num_experts}"
                    )
            if len(set(self.ranks())) > 1:
                if self.shared:
                    raise ValueError(
                        "shared: experts that share a factor need equal ranks"
                    )
                if "masked" in self.trainability.values():
                    raise ValueError(
                        "trainability: experts with a masked factor need equal ranks"
                    )
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

    config: Config

    def build(self, in_features: int, out_features: int) -> None:
        """See base class."""
        config = self.config
        ranks = config.ranks()
        widest = max(ranks)
        self.add("A", (widest, in_features), uniform(self.features("A")))
        self.add("B", (widest, out_features))
        if len(set(ranks)) > 1:
            for expert, rank in enumerate(ranks):
                self.value("A").data[expert, rank:] = 0
        self._begin(self._generator)
        scales = config.scales()
        self.scale: float | None = scales[0] if len(set(scales)) == 1 else None
        self.scale_E = torch.tensor(scales)

    @torch.no_grad()
    def _begin(self, generator: torch.Generator) -> None:
        """Initial values other than Kaiming's, as far as they need no weight."""
        init, (_, r, wide_in) = self.config.init_lora_weights, self.value("A").shape
        wide_out = self.value("B").shape[-1]
        if init == "gaussian" and "A" not in self._owners:
            values = self.whole("A").data
            values.normal_(generator=generator)
            for expert, rank in enumerate(self.config.ranks()[: len(values)]):
                values[expert] /= rank
                values[expert, rank:] = 0
        elif init == "orthogonal":
            orthogonal(self.value("A"), self.value("B"), generator)
        elif reads_weight(init) or loftq_steps(init):
            rows = self.config.loftq_r or r
            if rows > min(wide_in, wide_out):
                raise WrapError(
                    f"experts.r={rows}: init_lora_weights {init} takes r of the "
                    f"{min(wide_in, wide_out)} directions of a layer; lower r there"
                )
            self._seed = int(torch.randint(2**62, (), generator=generator))
            self.add_correction((rows, wide_in, wide_out), -self.config.scales()[0])
            self.frozen = (*self.frozen, "A_start", "Bt_start")
            if loftq_steps(init) > 1:
                # of the iterate before, from which the base follows; s is in B
                self.A_last = nn.Parameter(torch.zeros_like(self.A_start))
                self.Bt_last = nn.Parameter(torch.zeros_like(self.Bt_start))
                self.frozen = (*self.frozen, "A_last", "Bt_last")

    @torch.no_grad()
    def begin_at_zero_A(self, generator: torch.Generator) -> None:
        """Begin as PEFT's LoRA of an embedding: A is zero and B is N(0, 1).

        Padding rows of B are zero. Nothing changes where ``init_lora_weights`` asks for
        another start, or a factor is not simply this layer's own and trained.
        """
        config = self.config
        plain = config.init_lora_weights in (True, "gaussian")
        if (
            not plain
            or config.trainability
            or set(config.scopes().values()) - {"experts"}
        ):
            return
        self.A.zero_()
        self.Bt.normal_(generator=generator)
        for b_rO, rank in zip(self.Bt, config.ranks(), strict=False):
            b_rO[rank:] = 0

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        """See base class; only PiSSA and OLoRA read the weight."""
        init = self.config.init_lora_weights
        if not reads_weight(init):
            return
        r, scale = self.config.ranks()[0], self.config.scales()[0]
        a_rI, b_rO = factors_of(weight, init, r, scale, self._seed)
        self.keep_start(a_rI, b_rO)
        self.value("A").copy_(a_rI.expand_as(self.value("A")))
        self.value("B").copy_(b_rO.expand_as(self.value("B")))

    @property
    def ranks(self) -> list[int]:
        """Rows of each expert's factors, those of the frozen term among them."""
        more = self.A_start.shape[1] if self.taken_off() else 0
        return [rank + more for rank in self.config.ranks()]

    def taken_off(self) -> float:
        """See base class; the base that LoftQ starts from lacks the term."""
        lacking = self.in_nf4 and loftq_steps(self.config.init_lora_weights)
        return 0.0 if lacking else self.correction

    def own(self) -> tuple[Tensor, Tensor, float | Tensor]:
        """See base class."""
        A, Bt = self.value("A"), self.value("B")
        if self.scale is not None:
            return A, Bt, self.scale
        dtype = torch.promote_types(A.dtype, torch.float32)
        if self.scale_E.dtype != dtype or self.scale_E.device != A.device:
            # no buffer: casting the model to half precision would round the scales
            self.scale_E = torch.tensor(
                self.config.scales(), dtype=dtype, device=A.device
            )
        return A, Bt, self.scale_E

    def plain_scale(self) -> float | None:
        """See base class."""
        # those that derive from it may make more of the two
        plain = type(self) is LoRAExperts and not self.correction
        plain = plain and self.is_plain("A") and self.is_plain("B")
        return self.scale if plain else None

    def _size(self, name: str) -> int:
        """See base class; padding rows do not count."""
        whole = self.whole(name)
        return sum(self.config.ranks()[: len(whole)]) * whole.shape[-1]
