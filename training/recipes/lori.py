"""LoRI: train B, keep its largest entries over the whole model, start them anew.

    steps 1 .. c   train B of all sites, beside the A that was drawn
    after c        tau = the k-th largest |b| of the model    k = int(density * number)
                   mask = |b| >= tau, then B = 0
    steps c+1 ..   train the entries under the mask, with optimizer state of their own

The authors train twice, each time with a schedule of its own; here the second part goes
on with the learning rate that the run has come to.

Reference: Zhang et al. 2025, arXiv:2504.07448, section 3.2.
"""

import logging
from collections.abc import Mapping
from typing import Any, Literal

import pydantic
from torch import nn
from torch.optim import Optimizer

from molora.config import AdapterConfig
from molora.errors import TrainingError
from molora.experts.factor_config import FactorConfig
from molora.experts.factors import FactorExperts
from molora.masks import mask_by_magnitude
from molora.training.recipes.base import (
    RECIPES,
    Recipe,
    RecipeConfig,
    Steps,
    blocks_in,
    steps_of,
)

logger = logging.getLogger(__name__)


@RECIPES.register("lori", paper="arXiv:2504.07448")
class LoRI(Recipe):
    """Masks the tensors that experts.trainability masks, part of the way through a run.

    Limitations: one schedule of the learning rate for both parts; routers go on from
    what they learned in the first one. Evaluate after the second part only: right after
    the masking the update is zero.

    Args:
        config: Settings.
        model: A wrapped model whose lora experts have a masked tensor.

    Raises:
        TrainingError: None of them has, or its density draws the mask.
    """

    families = ("lora",)

    class Config(RecipeConfig):
        """Settings of LoRI's masks."""

        kind: Literal["lori"] = "lori"
        """Registered name."""
        density: float = pydantic.Field(default=0.1, gt=0, lt=1)
        """Share of all masked entries of the model that is kept."""
        calibration: Steps = 0.5
        """Steps before the masking, or their share of the run."""

        def check_steps(self, total_steps: int) -> str | None:
            """See base class."""
            last = steps_of(self.calibration, total_steps)
            if 0 < last < total_steps:
                return None
            return (
                f"recipe.calibration={self.calibration} is {last} of the {total_steps} "
                "steps of this run, which leaves one of its two parts without a step; "
                "change it, or train longer"
            )

    config: Config

    def __init__(self, config: Config, model: nn.Module):
        super().__init__(config, model)
        self.model = model
        self.kept: int | None = None
        """Entries under the masks, once there are any."""
        for path, part in self._experts().items():
            reason = _reason(part.config)
            if reason:
                raise TrainingError(f"{path}: recipe 'lori' {reason}")

    @classmethod
    def check(cls, config: RecipeConfig, adapter: AdapterConfig) -> str | None:
        """See base class."""
        for block in blocks_in(adapter, FactorConfig):
            reason = _reason(block)
            if block.kind in cls.families and reason:
                return f"adapter.experts: recipe 'lori' {reason}"
        return super().check(config, adapter)

    def begin(self, total_steps: int) -> None:
        """See base class."""
        super().begin(total_steps)
        self.last = steps_of(self.config.calibration, total_steps)
        self.kept = None

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """See base class."""
        if step < self.last or self.kept is not None:
            return
        self.kept = mask_by_magnitude(self.model, self.config.density)
        for part in self._experts().values():
            for values, _ in part.masked().values():
                optimizer.state.pop(values, None)
        logger.info("step %d: %d entries are trained from here on", step, self.kept)

    def log(self) -> dict[str, float]:
        """See base class; entries under the masks, once they are there."""
        return {} if self.kept is None else {"entries": self.kept}

    def state(self) -> dict[str, Any]:
        """See base class; the masks themselves are saved with the adapter."""
        return {"kept": self.kept}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See base class."""
        self.kept = state["kept"]

    def _experts(self) -> dict[str, FactorExperts]:
        return self.parts  # type: ignore[return-value]


def _reason(experts: FactorConfig) -> str | None:
    """Why the masks of these experts are not for the recipe to set."""
    if "masked" not in experts.trainability.values():
        return (
            "sets the masks of masked tensors, and here none is; set "
            "experts.trainability to {A: frozen, B: masked}"
        )
    if experts.density is not None:
        return (
            f"sets the masks, and experts.density={experts.density} draws them; leave "
            "experts.density out"
        )
    return None
