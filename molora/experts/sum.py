"""Sums of families: delta_e(x) = sum_p delta_{p, e}(x) over the parts p.

RoSA (Nikdan et al. 2024, arXiv:2401.04679) is low-rank plus sparse:

    y = W x + s B A x + S x

with S = ``sparse`` (unscaled) beside ``lora``. The recipe ``rosa`` of training warms
``lora`` up and chooses the places of S by gradients. All parts have the same number of
experts, and an expert's gate weights all of its parts.

Shape legend: see base.py.
"""

from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor, nn

from molora.errors import ConfigError
from molora.experts.base import EXPERTS, AbstractExperts, ExpertsConfig
from molora.experts.factor_config import FactorConfig


@EXPERTS.register("sum", paper="arXiv:2401.04679")
class SumExperts(AbstractExperts):
    """E sums of updates of other families (RoSA: lora and sparse).

    Limitations: parts must be updates that are added to the layer's output, and
    share no tensors among layers; a sum has no PEFT format and no low-rank factors,
    even where its parts have.

    Args:
        config: Settings.
        in_features: I.
        out_features: O.
        generator: Source of the initial values of all parts, in their order.

    Raises:
        WrapError: See the parts.
    """

    class Config(ExpertsConfig):
        """Settings of a sum of families."""

        kind: Literal["sum"] = "sum"
        """Registered name."""
        parts: list[pydantic.SerializeAsAny[ExpertsConfig]] = pydantic.Field(
            min_length=2
        )
        """Experts blocks of the parts, without num_experts, which the sum has."""

        @pydantic.field_validator("parts", mode="before")
        @classmethod
        def _built(cls, raw: Any, info: pydantic.ValidationInfo) -> Any:
            count = info.data.get("num_experts")
            if not isinstance(raw, list) or count is None:
                return raw
            built, problems = list(raw), []
            for i, item in enumerate(raw):
                try:
                    if isinstance(item, Mapping):
                        built[i] = _part(item, count, f"parts[{i}]")
                except ConfigError as error:
                    problems.append(str(error))
            if problems:
                raise ConfigError("\n".join(problems))
            return built

        @pydantic.field_serializer("parts")
        def _as_given(
            self, parts: list[ExpertsConfig], info: pydantic.SerializationInfo
        ) -> list[dict[str, Any]]:
            return [
                {
                    "kind": part.kind,
                    **part.model_dump(
                        mode=info.mode,
                        exclude={"num_experts"},
                        exclude_unset=info.exclude_unset,
                    ),
                }
                for part in parts
            ]

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
        self.num_experts = config.num_experts
        found = [
            EXPERTS[part.kind](
                part,
                in_features=in_features,
                out_features=out_features,
                generator=generator,
            )
            for part in config.parts
        ]
        self.parts = nn.ModuleList(found)
        self.starts_at_zero = all(part.starts_at_zero for part in found)

    def _parts(self) -> list[AbstractExperts]:
        found = []
        for part in self.parts:
            assert isinstance(part, AbstractExperts)
            found.append(part)
        return found

    def start(self, weight: Tensor) -> None:
        """See base class."""
        for part in self._parts():
            part.start(weight)

    def forward(
        self,
        x: Tensor,
        gates: Tensor | None,
        base: Tensor,
        top_k: int | None = None,
    ) -> Tensor:
        """See base class."""
        for part in self._parts():
            base = part(x, gates, base, top_k)
        return base

    def delta_weight(self, expert: int, weight: Tensor) -> Tensor:
        """See base class."""
        first, *others = (p.delta_weight(expert, weight) for p in self._parts())
        return sum(others, start=first)

    def delta_bias(self, expert: int, bias: Tensor) -> Tensor | None:
        """See base class."""
        found = [part.delta_bias(expert, bias) for part in self._parts()]
        changes = [change for change in found if change is not None]
        return sum(changes[1:], start=changes[0]) if changes else None

    def count(self) -> int:
        """See base class."""
        return sum(part.count() for part in self._parts())


def _part(raw: Mapping[str, Any], count: int, where: str) -> ExpertsConfig:
    """Settings of one part with the number of experts of the sum.

    Raises:
        ConfigError: They are wrong, or the family cannot be a part.
    """
    names = ", ".join(name for name in EXPERTS.names() if EXPERTS[name].adds)
    if "kind" not in raw:
        raise ConfigError(f"{where}.kind: this field is required; one of {names}")
    if "num_experts" in raw:
        raise ConfigError(
            f"{where}.num_experts: all parts have the num_experts of the sum; drop it"
        )
    try:
        family = EXPERTS[str(raw["kind"])]
    except ConfigError as error:
        raise ConfigError(f"{where}.kind: {error}") from None
    if not family.adds:
        what = "changes what the layer reads or multiplies what it makes"
        raise ConfigError(
            f"{where}.kind: {raw['kind']} {what if family.linear else 'is nonlinear'}, "
            f"so the result would be no sum of updates; one of {names}"
        )
    config = family.Config.from_dict({**raw, "num_experts": count}, where)
    scopes = config.scopes() if isinstance(config, FactorConfig) else {}
    wide = sorted(name for name, scope in scopes.items() if scope != "experts")
    if wide:
        raise ConfigError(
            f"{where}.shared: {', '.join(wide)} would be shared among layers, which "
            f"parts of a sum are not; set shared: [{', '.join(wide)}], which shares "
            "within a layer, or leave the scope out"
        )
    return config
