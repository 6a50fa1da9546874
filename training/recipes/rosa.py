"""RoSA: the other parts train first, and their gradients say where to be sparse.

Of T steps of the optimizer

    1 to K           the sparse values stay zero, all else trains
    the next m       so they do, while a statistic of the dense gradient is collected
    all after        sparse values at the places that it chose, and all else, train

The update of expert e is sum_t g_te S_e x_t, so the gradient of a dense S_e is, with
the gradient dy of the layer's output,

    G_e = sum_t g_te dy_t x_t^T

over all tokens of a step. The places of expert e are those of the n largest entries of
|mean over steps of G_e^2|, or of |mean over steps of G_e|, n as many as it has.

Reference: Nikdan et al. 2024, arXiv:2401.04679, algorithm 1.

Shape legend: T tokens, E experts, I in features, O out features, N tokens of one
expert, n places of one expert.
"""

import logging
from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from molora.config import AdapterConfig
from molora.errors import TrainingError
from molora.experts.gated_sum import none, rows_of
from molora.experts.sparse import SparseExperts
from molora.training.recipes.base import (
    RECIPES,
    Recipe,
    RecipeConfig,
    Steps,
    kinds_of,
    steps_of,
)

logger = logging.getLogger(__name__)

ALONE = (
    "recipe.warmup_steps={}: nothing is trained but sparse values, so there is nothing "
    "to warm up; set it to 0, or put the sparse experts into a sum with others (kind: "
    "sum, parts: lora and sparse)"
)


@RECIPES.register("rosa", paper="arXiv:2401.04679")
class RoSA(Recipe):
    """Warms up what stands beside sparse experts, then chooses their places.

    A step that is left out is not collected; the next one takes its turn. Experts that
    no token of the collected steps uses keep the places that they were drawn with.

    Limitations: collecting holds a dense [O, I], at least float32, per expert and layer
    on its device, two with more than one step, and a checkpoint from in between holds
    one. G_e is that of a whole step, however many micro-batches it has; the authors'
    code squares and averages those of single backward passes. Sparse experts with
    nothing beside them take no fp16 with a loss scale, which wants a gradient in every
    step.

    Args:
        config: Settings.
        model: A wrapped model with sparse experts, mostly as parts of a sum.

    Raises:
        TrainingError: The sparse values are frozen, or nothing could be warmed up.
    """

    families = ("sparse",)
    one_process = True

    class Config(RecipeConfig):
        """Settings of RoSA's schedule."""

        kind: Literal["rosa"] = "rosa"
        """Registered name."""
        warmup_steps: Steps = 64
        """K, steps before gradients are collected, or their share of the run."""
        grad_steps: int = pydantic.Field(default=1, ge=1)
        """m, steps whose gradients are collected."""
        statistic: Literal["mean_squared", "mean"] = "mean_squared"
        """What is averaged over these steps, the gradient's square or itself."""

        def check_steps(self, total_steps: int) -> str | None:
            """See base class."""
            before = steps_of(self.warmup_steps, total_steps) + self.grad_steps
            if before < total_steps:
                return None
            return (
                f"recipe.warmup_steps={self.warmup_steps} and recipe.grad_steps="
                f"{self.grad_steps} leave none of the {total_steps} steps of this run "
                "to train sparse values in; lower them, or train longer"
            )

    config: Config

    def __init__(self, config: Config, model: nn.Module):
        super().__init__(config, model)
        own = set()
        for path, part in self._experts().items():
            values = part.values
            if not isinstance(values, nn.Parameter) or not values.requires_grad:
                raise TrainingError(
                    f"{path}: recipe 'rosa' chooses what sparse values are trained, "
                    "and these are frozen, all or some; set train: all"
                )
            own.add(id(values))
        beside = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        if config.warmup_steps and not beside:
            raise TrainingError(ALONE.format(config.warmup_steps))
        self.warm = 0
        """K in steps of this run."""
        self._is_chosen = self._is_checked = False
        self._collected = self._phase = 0
        self._scale = 1.0
        self._sums: dict[str, list[Tensor | None]] = {}
        self._step_sums: dict[str, list[Tensor | None]] = {}
        self._hooks: list[RemovableHandle] = []

    @classmethod
    def check(cls, config: RecipeConfig, adapter: AdapterConfig) -> str | None:
        """See base class."""
        assert isinstance(config, cls.Config)
        reason = super().check(config, adapter)
        if reason:
            return reason
        families = adapter.families()
        kinds = set().union(*(kinds_of(family) for family in families))
        routed = any(family.num_experts > 1 for family in families)
        if config.warmup_steps and not routed and kinds <= {"sparse", "sum"}:
            return ALONE.format(config.warmup_steps)
        return None

    def begin(self, total_steps: int) -> None:
        """See base class."""
        if self.total_steps:
            raise TrainingError(
                "recipe 'rosa' chooses places once, and this one has begun a run "
                "before; make a new trainer"
            )
        super().begin(total_steps)
        self.warm = steps_of(self.config.warmup_steps, total_steps)

    def start_step(self, step: int) -> None:
        """See base class."""
        self._unhook()
        self._step_sums = {}
        if self._is_chosen:
            self._phase = 2
            return
        if not self._is_checked:
            self._check_values()
        self._phase = int(step > self.warm)
        if self._phase:
            for path, part in self._experts().items():
                self._hook(path, part)

    def _check_values(self) -> None:
        """Refuse sparse values that new places would discard."""
        for path, part in self._experts().items():
            if bool(part.values.any()):
                raise TrainingError(
                    f"{path}: the sparse values are trained already, and new places "
                    "would discard them; leave the recipe out to train them on"
                )
        self._is_checked = True

    def _hook(self, path: str, part: SparseExperts) -> None:
        """Have every backward through a part add to the sums of this step."""

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def watch(_: nn.Module, given: tuple[Any, ...], y: Tensor) -> Tensor:
            # a compiled graph goes on to call a hook that was removed
            if not self._hooks:
                return y
            x, gates, _, top_k = given if len(given) == 4 else (*given, None)
            sums, is_sparse = self._step_sums, top_k is not None
            watched: Tensor = _Watched.apply(  # type: ignore[no-untyped-call]
                y, x, gates, sums, path, part.num_experts, is_sparse
            )
            return watched

        self._hooks.append(part.register_forward_hook(watch))

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def after_backward(self, scale: float = 1.0) -> Tensor | None:
        """See base class; takes the gradients of values that are not trained yet.

        They stay parameters with a gradient until here, as nothing else might carry one
        to the output of the first layer.
        """
        self._unhook()
        self._scale = scale
        if not self._is_chosen:
            for part in self._experts().values():
                part.values.grad = None
        return super().after_backward(scale)

    @torch.no_grad()
    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """See base class."""
        if self._is_chosen or step <= self.warm:
            return
        for path, found in self._step_sums.items():
            sums = self._sums.setdefault(path, [None] * len(found))
            for e, grad_OI in enumerate(found):
                if grad_OI is None:
                    continue
                grad_OI.div_(self._scale)
                if self.config.statistic == "mean_squared":
                    grad_OI.square_()
                had = sums[e]
                sums[e] = grad_OI if had is None else had.add_(grad_OI)
        self._step_sums = {}
        self._collected += 1
        if self._collected >= self.config.grad_steps:
            self._choose()

    def scores(self) -> dict[str, list[Tensor | None]]:
        """The statistic [O, I] of every expert so far; None for those not used."""
        return {
            path: [None if total is None else total / self._collected for total in sums]
            for path, sums in self._sums.items()
        }

    def _choose(self) -> None:
        """Give every expert the places of its largest statistic."""
        unused = 0
        for path, part in self._experts().items():
            if path not in self._sums:
                raise TrainingError(
                    f"{path}: no gradient came through these sparse experts in the "
                    "steps that collect it; leave a layer that is not run out of "
                    "target_modules, or raise recipe.grad_steps"
                )
            for e, total_OI in enumerate(self._sums[path]):
                if total_OI is None or not bool(total_OI.any()):
                    unused += 1
                    continue
                if not bool(total_OI.isfinite().all()):
                    raise TrainingError(
                        f"{path}: the collected gradients of expert {e} are not "
                        "finite; lower learning_rate, or train in float32 or bfloat16"
                    )
                count = part.indices.shape[1]
                part.set_mask(e, total_OI.abs().flatten().topk(count).indices)
        if unused:
            logger.warning(
                "rosa: %d sparse experts were used by no token of the steps that "
                "collect gradients, and keep the places that they were drawn with",
                unused,
            )
        self._sums = {}
        self._is_chosen = True

    def log(self) -> dict[str, float]:
        """See base class; 0 in the warm-up, 1 while collecting, 2 from then on."""
        return {"sparse_phase": self._phase}

    def state(self) -> dict[str, Any]:
        """See base class."""
        return {
            "is_chosen": self._is_chosen,
            "collected": self._collected,
            "phase": self._phase,
            "sums": self._sums,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See base class."""
        self._is_chosen = state["is_chosen"]
        self._collected, self._phase = state["collected"], state["phase"]
        self._sums = {
            path: [None if t is None else t.to(part.values.device) for t in sums]
            for path, part in self._experts().items()
            if (sums := state["sums"].get(path)) is not None
        }

    def _experts(self) -> dict[str, SparseExperts]:
        return self.parts  # type: ignore[return-value]


class _Watched(torch.autograd.Function):
    """The output of a part; backward adds G_e of every expert to the sums of a step.

    x and gates are kept as autograd keeps tensors, so that recomputation gives them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        gates: Tensor | None,
        sums: dict[str, list[Tensor | None]],
        path: str,
        num_experts: int,
        is_sparse: bool,
    ) -> Tensor:
        ctx.sums, ctx.path, ctx.num_experts = sums, path, num_experts
        ctx.is_sparse = is_sparse
        ctx.save_for_backward(x, gates)
        return y.view_as(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gates = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        own = ctx.sums.setdefault(ctx.path, [None] * ctx.num_experts)
        for e in range(ctx.num_experts):
            rows = rows_of(gates, e, ctx.is_sparse)
            if none(rows):
                continue
            dy_NO = grad[rows].to(wide)
            if gates is not None:
                dy_NO = gates[rows, e].unsqueeze(1).to(wide) * dy_NO
            with torch.autocast(x.device.type, enabled=False):
                grad_OI = dy_NO.t() @ x[rows].to(wide)
            own[e] = grad_OI if own[e] is None else own[e].add_(grad_OI)
        return grad, None, None, None, None, None, None
