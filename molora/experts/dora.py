"""DoRA experts: the direction of V_e is adapted by another family, its norms freely.

    V_e = W + DeltaW_e              c_e = row norms of V_e, a constant in backward
    delta_e(x) = (m_e / c_e - 1) * W x + (m_e / c_e) * DeltaW_e x

Reference: Liu et al. 2024, arXiv:2402.09353, equation 5, with the detached norm of its
section 4.3. The paper's columns are the rows of a weight stored [O, I]. m starts at c,
so that the update is that of the inner family, which is zero for most.

Around a low-rank family nothing dense is made: m / c is folded into Bt, the term of the
base is one [T, E] by [E, O] product, and

    |V_e|^2 = |W|^2 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B A A^T) * B)

Shape legend: see base.py.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from molora.errors import ConfigError, WrapError
from molora.experts.base import (
    EXPERTS,
    AbstractExperts,
    BilinearExperts,
    ExpertsConfig,
    Part,
    mixed,
)
from molora.experts.factors import Place
from molora.experts.magnitude import magnified, require_norms, row_norms
from molora.experts.peft_form import PeftForm
from molora.experts.start import require_values
from molora.kernels import Layer


@EXPERTS.register("dora", paper="arXiv:2402.09353")
class DoRAExperts(AbstractExperts):
    """Experts of another linear family, and a magnitude for each output of each.

    Limitations: dropout is on the inner update alone; PEFT's DoRA drops values of the
    base term as well. Without a gradient the norms are kept until a tensor changes
    (kept.py). Around a family that is not low-rank they take one dense update at a
    time, and in training every expert runs twice.

    Args:
        config: Settings.
        in_features: I.
        out_features: O.
        generator: Source of the initial values of the inner family.
        places: Of the inner family's tensors that layers share.
    """

    class Config(ExpertsConfig):
        """Settings of DoRA experts."""

        kind: Literal["dora"] = "dora"
        """Registered name."""
        inner: dict[str, Any] = {"kind": "lora"}
        """Settings of the family that adapts the direction, without num_experts."""

        @pydantic.model_validator(mode="after")
        def _inner_fits(self) -> "DoRAExperts.Config":
            for part in getattr(self.adapted(), "parts", [self.adapted()]):
                _check_family(EXPERTS[part.kind])
            return self

        def adapted(self) -> ExpertsConfig:
            """Settings of the inner family.

            Raises:
                ConfigError: They are wrong.
            """
            if "num_experts" in self.inner:
                raise ConfigError("inner.num_experts: set num_experts of dora instead")
            if "kind" not in self.inner:
                names = ", ".join(EXPERTS.names())
                raise ConfigError(f"inner.kind: this field is required; one of {names}")
            try:
                family = EXPERTS[str(self.inner["kind"])]
            except ConfigError as error:
                raise ConfigError(f"inner.kind: {error}") from None
            settings = {**self.inner, "num_experts": self.num_experts}
            return family.Config.from_dict(settings, "inner")

    takes_layer = True
    peft_type: ClassVar[str | None] = "LORA"

    def __init__(
        self,
        config: Config,
        *,
        in_features: int,
        out_features: int,
        generator: torch.Generator,
        places: Mapping[str, Place] | None = None,
    ):
        super().__init__()
        self.config = config
        self.num_experts = config.num_experts
        settings = config.adapted()
        family: Any = EXPERTS[settings.kind]
        self.inner: AbstractExperts = family(
            settings,
            in_features=in_features,
            out_features=out_features,
            generator=generator,
            **({"places": places} if places else {}),
        )
        self.starts_at_zero = self.inner.starts_at_zero
        self.magnitude = nn.Parameter(torch.ones(self.num_experts, out_features))

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        """See base class.

        Raises:
            WrapError: A row of the weight is zero, which has no direction, or the
                weight holds no values yet.
        """
        require_values(weight, "experts.kind dora")
        self.inner.frozen_weight = self.frozen_weight
        self.inner.frozen_bias = self.frozen_bias
        self.inner.start(weight)
        norms_EO = self.norms(weight)
        require_norms(norms_EO, weight)
        self.magnitude.copy_(norms_EO)

    def forward(
        self,
        x: Tensor,
        gates: Tensor | None,
        base: Tensor | Layer | None,
        top_k: int | None = None,
    ) -> Tensor:
        """See base class; base may be the layer or None as for ``BilinearExperts``."""
        if base is None:
            plain_TO = nn.functional.linear(x, self.frozen_weight().to(x.dtype))
            return self._added(x, gates, plain_TO, None, top_k) - plain_TO
        return self._added(x, gates, base, self.frozen_bias(), top_k)

    def _added(
        self,
        x: Tensor,
        gates: Tensor | None,
        base: Tensor | Layer,
        bias_O: Tensor | None,
        top_k: int | None,
    ) -> Tensor:
        """Base output plus updates; the bias is what the base output holds."""
        ratio_EO, parts = self.kept(self._scaled)

        def scaled(y_TO: Tensor) -> Tensor:
            return magnified(y_TO, bias_O, gates, ratio_EO)

        def around(x_TI: Tensor) -> Tensor:
            assert not isinstance(base, Tensor)
            return scaled(base(x_TI))

        given = scaled(base) if isinstance(base, Tensor) else around
        if parts:
            return mixed(parts, x, gates, given, top_k, self.training)
        plain_TO = base if isinstance(base, Tensor) else base(x)
        y_TO = scaled(plain_TO)
        for expert in range(self.num_experts):
            call = (x, gates, plain_TO, ratio_EO[expert], expert)
            y_TO = y_TO + checkpoint(self._of_one, *call, use_reentrant=False)
        return y_TO

    def sources(self) -> list[Tensor]:
        """See base class; the norms are those of the frozen weight too."""
        return [self.magnitude, *self.inner.sources(), *self.frozen_sources()]

    def _scaled(self) -> tuple[Tensor, list[Part]]:
        """Ratios m / c [E, O], and the parts of a low-rank family times that."""
        ratio_EO = self.magnitude / self.norms(self.frozen_weight())
        # a forward of its own may do more than its parts say
        if type(self.inner).forward is not BilinearExperts.forward:
            return ratio_EO, []
        assert isinstance(self.inner, BilinearExperts)
        r_E1O = ratio_EO.unsqueeze(1)
        return ratio_EO, [p._replace(Bt=p.Bt * r_E1O) for p in self.inner.parts()]

    def _of_one(
        self,
        x: Tensor,
        gates: Tensor | None,
        plain_TO: Tensor,
        ratio_O: Tensor,
        expert: int,
    ) -> Tensor:
        """Gated inner update of one expert, with its magnitude."""
        if gates is not None:
            chosen_E = torch.arange(self.num_experts, device=gates.device) == expert
            gates = gates * chosen_E
        wide_TO = plain_TO.to(ratio_O.dtype)
        update_TO: Tensor = self.inner(x, gates, wide_TO, 1) - wide_TO
        return (update_TO * ratio_O).to(plain_TO.dtype)

    @torch.no_grad()
    def norms(self, weight: Tensor) -> Tensor:
        """Row norms c [E, O] of every V_e, at least float32.

        Args:
            weight: The frozen weight, [O, I].
        """
        with torch.autocast(weight.device.type, enabled=False):
            if isinstance(self.inner, BilinearExperts):
                c_EO = row_norms(weight, *self.inner.factors())
                return c_EO.expand(self.num_experts, -1)
            wide_OI = weight.to(torch.promote_types(weight.dtype, torch.float32))
            experts = range(self.num_experts)
            each = (wide_OI + self.inner.delta_weight(e, wide_OI) for e in experts)
            return torch.stack([torch.linalg.vector_norm(v_OI, dim=1) for v_OI in each])

    @torch.no_grad()
    def delta_weight(self, expert: int, weight: Tensor) -> Tensor:
        """See base class."""
        wide_OI = weight.to(torch.promote_types(weight.dtype, torch.float32))
        v_OI = wide_OI + self.inner.delta_weight(expert, wide_OI)
        c_O1 = torch.linalg.vector_norm(v_OI, dim=1, keepdim=True)
        grown_OI: Tensor = self.magnitude[expert].unsqueeze(1) / c_O1 * v_OI
        return grown_OI - wide_OI

    def adapted(self) -> AbstractExperts:
        """See base class."""
        return self.inner

    def count(self) -> int:
        """See base class."""
        return self.magnitude.numel() + self.inner.count()

    def to_peft(self, expert: int) -> PeftForm:
        """See base class: a LoRA with ``use_dora``.

        Raises:
            WrapError: The inner family is no product of two factors.
        """
        inner = self.inner
        if not isinstance(inner, BilinearExperts):
            raise WrapError(
                f"PEFT has DoRA around low-rank factors alone, and "
                f"{type(inner).__name__} has none"
            )
        A, Bt, _ = inner.factors()
        rank = A.shape[1]
        tensors = {
            "lora_A.weight": A[expert % len(A)].detach(),
            "lora_B.weight": Bt[expert % len(Bt)].detach().t(),
            "lora_magnitude_vector": self.magnitude[expert].detach(),
        }
        alpha = inner.scales()[expert] * rank
        settings = {"r": rank, "lora_alpha": alpha, "use_dora": True}
        return PeftForm("LORA", settings, tensors)

    @classmethod
    def from_peft(
        cls,
        settings: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        in_features: int,
        out_features: int,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See base class."""
        if not settings.get("use_dora"):
            raise WrapError("this PEFT LoRA has use_dora false; it is of kind lora")
        inner = {
            "kind": "lora",
            "r": settings["r"],
            "lora_alpha": float(settings["lora_alpha"]),
            "use_rslora": bool(settings.get("use_rslora")),
        }
        state = {
            "inner.A": tensors["lora_A.weight"].unsqueeze(0),
            "inner.Bt": tensors["lora_B.weight"].t().unsqueeze(0).contiguous(),
            "magnitude": tensors["lora_magnitude_vector"].unsqueeze(0),
        }
        return {"kind": "dora", "num_experts": 1, "inner": inner}, state


def _check_family(family: type[AbstractExperts]) -> None:
    """Refuse families whose updates are no map that is added to the frozen layer."""
    plain, why = AbstractExperts, None
    if family is DoRAExperts:
        why = "has magnitudes already"
    elif not family.linear:
        why = "is not linear, so there is no weight to take norms of"
    elif family.edit_input is not plain.edit_input:
        why = "changes what the layer reads"
    elif family.delta_bias is not plain.delta_bias:
        why = "changes the bias of the layer"
    if why:
        raise ConfigError(
            f"inner.kind: {family.__name__} {why}; dora goes around families that add "
            "a linear map, such as lora"
        )
