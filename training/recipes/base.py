"""What a recipe is: what training does to an adapter beside minimising its loss.

A step of the optimizer goes

    start_step -> backward of every micro-batch -> add_penalty -> clipping
    -> before_step -> the optimizer moves the parameters -> after_step
    -> the gradients are dropped

MoloraTrainer calls these. A loop of one's own builds the recipe with ``RECIPES`` and
calls them itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from molora.config import AdapterConfig
from molora.errors import TrainingError
from molora.experts.base import EXPERTS, AbstractExperts, ExpertsConfig
from molora.model import sites
from molora.registry import Registry
from molora.schema import Schema


class RecipeConfig(Schema):
    """Settings of every recipe."""

    kind: str
    """Registered name."""


class Recipe:
    """One way to train, for the experts of some families.

    Args:
        config: Settings.
        model: A wrapped model, on the device that it is trained on or not yet.

    Raises:
        TrainingError: Nothing in the model is of these families, or what is does not
            fit the settings.
    """

    Config: ClassVar[type[RecipeConfig]] = RecipeConfig
    families: ClassVar[tuple[str, ...]] = ()
    """Registered names of the expert families that it trains."""
    one_process: ClassVar[bool] = False
    """Whether it changes which parameters have gradients, which several processes that
    average theirs cannot follow."""

    def __init__(self, config: RecipeConfig, model: nn.Module):
        self.config = config
        self.parts = parts_of(model, self.families)
        """Experts that the recipe trains, by module path."""
        if not self.parts:
            raise TrainingError(
                f"recipe {config.kind!r} trains experts of kind "
                f"{' or '.join(self.families)}, and this model has none; set "
                "experts.kind, or leave the recipe out"
            )
        self.total_steps = 0

    @classmethod
    def check(cls, config: RecipeConfig, adapter: AdapterConfig) -> str | None:
        """Say why this config means nothing with an adapter, or return None."""
        kinds = set().union(*(kinds_of(family) for family in adapter.families()))
        if kinds.isdisjoint(cls.families):
            return (
                f"{config.kind} trains experts of kind {' or '.join(cls.families)}, "
                f"and adapter.experts has {', '.join(sorted(kinds))}; change one of "
                "the two, or leave the recipe out"
            )
        return None

    def begin(self, total_steps: int) -> None:
        """Set out for so many steps of the optimizer; before ``restore``.

        Args:
            total_steps: Of the whole run, those done before a resume included.

        Raises:
            TrainingError: They are too few for the settings.
        """
        self.total_steps = total_steps

    def start_step(self, step: int) -> None:
        """Get ready for the forwards of a step; the one before may have been left out.

        Args:
            step: Its number, from 1.
        """

    def groups(self) -> list[dict[str, Any]]:
        """Parameters with optimizer settings of their own, as parameter groups."""
        return []

    def penalised(self) -> list[nn.Parameter]:
        """What ``penalty`` is a function of; empty where there is no penalty."""
        return []

    def penalty(self) -> Tensor:
        """A scalar that is added to the loss of every step, weighted already."""
        raise NotImplementedError

    def add_penalty(self, scale: float = 1.0) -> Tensor | None:
        """Add the gradient of the penalty to that of the loss, once for every step.

        Gradients are not communicated: processes that have the same parameters add
        the same.

        Args:
            scale: Loss scale of the gradients.

        Returns:
            The penalty; None where there is none.
        """
        moved = [p for p in self.penalised() if p.requires_grad]
        if not moved:
            return None
        with torch.enable_grad():
            penalty = self.penalty()
        found = torch.autograd.grad(penalty, moved)
        for parameter, grad in zip(moved, found, strict=True):
            grad = scale * grad
            if parameter.grad is None:
                parameter.grad = grad
            else:
                parameter.grad += grad
        return penalty.detach()

    def before_step(self, step: int) -> None:
        """See and change the gradients that the optimizer is about to take.

        Args:
            step: Its number, from 1.
        """

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """Change what the optimizer has made; the gradients it took are still there.

        Not called for a step that was left out.

        Args:
            step: Its number, from 1.
            optimizer: Its settings and state.
        """

    def log(self) -> dict[str, float]:
        """Numbers for the log."""
        return {}

    def state(self) -> dict[str, Any]:
        """What a resumed run needs; tensors and plain values."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state`` returned; tensors come on the CPU."""


RECIPES: Registry[Recipe] = Registry("recipe")


def parts_of(model: nn.Module, families: Sequence[str]) -> dict[str, AbstractExperts]:
    """Experts of some families by module path, those inside of others included."""
    classes = [EXPERTS[name] for name in families]
    return {
        f"{path}.experts.{inner}" if inner else f"{path}.experts": part
        for path, site in sites(model).items()
        for inner, part in site.experts.named_modules()
        if isinstance(part, AbstractExperts) and type(part) in classes
    }


def kinds_of(config: ExpertsConfig) -> set[str]:
    """Kinds of an experts block and of those inside of it."""
    inner = config.adapted()
    parts = [kinds_of(part) for part in getattr(inner, "parts", [])]
    return {config.kind, inner.kind}.union(*parts)


def whole(grad: Tensor | None, like: Tensor) -> Tensor:
    """A gradient, zero where there is none."""
    return torch.zeros_like(like) if grad is None else grad
