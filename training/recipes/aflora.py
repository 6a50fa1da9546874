"""AFLoRA: projections that train at first, and are frozen one after the other.

A and B of a layer are a unit each. With t the number of the step from 0, and in every
step the gradients that the optimizer is about to take:

    I(p)    = mean of |dL/dp| over the steps of a window of deltaT steps
    Ibar   <- beta1 Ibar + (1 - beta1) I
    Ubar   <- beta2 Ubar + (1 - beta2) |I - Ibar|
    s(p)    = Ibar Ubar

where a window is taken into the means in the first step of the next one. In that step
the units whose mean s is below the k-th smallest s of all their entries are frozen, for
good and after they have taken the update of that step; k = int((1 - r(t)) M), and

    r(t) = 1                                            t <= t_i
         = (1 - (t - t_i) / (T - t_i - t_f))^3          in between
         = 0                                            t >= T - t_f

where at r = 0 all that is left is frozen, whatever deltaT. The vectors are trained to
the end.

Reference: Liu et al. 2024, arXiv:2403.13269, section 3 and its equations; the windows
and the comparison of a mean with the threshold are those of the authors' code. That
counts an entry that is exactly zero as I = 0, which is left out here, and waits at
t = T - t_f for the first step of a window or for t = T - t_f + 1.

Shape legend: E experts, r ranks of one expert, I and O sizes of a layer, M entries of
all units that still train.
"""

from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from molora.config import AdapterConfig
from molora.errors import TrainingError
from molora.experts.aflora import AFLoRAExperts
from molora.training.recipes.base import (
    RECIPES,
    Recipe,
    RecipeConfig,
    Steps,
    blocks_in,
    steps_of,
    whole,
)

TENSORS = ("A", "Bt")


@RECIPES.register("aflora", paper="arXiv:2403.13269")
class AFLoRA(Recipe):
    """Freezes A and B of AFLoRA experts by how much and how unsteadily they matter.

    A [E, r, I] of a layer is one unit and B [E, O, r] another, all experts together,
    since an optimizer has a tensor or has it not; one that layers share is one unit, at
    the layer that owns it. What is frozen from the start by ``trainability`` is no
    unit.

    What it froze stays frozen in the live model when training ends or is interrupted.
    ``begin`` thaws it, so that a second run with the same recipe starts anew; a new
    recipe refuses a model that is partly frozen. ``molora.load`` with trainable=True
    gives a model in which nothing is.

    Limitations: one process.

    Args:
        config: Settings.
        model: A wrapped model with aflora experts.

    Raises:
        TrainingError: No A or B is trained, or one is not trained though the settings
            of the adapter say so.
    """

    families = ("aflora",)
    one_process = True

    class Config(RecipeConfig):
        """Settings of AFLoRA's freezing."""

        kind: Literal["aflora"] = "aflora"
        """Registered name."""
        tinit: Steps = 0
        """Steps before anything is frozen, or their share of the run."""
        tfinal: Steps = 0
        """Steps at the end, or their share; the first of them is the last that moves
        any A or B."""
        deltaT: int = pydantic.Field(default=10, ge=1)
        """Steps of a window, and from one choice of units to the next."""
        beta1: float = pydantic.Field(default=0.85, gt=0, lt=1)
        """Smoothing of the importance."""
        beta2: float = pydantic.Field(default=0.95, gt=0, lt=1)
        """Smoothing of its uncertainty."""

        def ends(self, total_steps: int) -> tuple[int, int]:
            """t_i and T - t_f."""
            last = total_steps - steps_of(self.tfinal, total_steps)
            return steps_of(self.tinit, total_steps), last

        def check_steps(self, total_steps: int) -> str | None:
            """See base class."""
            start, end = self.ends(total_steps)
            if start >= end:
                return (
                    f"recipe.tinit={self.tinit} and recipe.tfinal={self.tfinal} leave "
                    f"none of the {total_steps} steps of this run to freeze tensors "
                    "in; lower them, or train longer"
                )
            if (end - 1) // self.deltaT * self.deltaT <= start:
                return (
                    f"recipe.deltaT={self.deltaT}: no window begins after recipe.tinit="
                    f"{self.tinit} and before recipe.tfinal={self.tfinal} of the "
                    f"{total_steps} steps of this run, so nothing is chosen by its "
                    "score; lower one of them, or train longer"
                )
            return None

    config: Config

    def __init__(self, config: Config, model: nn.Module):
        super().__init__(config, model)
        self.units = self._units()
        """Names of the tensors that train at first, those of ``state`` too."""
        if not self.units:
            raise TrainingError(
                "recipe 'aflora' freezes A and B, and none of this model is trained; "
                "leave one out of experts.trainability, or leave the recipe out"
            )
        self.start = self.end = 0
        """t_i and T - t_f."""
        self._measured: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        """I, Ibar and Ubar of the units that still train."""
        self._window = self._seen = 0
        """Number of the window, and how many gradients it has."""
        self._due: list[str] = []
        """Units to freeze after this step."""

    def _units(self) -> list[str]:
        """Find the tensors that the settings leave to training.

        A tensor that layers share is a parameter of its owner alone, and a seeded one
        is no parameter.
        """
        units = []
        for path, part in self.parts.items():
            for name in TENSORS:
                if name not in part._parameters or name in part.frozen:
                    continue
                if not getattr(part, name).requires_grad:
                    raise TrainingError(
                        f"{path}.{name} is not trained, though experts.trainability "
                        "does not freeze it: an earlier run has frozen it. Call "
                        "requires_grad_(True) on it to start anew, write it into "
                        "trainability, or leave the recipe out"
                    )
                units.append(f"{path}.{name}")
        return units

    @classmethod
    def check(cls, config: RecipeConfig, adapter: AdapterConfig) -> str | None:
        """See base class."""
        reason = super().check(config, adapter)
        if reason is not None:
            return reason
        found = blocks_in(adapter, AFLoRAExperts.Config)
        if found and all({"A", "B"} <= set(f.trainability) for f in found):
            return (
                "aflora freezes A and B, and experts.trainability leaves neither to "
                "train; leave one out of it, or leave the recipe out"
            )
        return None

    def begin(self, total_steps: int) -> None:
        """See base class; thaws what an earlier run froze."""
        super().begin(total_steps)
        self.start, self.end = self.config.ends(total_steps)
        self._window = self._seen = 0
        self._due = []
        for name in self.units:
            values = self._parameter(name).requires_grad_(True)
            wide = torch.promote_types(values.dtype, torch.float32)
            zero = torch.zeros_like(values, dtype=wide, requires_grad=False)
            self._measured[name] = zero, zero.clone(), zero.clone()

    def retention(self, step: int) -> float:
        """Share of the entries whose score is above the threshold, r(t).

        Args:
            step: Its number, from 1.
        """
        t = step - 1
        if t <= self.start:
            return 1.0
        if t > self.end:
            return 0.0
        left = 1 - (t - self.start) / (self.end - self.start)
        return float(left**3)

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """See base class."""
        window = (step - 1) // self.config.deltaT
        is_first = window != self._window
        if is_first:
            self._close_window()
        self._window = window
        for name, (now, _, _) in self._measured.items():
            values = self._parameter(name)
            size = whole(values.grad, values).abs().to(now.dtype)
            now.mul_(self._seen).add_(size).div_(self._seen + 1)
        self._seen += 1
        kept = self.retention(step)
        self._due = self._choose(kept) if is_first or not kept else []

    def _close_window(self) -> None:
        """Take the importance of a window into the running means."""
        beta1, beta2 = self.config.beta1, self.config.beta2
        for now, mean, spread in self._measured.values():
            mean.mul_(beta1).add_(now, alpha=1 - beta1)
            spread.mul_(beta2).add_((now - mean).abs_(), alpha=1 - beta2)
        self._seen = 0

    def scores(self) -> dict[str, Tensor]:
        """The score of every entry of the units that still train, by name."""
        return {
            name: mean * spread for name, (_, mean, spread) in self._measured.items()
        }

    def _choose(self, kept: float) -> list[str]:
        """Units to freeze where a share of the entries is to be kept."""
        if not kept:
            return list(self._measured)
        scores = self.scores()
        k = int(sum(score.numel() for score in scores.values()) * (1 - kept))
        if not k:
            return []
        scores_M = torch.cat([score.flatten().cpu() for score in scores.values()])
        limit = float(scores_M.kthvalue(k).values)
        return [name for name, score in scores.items() if float(score.mean()) < limit]

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """See base class."""
        self._freeze(self._due)
        self._due = []

    def _freeze(self, names: list[str]) -> None:
        """Take units out of training; an optimizer passes over what has no gradient."""
        for name in names:
            values = self._parameter(name).requires_grad_(False)
            values.grad = None
            del self._measured[name]

    def log(self) -> dict[str, float]:
        """See base class; how many A and B still train."""
        return {"trained_tensors": len(self._measured)}

    def state(self) -> dict[str, Any]:
        """See base class."""
        return {
            "measured": self._measured,
            "window": self._window,
            "seen": self._seen,
            "frozen": [name for name in self.units if name not in self._measured],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See base class; freezes again what was frozen."""
        self._window, self._seen = state["window"], state["seen"]
        self._freeze(state["frozen"])
        for name, parts in state["measured"].items():
            place = self._parameter(name).device
            now, mean, spread = (part.to(place) for part in parts)
            self._measured[name] = now, mean, spread

    def _parameter(self, name: str) -> nn.Parameter:
        """The tensor of a unit."""
        path, _, own = name.rpartition(".")
        values = getattr(self.parts[path], own)
        assert isinstance(values, nn.Parameter)
        return values
