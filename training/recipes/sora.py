"""SoRA: gates that a proximal step sets to zero, and the ranks behind them with it.

After every step of the optimizer, on every gate g,

    g <- sign(g) max(|g| - xi, 0)        xi = lambda, or eta lambda with multiply_lr
    g <- 0 where |g| < xi                the authors' code, unless hard_threshold: false

with the learning rate eta of the gates, and to the loss is added

    sparse_lambda * mean over all gates of |g|

A gate at zero has a gradient and may open again. lambda is prox_lambda, or goes in
lambda_num equal phases of the run from prox_lambda to max_lambda:

    linear       evenly
    log_linear   log of what goes evenly from e^prox_lambda to e^max_lambda
    exp_linear   e to what goes evenly from log prox_lambda to log max_lambda

Reference: Ding et al. 2023, arXiv:2311.11696, section 3, whose form is
multiply_lr: true, hard_threshold: false and sparse_lambda: 0; the defaults are those of
the authors' code. Its phases are runs to the end; here they are parts of one.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, Self

import pydantic
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from molora.config import AdapterConfig
from molora.errors import TrainingError
from molora.experts.sora import SoRAExperts
from molora.training.recipes.base import RECIPES, Recipe, RecipeConfig, blocks_in

_SCALES: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "linear": (float, float),
    "log_linear": (math.exp, math.log),
    "exp_linear": (math.log, math.exp),
}
"""To the scale on which a schedule is even, and back."""


@RECIPES.register("sora", paper="arXiv:2311.11696")
class SoRA(Recipe):
    """Thresholds the gates of SoRA experts.

    Gates are a parameter group of their own, without weight decay.

    Limitations: how many ranks stay follows from the learning rate, the number of steps
    and both lambdas; no number is promised. The gates move by the run's optimizer; the
    authors' AdamW differs from it in where eps stands.

    Args:
        config: Settings.
        model: A wrapped model with sora experts.

    Raises:
        TrainingError: Some gate is not trained.
    """

    families = ("sora",)

    class Config(RecipeConfig):
        """Settings of SoRA's thresholds."""

        kind: Literal["sora"] = "sora"
        """Registered name."""
        sparse_lambda: float = pydantic.Field(default=10.0, ge=0)
        """Coefficient of the penalty; 0 leaves it out."""
        prox_lambda: float = pydantic.Field(default=3e-4, ge=0)
        """lambda of the threshold, or its first value under a schedule."""
        multiply_lr: bool = False
        """Whether the threshold is lambda times the learning rate of the gates."""
        hard_threshold: bool = True
        """Whether what the soft threshold leaves below itself is set to zero too."""
        gate_learning_rate: float | None = pydantic.Field(default=None, gt=0)
        """Learning rate of the gates, under the schedule of the run; null is its."""
        lambda_schedule: Literal["linear", "log_linear", "exp_linear"] | None = None
        """How lambda goes to max_lambda; null keeps it."""
        max_lambda: float | None = pydantic.Field(default=None, gt=0)
        """Last lambda of the schedule."""
        lambda_num: int | None = pydantic.Field(default=None, ge=2)
        """Phases of the schedule."""

        @pydantic.model_validator(mode="after")
        def _means_something(self) -> Self:
            if self.lambda_schedule is None:
                for name in ("max_lambda", "lambda_num"):
                    if getattr(self, name) is not None:
                        raise ValueError(
                            f"{name}: nothing reads it without lambda_schedule; set "
                            "that too, or leave it out"
                        )
                if not self.prox_lambda:
                    raise ValueError(
                        "prox_lambda: at 0 nothing is pruned, since a penalty alone "
                        "leaves no gate at zero; set it above 0, or a lambda_schedule "
                        "that begins there"
                    )
                return self
            if self.max_lambda is None or self.lambda_num is None:
                raise ValueError(
                    "lambda_schedule: needs max_lambda and lambda_num beside it"
                )
            if self.max_lambda <= self.prox_lambda:
                raise ValueError(
                    f"max_lambda: {self.max_lambda} is where the schedule ends, and "
                    f"prox_lambda={self.prox_lambda}, where it begins, must be below"
                )
            if self.lambda_schedule == "exp_linear" and not self.prox_lambda:
                raise ValueError("prox_lambda: exp_linear begins above 0")
            return self

        def lambdas(self) -> list[float]:
            """Lambda of every phase."""
            first, last, count = self.prox_lambda, self.max_lambda, self.lambda_num
            if last is None or count is None:
                return [first]
            to, back = _SCALES[str(self.lambda_schedule)]
            low, high = to(first), to(last)
            return [back(low + (high - low) * i / (count - 1)) for i in range(count)]

        def check_steps(self, total_steps: int) -> str | None:
            """See base class."""
            phases = len(self.lambdas())
            if phases <= total_steps:
                return None
            return (
                f"recipe.lambda_num={phases} phases do not fit into the {total_steps} "
                "steps of this run; lower it, or train longer"
            )

    config: Config

    def __init__(self, config: Config, model: nn.Module):
        super().__init__(config, model)
        self.gates: list[nn.Parameter] = []
        """Every gate tensor [E or 1, r], those that layers share once."""
        for path, part in self.parts.items():
            assert isinstance(part.config, SoRAExperts.Config)
            _check(path, part.config)
            gate = getattr(part, "gate", None)
            if isinstance(gate, nn.Parameter):
                if not gate.requires_grad:
                    raise TrainingError(
                        f"{path}.gate is not trained, so it would only shrink; call "
                        "requires_grad_(True) on it, or leave the recipe out"
                    )
                self.gates.append(gate)

    @classmethod
    def check(cls, config: RecipeConfig, adapter: AdapterConfig) -> str | None:
        """See base class."""
        for block in blocks_in(adapter, SoRAExperts.Config):
            try:
                _check("adapter.experts", block)
            except TrainingError as error:
                return str(error)
        return super().check(config, adapter)

    def groups(self) -> list[dict[str, Any]]:
        """See base class."""
        group: dict[str, Any] = {"params": self.gates, "weight_decay": 0.0}
        if self.config.gate_learning_rate is not None:
            group["lr"] = self.config.gate_learning_rate
        return [group]

    def penalised(self) -> list[nn.Parameter]:
        """See base class."""
        return self.gates if self.config.sparse_lambda else []

    def penalty(self) -> Tensor:
        """See base class."""
        place = self.gates[0].device
        flat = torch.cat([gate.flatten().to(place) for gate in self.gates])
        wide = flat.to(torch.promote_types(flat.dtype, torch.float32))
        return self.config.sparse_lambda * wide.abs().mean()

    def threshold(self, step: int) -> float:
        """Lambda after a step, from 1."""
        lambdas = self.config.lambdas()
        return lambdas[(step - 1) * len(lambdas) // self.total_steps]

    @torch.no_grad()
    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """See base class.

        Raises:
            TrainingError: With multiply_lr, the optimizer has no rate for the gates.
        """
        rates = {
            id(parameter): group.get("lr")
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for gate in self.gates:
            xi = self.threshold(step)
            if self.config.multiply_lr:
                rate = rates.get(id(gate))
                if rate is None:
                    raise TrainingError(
                        "recipe.multiply_lr: the optimizer has no learning rate for "
                        "the gates; give it the recipe's groups(), or set multiply_lr: "
                        "false"
                    )
                xi *= float(rate)
            shrunk = gate.sign() * (gate.abs() - xi).clamp(min=0)
            if self.config.hard_threshold:
                shrunk[shrunk.abs() < xi] = 0
            gate.copy_(shrunk)

    def log(self) -> dict[str, float]:
        """See base class; ranks whose gate is not zero."""
        return {"ranks": sum(int(gate.count_nonzero()) for gate in self.gates)}


def _check(path: str, experts: SoRAExperts.Config) -> None:
    """Refuse gates that nothing moves."""
    if "gate" in experts.trainability:
        raise TrainingError(
            f"{path}: recipe 'sora' moves the gates, and trainability: "
            f"{experts.trainability} does not train them; take gate out of there"
        )
