"""Expert counts that vary with depth, for a model of any number of layers.

The layers are cut into groups of even size, alike from both ends, and each group has
its own number of experts: from the bottom to the top, with counts 2, 4, 6, 8,

    triangle            8 6 4 2
    inverted_triangle   2 4 6 8
    hourglass           8 6 4 2 2 4 6 8
    rectangle           one count for all

Reference: Gao et al. 2024 (MoLA), arXiv:2402.08562, figure 2. Its models are triangle
and inverted_triangle with [2, 4, 6, 8], hourglass with [2, 8], rectangle with [5].
"""

from collections.abc import Iterable
from typing import Annotated, Literal, Self

import pydantic

from molora.errors import WrapError
from molora.schema import Schema
from molora.usage import layer_of

Count = Annotated[int, pydantic.Field(ge=1)]


class Layout(Schema):
    """How many experts the layers have, by their depth."""

    shape: Literal["triangle", "inverted_triangle", "hourglass", "rectangle"]
    """Where the experts are: triangle has most of them at the bottom, hourglass at both
    ends."""
    counts: list[Count] = pydantic.Field(min_length=1)
    """Experts per target layer, ascending; the shape puts them in order."""
    layers: int | None = pydantic.Field(default=None, ge=1)
    """Depth of the model; found when it is wrapped."""

    @pydantic.model_validator(mode="after")
    def _fits_shape(self) -> Self:
        ordered = sorted(set(self.counts))
        if self.counts != ordered:
            raise ValueError(
                f"counts: list each number once, ascending, as {ordered}; the shape "
                f"orders them (got {self.counts})"
            )
        if (self.shape == "rectangle") != (len(self.counts) == 1):
            raise ValueError(
                f"counts: {self.shape} takes "
                f"{'one number' if self.shape == 'rectangle' else 'several numbers'}"
                f" (got {self.counts})"
            )
        return self

    def groups(self) -> list[int]:
        """Count of each group of layers, from the bottom."""
        falling = self.counts[::-1]
        return {
            "triangle": falling,
            "inverted_triangle": self.counts,
            "hourglass": [*falling, *self.counts],
            "rectangle": self.counts,
        }[self.shape]

    def count(self, path: str) -> int:
        """Experts of the target layer at a module path.

        Raises:
            WrapError: The path names no layer, or the depth is not known yet.
        """
        layer = layer_of(path)
        if not layer.isdigit():
            raise WrapError(
                f"layout: target {path!r} belongs to no numbered layer, so it has no "
                "depth; add it to exclude_modules"
            )
        if self.layers is None:
            raise WrapError("layout.layers: the depth is known once a model is wrapped")
        groups = self.groups()
        return groups[group_of(int(layer), self.layers, len(groups))]

    def placed(self, modules: list[str], targets: list[str]) -> Self:
        """The same layout with the depth of a model filled in.

        Args:
            modules: Every module path of the model.
            targets: Paths of the target layers.

        Raises:
            WrapError: Targets lie in several stacks of layers, there are fewer layers
                than groups, or ``layers`` is set to another depth.
        """
        stacks = {_stack(path) or "" for path in targets if layer_of(path).isdigit()}
        if len(stacks) != 1:
            raise WrapError(
                f"layout: needs targets in one stack of layers, found {sorted(stacks)};"
                " exclude the others, or set num_experts by overrides instead"
            )
        stack = stacks.pop()
        numbers = [int(layer_of(p)) for p in modules if _stack(p) == stack]
        depth, groups = 1 + max(numbers), len(self.groups())
        if self.layers not in (None, depth):
            raise WrapError(f"layout.layers={self.layers}: the model has {depth}")
        if depth < groups:
            raise WrapError(
                f"layout: {self.shape} with counts {self.counts} makes {groups} groups "
                f"of layers, but the model has {depth} layers; give fewer counts"
            )
        return self.model_copy(update={"layers": depth})


def group_of(layer: int, layers: int, groups: int) -> int:
    """Group that a layer's middle falls into, mirrored around the middle of the model.

    Args:
        layer: Number of the layer, from 0.
        layers: Depth of the model.
        groups: Number of groups, at most ``layers``.
    """
    if 2 * layer + 1 > layers:
        return groups - 1 - group_of(layers - 1 - layer, layers, groups)
    return (2 * layer + 1) * groups // (2 * layers)


def depths(modules: Iterable[str]) -> dict[str, float | None]:
    """How deep each module stands in its stack of layers.

    Args:
        modules: Every module path of the model.

    Returns:
        By path: 0 in the first layer, 1 in the last, 0.5 in the only one; None outside
        of any.
    """
    found: dict[str, float | None] = {}
    numbers: dict[str, list[tuple[str, int]]] = {}
    for path in modules:
        found[path], stack = None, _stack(path)
        if stack is not None:
            numbers.setdefault(stack, []).append((path, int(layer_of(path))))
    for members in numbers.values():
        last = max(number for _, number in members)
        for path, number in members:
            found[path] = number / last if last else 0.5
    return found


def _stack(path: str) -> str | None:
    """What stands before the layer number of a path; None without a number."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return None if number is None else ".".join(parts[:number])
