"""What a recipe is: what training does to an adapter beside minimising its loss.

A step of the optimizer goes

    start_step -> backward of every micro-batch -> after_backward -> clipping
    -> before_step -> the optimizer moves the parameters -> after_step
    -> the gradients are dropped

MoloraTrainer calls these. A loop of one's own builds the recipe with ``RECIPES`` and
calls them itself.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.optim import Optimizer

from molora.config import AdapterConfig
from molora.errors import TrainingError
from molora.experts.base import AbstractExperts, ExpertsConfig
from molora.model import sites
from molora.registry import Registry
from molora.routers import AdapterRouter
from molora.schema import Schema

_APART = (
    "recipe {!r} looks at all experts together, and router.kind adapter trains each by "
    "itself; train them one by one, or leave the recipe out"
)
_PARTLY = (
    "recipe {!r} is for training all experts, and adapter.train is {}; set train: all, "
    "or leave the recipe out"
)


def _is_steps(value: int | float) -> int | float:
    if value >= 1 and value != int(value):
        raise ValueError("give whole steps, or a share of the run below 1")
    return value


Block = TypeVar("Block", bound=ExpertsConfig)

Steps = Annotated[int | float, Field(ge=0), AfterValidator(_is_steps)]
"""Steps of the optimizer; below 1, a share of the run's."""


def steps_of(value: int | float, total_steps: int) -> int:
    """Number of steps that a setting stands for, cut off to whole ones."""
    return int(value * total_steps) if value < 1 else int(value)


class RecipeConfig(Schema):
    """Settings of every recipe."""

    kind: str
    """Registered name."""

    def check_steps(self, total_steps: int) -> str | None:
        """Say why a run of so many steps is too short for this, or return None."""
        return None


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
    held: Callable[[int], Tensor] | None = None
    """Gives the mean loss of the model on the n-th batch of rows that are held out of
    training; the trainer sets it, or the loop of one's own."""

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
        routers = [site.router for site in sites(model).values()]
        if any(isinstance(router, AdapterRouter) for router in routers):
            raise TrainingError(_APART.format(config.kind))
        train = model.molora_config.train  # type: ignore[union-attr]
        if train != "all":
            raise TrainingError(_PARTLY.format(config.kind, train))
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
        if any(router.kind == "adapter" for router in adapter.routers()):
            return _APART.format(config.kind)
        if adapter.train != "all":
            return _PARTLY.format(config.kind, adapter.train)
        return None

    def begin(self, total_steps: int) -> None:
        """Set out for so many steps of the optimizer; before ``restore``.

        Args:
            total_steps: Of the whole run, those done before a resume included.

        Raises:
            TrainingError: They are too few for the settings, or no rows are held out.
        """
        reason = self.config.check_steps(total_steps)
        if reason:
            raise TrainingError(reason)
        self.total_steps = total_steps
        if self.held_share() and self.held is None:
            raise TrainingError(
                f"recipe {self.config.kind!r} needs rows that are held out of "
                "training: set its attribute held"
            )

    def held_share(self) -> float:
        """Share of the training rows that is held out of training; 0 for none."""
        return 0.0

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

    def after_backward(self, scale: float = 1.0) -> Tensor | None:
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
    found: dict[str, AbstractExperts] = {}
    for path, site in sites(model).items():
        for inner, part in site.experts.named_modules():
            if isinstance(part, AbstractExperts) and _kind(part) in families:
                found[f"{path}.experts.{inner}" if inner else f"{path}.experts"] = part
    return found


def _kind(part: Any) -> str:
    name: str = part.config.kind
    return name


def blocks_of(config: ExpertsConfig) -> list[ExpertsConfig]:
    """An experts block and those inside of it."""
    inner = config.adapted()
    found = [config] if inner is config else [config, inner]
    for part in getattr(inner, "parts", []):
        found += blocks_of(part)
    return found


def blocks_in(adapter: AdapterConfig, cls: type[Block]) -> list[Block]:
    """Every experts block of one family in an adapter, those inside of others too."""
    found = [block for family in adapter.families() for block in blocks_of(family)]
    return [block for block in found if isinstance(block, cls)]


def kinds_of(config: ExpertsConfig) -> set[str]:
    """Kinds of an experts block and of those inside of it."""
    return {block.kind for block in blocks_of(config)}


def whole(grad: Tensor | None, like: Tensor) -> Tensor:
    """A gradient, zero where there is none."""
    return torch.zeros_like(like) if grad is None else grad


def gram_error(rows: Tensor) -> Tensor:
    """How far the rows of every matrix are from orthonormal: X X^T - 1.

    Args:
        rows: [E, r, n].

    Returns:
        [E, r, r], at least float32.
    """
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    one = torch.eye(wide.shape[1], dtype=wide.dtype, device=wide.device)
    return wide @ wide.transpose(1, 2) - one
