"""AdaLoRA: a budget of ranks that shrinks, and goes to the triplets that matter.

A triplet i is a singular value E_i with its row A_i and its column B_i; under a mixture
every expert has its own. After each step of the optimizer, with the gradients that it
took and the values that it made:

    I(p) = |p dL/dp|
    Ibar <- beta1 Ibar + (1 - beta1) I
    Ubar <- beta2 Ubar + (1 - beta2) |I - Ibar|
    s(p) = Ibar Ubar
    S_i  = s(E_i) + mean_j s(A_ij) + mean_j s(B_ji)

and E_i is set to zero for the b_0 - b(t) triplets of the model with the smallest S_i,
where the budget is

    b(t) = b_0                                                        t <= t_i
         = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))^3      in between
         = b_T                                                        t > T - t_f

in between at every deltaT-th step, and once at T - t_f; from then on that choice stays.
Before, a pruned triplet can come back. To the loss is added

    orth_reg_weight * mean over all A and B of |A A^T - 1|_F and |B^T B - 1|_F

Reference: Zhang et al. 2023, arXiv:2303.10512, section 3 and algorithm 1;
the choice at T - t_f is that of PEFT.

Shape legend: r ranks of one expert, E experts, M all triplets of the model.
"""

from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from molora.config import AdapterConfig
from molora.errors import TrainingError
from molora.experts.adalora import AdaLoRAExperts
from molora.training.recipes.base import (
    RECIPES,
    Recipe,
    RecipeConfig,
    Steps,
    blocks_in,
    gram_error,
    steps_of,
    whole,
)

TENSORS = ("E", "A", "Bt")


@RECIPES.register("adalora", paper="arXiv:2303.10512")
class AdaLoRA(Recipe):
    """Prunes the singular values of AdaLoRA experts down to a budget.

    Limitations: layers share no tensor (experts of one layer may share A or B); the
    penalty wants A and B trained. Scores are kept for every value, twice the memory of
    the experts.

    Args:
        config: Settings.
        model: A wrapped model with adalora experts.

    Raises:
        TrainingError: Layers share a tensor, or target_r is above init_r.
    """

    families = ("adalora",)

    class Config(RecipeConfig):
        """Settings of AdaLoRA's budget."""

        kind: Literal["adalora"] = "adalora"
        """Registered name."""
        target_r: int = pydantic.Field(default=8, ge=1)
        """Mean rank of an expert in the end."""
        tinit: Steps = 0
        """Steps before any rank is pruned, or their share of the run."""
        tfinal: Steps = 0
        """Steps at the end that keep the ranks as they are, or their share."""
        deltaT: int = pydantic.Field(default=1, ge=1)
        """Steps from one choice of ranks to the next."""
        beta1: float = pydantic.Field(default=0.85, gt=0, lt=1)
        """Smoothing of the importance."""
        beta2: float = pydantic.Field(default=0.85, gt=0, lt=1)
        """Smoothing of its uncertainty."""
        orth_reg_weight: float = pydantic.Field(default=0.5, ge=0)
        """Coefficient of the orthogonality penalty; 0 leaves it out."""

        def ends(self, total_steps: int) -> tuple[int, int]:
            """Steps after which choosing begins, and ends."""
            last = total_steps - steps_of(self.tfinal, total_steps)
            return steps_of(self.tinit, total_steps), last

        def check_steps(self, total_steps: int) -> str | None:
            """See base class."""
            start, end = self.ends(total_steps)
            if start < end:
                return None
            return (
                f"recipe.tinit={self.tinit} and recipe.tfinal={self.tfinal} leave none "
                f"of the {total_steps} steps of this run to choose ranks in; lower "
                "them, or train longer"
            )

    config: Config

    def __init__(self, config: Config, model: nn.Module):
        super().__init__(config, model)
        self.initial = self.target = 0
        """Triplets of the model at first and in the end."""
        self.start = self.end = 0
        """Steps after which choosing begins, and ends."""
        self._means: dict[str, tuple[Tensor, Tensor]] = {}
        self._keep: dict[str, Tensor] = {}
        self._is_final = False
        for path, part in self._experts().items():
            _check(path, part.config, config)
            self.initial += part.E.numel()
            self.target += config.target_r * len(part.E)

    @classmethod
    def check(cls, config: RecipeConfig, adapter: AdapterConfig) -> str | None:
        """See base class."""
        assert isinstance(config, cls.Config)
        for block in blocks_in(adapter, AdaLoRAExperts.Config):
            try:
                _check("adapter.experts", block, config)
            except TrainingError as error:
                return str(error)
        return super().check(config, adapter)

    def begin(self, total_steps: int) -> None:
        """See base class."""
        super().begin(total_steps)
        self.start, self.end = self.config.ends(total_steps)
        self._keep, self._is_final = {}, False
        for path, part in self._experts().items():
            for name in TENSORS:
                zero = torch.zeros_like(getattr(part, name), requires_grad=False)
                self._means[f"{path}.{name}"] = zero, zero.clone()

    def budget(self, step: int) -> int:
        """Triplets that are kept after a step, b(t)."""
        if step <= self.start:
            return self.initial
        if step >= self.end:
            return self.target
        left = 1 - (step - self.start) / (self.end - self.start)
        return int(self.target + (self.initial - self.target) * left**3)

    def penalised(self) -> list[nn.Parameter]:
        """See base class."""
        if not self.config.orth_reg_weight:
            return []
        stacks = [p for part in self._experts().values() for p in (part.A, part.Bt)]
        return [stack for stack in stacks if isinstance(stack, nn.Parameter)]

    def penalty(self) -> Tensor:
        """See base class."""
        place = self.penalised()[0].device
        errors = [gram_error(rows) for rows in self.penalised()]
        norms = [torch.linalg.matrix_norm(error).to(place) for error in errors]
        return self.config.orth_reg_weight * torch.cat(norms).mean()

    @torch.no_grad()
    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """See base class."""
        if step < self.end:
            self._measure()
            if step <= self.start or step % self.config.deltaT:
                return
        if not self._is_final:
            self._keep = self._choose(self.initial - self.budget(step))
            self._is_final = step >= self.end
        for path, part in self._experts().items():
            part.mask_ranks(self._keep[path])

    def _measure(self) -> None:
        """Take the importance of every value into the running means."""
        beta1, beta2 = self.config.beta1, self.config.beta2
        for path, part in self._experts().items():
            for name in TENSORS:
                value = getattr(part, name)
                now = (value * whole(value.grad, value)).abs()
                mean, spread = self._means[f"{path}.{name}"]
                mean.mul_(beta1).add_(now, alpha=1 - beta1)
                spread.mul_(beta2).add_((now - mean).abs_(), alpha=1 - beta2)

    def scores(self) -> dict[str, Tensor]:
        """S_i [E, r] of every triplet, by module path."""
        found = {}
        for path, part in self._experts().items():
            values = {}
            for name in TENSORS:
                mean, spread = self._means[f"{path}.{name}"]
                values[name] = mean.to(part.E.device) * spread.to(part.E.device)
            rows = values["A"].mean(-1) + values["Bt"].mean(-1)
            found[path] = values["E"] + rows
        return found

    def _choose(self, pruned: int) -> dict[str, Tensor]:
        """Which triplets stay, bool [E, r] by module path."""
        scores = self.scores()
        if not pruned:
            return {
                path: torch.ones_like(s, dtype=torch.bool) for path, s in scores.items()
            }
        scores_M = torch.cat([score.flatten().cpu() for score in scores.values()])
        limit = float(scores_M.kthvalue(pruned).values)
        return {path: score > limit for path, score in scores.items()}

    def log(self) -> dict[str, float]:
        """See base class; triplets that the last choice kept."""
        if not self._keep:
            return {"ranks": self.initial}
        return {"ranks": sum(int(keep.sum()) for keep in self._keep.values())}

    def state(self) -> dict[str, Any]:
        """See base class."""
        return {"means": self._means, "keep": self._keep, "is_final": self._is_final}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See base class."""
        self._is_final = state["is_final"]
        for path, part in self._experts().items():
            if path in state["keep"]:
                self._keep[path] = state["keep"][path].to(part.E.device)
            for name in TENSORS:
                key, place = f"{path}.{name}", getattr(part, name).device
                mean, spread = state["means"][key]
                self._means[key] = mean.to(place), spread.to(place)

    def _experts(self) -> dict[str, AdaLoRAExperts]:
        return self.parts  # type: ignore[return-value]


def _check(path: str, experts: AdaLoRAExperts.Config, config: AdaLoRA.Config) -> None:
    """Refuse experts that have no ranks of their own to give."""
    shared = experts.scopes()
    wide = [name for name, scope in shared.items() if scope != "experts"]
    if wide or ("E" in shared and experts.num_experts > 1):
        raise TrainingError(
            f"{path}: recipe 'adalora' takes triplets from single experts of single "
            f"layers, and shared: {shared} ties them; share A or B among the experts "
            "of a layer, or nothing"
        )
    if config.target_r > experts.init_r:
        raise TrainingError(
            f"{path}: recipe.target_r={config.target_r} is above "
            f"experts.init_r={experts.init_r}; ranks are only taken away"
        )
