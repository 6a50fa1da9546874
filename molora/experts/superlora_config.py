"""Settings of SuperLoRA experts; what they mean stands in superlora.py."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import pydantic

from molora.experts.factor_config import SharedConfig, Side


class SuperLoRAConfig(SharedConfig):
    """Settings of SuperLoRA experts."""

    TENSORS: ClassVar[Mapping[str, Side]] = {"groups": "entries"}
    SHARED_BY: ClassVar[str] = "scope"

    kind: Literal["superlora"] = "superlora"
    """Registered name."""
    r: int = pydantic.Field(default=4, ge=1)
    """Rank along every axis."""
    alpha: float = pydantic.Field(default=4.0, gt=0)
    """Numerator of the scale."""
    order: int = pydantic.Field(default=3, ge=2, le=8)
    """M, axes that a group is folded to."""
    scope: Literal["site", "layer", "type", "model"] = "site"
    """Target layers whose weights stand in the same groups: the site alone, those
    of one layer of the model, of one place in every layer, or all."""
    groups: int = pydantic.Field(default=1, ge=1)
    """G, parts of these weights with tensors of their own."""
    fold: Literal["square", "weight"] = "square"
    """Fold to equal sides, or along the sides of the weights."""
    core: Literal["dense", "diagonal"] = "dense"
    """Trained core, or ones on the diagonal."""
    projection: Literal["random", "fastfood"] | None = None
    """Fixed map from fewer values to the entries of a group."""
    projection_ratio: float | None = pydantic.Field(default=None, gt=0, lt=1)
    """Values that it maps, as a share of the entries."""
    shuffle: bool = False
    """Permute the entries of a group, in a fixed way."""
    projection_prng_key: int | None = pydantic.Field(default=None, ge=0)
    """Seed of projection and shuffle, which are drawn again and not saved; None is
    0."""

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Self:
        if self.fold == "weight" and self.scope == "site" and self.groups > 1:
            raise ValueError(
                "groups: fold: weight needs groups 1 in scope site, because a part "
                "of a weight has not its sides; fold: square has any number"
            )
        fixed = self.projection is not None or self.shuffle
        if self.fold == "weight" and fixed:
            raise ValueError(
                "fold: weight follows the sides of the weight, which projection "
                "and shuffle mix up; set fold: square"
            )
        if (self.projection is None) != (self.projection_ratio is None):
            raise ValueError(
                "projection_ratio: belongs to projection: random or fastfood; set "
                "both or neither"
            )
        if self.projection_prng_key is not None and not fixed:
            raise ValueError(
                "projection_prng_key: there is no projection or shuffle to seed"
            )
        return self

    def scopes(self) -> dict[str, str]:
        """See base class; all tensors have one scope."""
        return {} if self.scope == "site" else {"groups": self.scope}

    def alike(self, name: str) -> dict[str, Any]:
        """See base class; all settings."""
        return self.model_dump()
