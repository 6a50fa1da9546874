"""BiLoRA: singular values on one part of the data, singular vectors on the other.

    lower level, every step       P, Q <- a step on L(D1) + orthogonality
    upper level, every T steps    Lambda <- a step on L(D2)

D2 are rows that are held out of training, D1 the others. The lower level leaves Lambda
as it is, the upper one P and Q; routers belong to the lower level. The penalty is

    orth_reg_weight * mean over all experts of |P^T P - 1|_F^2 + |Q Q^T - 1|_F^2

Reference: Qiang et al. 2024, arXiv:2403.13037, section 3; no code was published.
The gradient of the upper level is that of L(D2) at the present P and Q: how these would
move with Lambda is left out (first order).
"""

import logging
from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from molora.config import AdapterConfig
from molora.errors import TrainingError
from molora.experts.bilora import BiLoRAExperts
from molora.training.recipes.base import (
    RECIPES,
    Recipe,
    RecipeConfig,
    blocks_in,
    gram_error,
)

logger = logging.getLogger(__name__)


@RECIPES.register("bilora", paper="arXiv:2403.13037")
class BiLoRA(Recipe):
    """Trains the singular values of BiLoRA experts on rows that are held out.

    Limitations: the upper level is of first order and moves by AdamW without decay; the
    paper's regulariser towards binary values is left out. An upper step costs another
    forward and backward.

    Args:
        config: Settings.
        model: A wrapped model with bilora experts.

    Raises:
        TrainingError: Their Lambda is not trained.
    """

    families = ("bilora",)
    one_process = True

    class Config(RecipeConfig):
        """Settings of the two levels."""

        kind: Literal["bilora"] = "bilora"
        """Registered name."""
        held_share: float = pydantic.Field(default=0.2, gt=0, lt=1)
        """Share of every task's training rows that the upper level has."""
        lower_steps: int = pydantic.Field(default=1, ge=1)
        """T, steps of the lower level to one of the upper."""
        upper_learning_rate: float | None = pydantic.Field(default=None, gt=0)
        """Of Lambda; null is that of the run at the step."""
        orth_reg_weight: float = pydantic.Field(default=0.1, ge=0)
        """Coefficient of the orthogonality penalty; 0 leaves it out."""

    config: Config

    def __init__(self, config: Config, model: nn.Module):
        super().__init__(config, model)
        for path, part in self.parts.items():
            assert isinstance(part.config, BiLoRAExperts.Config)
            _check(path, part.config)
        self.values = [p for part in self.parts.values() for p in _own(part, "Lambda")]
        """Every Lambda, those that layers share once."""
        self.upper = torch.optim.AdamW(self.values, weight_decay=0.0)
        self._loss: Tensor | None = None

    @classmethod
    def check(cls, config: RecipeConfig, adapter: AdapterConfig) -> str | None:
        """See base class."""
        for block in blocks_in(adapter, BiLoRAExperts.Config):
            try:
                _check("adapter.experts", block)
            except TrainingError as error:
                return str(error)
        return super().check(config, adapter)

    def held_share(self) -> float:
        """See base class."""
        return self.config.held_share

    def penalised(self) -> list[nn.Parameter]:
        """See base class."""
        if not self.config.orth_reg_weight:
            return []
        names = ("A", "Bt")
        return [p for n in names for part in self.parts.values() for p in _own(part, n)]

    def penalty(self) -> Tensor:
        """See base class."""
        total = torch.zeros((), device=self.values[0].device)
        for name in ("A", "Bt"):
            stacks = [p for part in self.parts.values() for p in _own(part, name)]
            squares = [gram_error(p).square().sum((1, 2)) for p in stacks]
            if squares:
                total = total + torch.cat([s.to(total.device) for s in squares]).mean()
        return self.config.orth_reg_weight * total

    def after_backward(self, scale: float = 1.0) -> Tensor | None:
        """See base class; the singular values get no gradient of the lower level."""
        for values in self.values:
            values.grad = None
        return super().after_backward(scale)

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """See base class."""
        if step % self.config.lower_steps:
            return
        assert self.held is not None
        loss = self.held(step // self.config.lower_steps - 1)
        self._loss = loss.detach()
        grads = torch.autograd.grad(loss, self.values)
        rate = self.config.upper_learning_rate
        for group in self.upper.param_groups:
            group["lr"] = optimizer.param_groups[0]["lr"] if rate is None else rate
        for values, grad in zip(self.values, grads, strict=True):
            values.grad = grad
        if all(bool(grad.isfinite().all()) for grad in grads):
            self.upper.step()
        else:
            logger.warning(
                "step %d: the gradient on held-out rows is not finite, so the singular "
                "values stay as they are",
                step,
            )
        self.upper.zero_grad()

    def log(self) -> dict[str, float]:
        """See base class; loss of the last upper step."""
        return {} if self._loss is None else {"held_loss": float(self._loss)}

    def state(self) -> dict[str, Any]:
        """See base class."""
        return {"upper": self.upper.state_dict(), "loss": self._loss}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See base class."""
        self.upper.load_state_dict(state["upper"])
        self._loss = state["loss"]


def _own(part: nn.Module, name: str) -> list[nn.Parameter]:
    """A tensor of one layer, unless another layer keeps it or it is not trained."""
    found = getattr(part, name, None)
    return [found] if isinstance(found, nn.Parameter) and found.requires_grad else []


def _check(path: str, experts: BiLoRAExperts.Config) -> None:
    """Refuse experts without an upper level."""
    if experts.trainability.get("Lambda") in ("frozen", "seeded"):
        raise TrainingError(
            f"{path}: recipe 'bilora' trains Lambda on its own, and trainability: "
            f"{experts.trainability} does not train it; take it out of there"
        )
