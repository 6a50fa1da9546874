"""Settings of bilinear families: what is shared, and what is not simply trained.

What the settings mean stands in factors.py.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, get_args

import pydantic

from molora.experts.base import ExpertsConfig

Scope = Literal["experts", "layer", "type", "model"]
Trained = Literal["frozen", "seeded", "masked"]
Side = Literal["in", "out", "rank", "entries"]
"""What the last axis of a tensor is; ``entries``: those of the weights of all layers
that share it, one after the other."""


class SharedConfig(ExpertsConfig):
    """Settings of a family whose tensors layers can share."""

    TENSORS: ClassVar[Mapping[str, Side]]
    """Tensors of the family, and what their last axis is."""
    SHARED_BY: ClassVar[str] = "shared"
    """The setting that says which are shared."""

    def scopes(self) -> dict[str, str]:
        """Scope of every shared tensor."""
        return {}

    def alike(self, name: str) -> dict[str, Any]:
        """Settings that layers which share a tensor must have in common."""
        return {}


class FactorConfig(SharedConfig):
    """Settings of every bilinear family."""

    TENSORS: ClassVar[Mapping[str, Side]] = {"A": "in", "B": "out"}
    ZERO: ClassVar[tuple[str, ...]] = ("B",)
    """Those that start at zero."""

    lora_dropout: float = pydantic.Field(default=0.0, ge=0, lt=1)
    """Dropout on the bank's input in training, one mask for all experts."""
    shared: list[str] | dict[str, str] = []
    """Tensors that are shared: a list of those that all experts of a layer share, or a
    mapping from tensor to scope (experts, layer, type, model)."""
    trainability: dict[str, Trained] = {}
    """Tensors that are not simply trained: frozen, seeded or masked."""
    density: float | None = pydantic.Field(default=None, gt=0, le=1)
    """Share of the entries of a masked tensor that train, drawn at random; None: all of
    them, until ``molora.mask_by_magnitude``."""
    projection_prng_key: int | None = pydantic.Field(default=None, ge=0)
    """Seed of the seeded tensors; None is 0."""

    @pydantic.field_validator("shared", "trainability")
    @classmethod
    def _names_tensors(cls, value: Any) -> Any:
        unknown = [name for name in value if name not in cls.TENSORS]
        if unknown:
            raise ValueError(
                f"there is no tensor {unknown[0]!r}; there are {', '.join(cls.TENSORS)}"
            )
        if isinstance(value, list) and len(set(value)) < len(value):
            raise ValueError("a tensor is listed twice")
        return value

    @pydantic.field_validator("shared")
    @classmethod
    def _names_scopes(cls, value: list[str] | dict[str, str]) -> Any:
        for scope in value.values() if isinstance(value, dict) else ():
            if scope not in get_args(Scope):
                raise ValueError(
                    f"there is no scope {scope!r}; there are "
                    f"{', '.join(get_args(Scope))}"
                )
        return value

    @pydantic.model_validator(mode="after")
    def _sharing_means_something(self) -> Self:
        scopes = self.scopes()
        several = self.num_experts > 1 or set(scopes.values()) == {"experts"}
        if len(scopes) == len(self.tensors()) and several:
            raise ValueError(
                f"shared: experts that share {' and '.join(scopes)} would all be the "
                "same expert; leave one of them out"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _trains_something(self) -> Self:
        kinds = set(self.trainability.values())
        for name, kind in self.trainability.items():
            zero = name in self.zero_tensors()
            if kind == "masked" and not zero:
                raise ValueError(
                    f"trainability: {name} starts at random values, and a mask keeps "
                    "what it hides at zero; mask "
                    f"{' or '.join(self.zero_tensors())}"
                )
            if kind != "masked" and zero:
                raise ValueError(
                    f"trainability: {name} starts at zero; {kind} it would stay there, "
                    "and the update with it, whatever else is trained"
                )
        if self.density is not None and "masked" not in kinds:
            raise ValueError("density: no tensor is masked, so nothing reads it")
        if self.projection_prng_key is not None and "seeded" not in kinds:
            raise ValueError(
                "projection_prng_key: no tensor is seeded, so nothing reads it"
            )
        return self

    def scopes(self) -> dict[str, str]:
        """See base class."""
        if isinstance(self.shared, dict):
            return self.shared
        return dict.fromkeys(self.shared, "experts")

    def alike(self, name: str) -> dict[str, Any]:
        """See base class."""
        starts = {"A": "init_lora_weights", "lambda_d": "d_initial"}
        start = starts.get(name)
        return {
            "trainability": self.trainability.get(name),
            "density": self.density,
            "projection_prng_key": self.projection_prng_key,
            **({start: getattr(self, start, None)} if start else {}),
        }

    def tensors(self) -> tuple[str, ...]:
        """Tensors that there are with these settings."""
        return tuple(self.TENSORS)

    def zero_tensors(self) -> tuple[str, ...]:
        """Tensors that start at zero."""
        return self.ZERO
