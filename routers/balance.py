"""Balance objectives: what is added to the loss so that routers use their experts.

Each objective is computed per site on real tokens only, in float32, and its gradient is
attached to the bank's output: an identity in forward that adds the objective's gradient
in backward. That is right under gradient accumulation, both kinds of activation
checkpointing and trainers that replace the model's forward.

Shape legend
    T tokens   E experts
"""

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pydantic
import torch
from torch import Tensor

from molora.context import Runtime, TokenRows
from molora.registry import Registry
from molora.routers.base import AbstractRouter, Routing
from molora.schema import Schema


class ObjectiveConfig(Schema):
    """Settings of every balance objective."""

    kind: str
    """Registered name."""
    weight: float = pydantic.Field(gt=0)
    """Coefficient; the objective is averaged over sites before it is applied."""


class Objective(abc.ABC):
    """A scalar computed from one site's routing of one forward.

    Args:
        config: Settings.
    """

    Config: ClassVar[type[ObjectiveConfig]] = ObjectiveConfig
    needs_tasks: ClassVar[bool] = False
    """Whether it reads the task of each row; ``rows`` is given to those alone."""

    @classmethod
    def check(
        cls, config: ObjectiveConfig, router: type[AbstractRouter], num_experts: int
    ) -> str | None:
        """Say why this config means nothing with a router, or return None."""
        if not router.has_probs:
            return (
                "the gates of this router.kind are no probabilities over the experts, "
                "so there is nothing to balance; drop the objective"
            )
        return None

    @classmethod
    def check_tasks(cls, config: ObjectiveConfig, names: Sequence[str]) -> str | None:
        """Say why this config means nothing with the tasks of a run, or return None."""
        return None

    @classmethod
    def grown(cls, raw: Mapping[str, Any], task: str | None) -> dict[str, Any]:
        """Settings of the same objective with one expert more.

        Args:
            raw: Its settings.
            task: Task of the new expert, for objectives that name one for each.

        Raises:
            ConfigError: It needs the task.
        """
        return dict(raw)

    def __init__(self, config: ObjectiveConfig):
        self.config = config

    @abc.abstractmethod
    def __call__(
        self,
        routing: Routing,
        weight_T: Tensor | None,
        rows: TokenRows | None = None,
    ) -> Tensor:
        """Evaluate on real tokens.

        Args:
            routing: One site's routing.
            weight_T: 1 at real tokens, 0 at padding; None when all are real.
            rows: Rows that the tokens belong to, for objectives that need tasks.

        Returns:
            Unweighted scalar, zero with a graph when no token is real.

        Raises:
            RoutingError: A row's task is missing or unknown.
        """


class Steering(Objective):
    """An objective without a gradient, which moves ``bias_E`` between steps instead."""

    @abc.abstractmethod
    def step(self, router: AbstractRouter) -> None:
        """Act on a router after an optimizer step, by the load that it has counted."""


def mean_over_tokens(values: Tensor, weight_T: Tensor | None) -> Tensor:
    """Mean of values [T, ...] over real tokens; zero with a graph when there are none.

    Args:
        values: One or more numbers per token.
        weight_T: 1 at real tokens, 0 at padding; None when all are real.
    """
    if weight_T is None:
        return values.sum(0) / max(values.shape[0], 1)
    weight_T = weight_T.to(values.dtype)
    return weight_T @ values / weight_T.sum().clamp(min=1)


OBJECTIVES: Registry[Objective] = Registry("balance objective")


@OBJECTIVES.register("switch", paper="arXiv:2101.03961")
class SwitchBalance(Objective):
    """Switch load balance, E * sum_e f_e P_e; 1 under uniform routing for every K.

    Fedus et al. 2021, equations 4 to 6. f_e is the share of assignments that went to
    expert e (it sums to 1 whatever K is, and has no gradient); P_e the mean probability
    before selection.

    Limitations: 1 is the value at uniform routing, not a lower bound.
    """

    def __call__(
        self,
        routing: Routing,
        weight_T: Tensor | None,
        rows: TokenRows | None = None,
    ) -> Tensor:
        """See base class."""
        probs_TE = routing.probs
        assigned_TE = routing.assigned()
        if weight_T is None:
            f_E, p_E = assigned_TE.sum(0), probs_TE.sum(0)
            tokens: int | Tensor = max(probs_TE.shape[0], 1)
        else:
            weight_T = weight_T.to(probs_TE.dtype)
            f_E, p_E = weight_T @ assigned_TE, weight_T @ probs_TE
            tokens = weight_T.sum().clamp(min=1)
        # f_E and p_E are sums still; both divisors are applied to the scalar
        assignments = f_E.sum().clamp(min=1)
        return torch.dot(f_E, p_E) * (probs_TE.shape[-1] / (assignments * tokens))


@OBJECTIVES.register("z", paper="arXiv:2202.08906")
class ZLoss(Objective):
    """Router z-loss, the mean of logsumexp(logits)^2; keeps logits small.

    Zoph et al. 2022 (ST-MoE), equation 5.
    """

    def __call__(
        self,
        routing: Routing,
        weight_T: Tensor | None,
        rows: TokenRows | None = None,
    ) -> Tensor:
        """See base class."""
        squares_T = torch.logsumexp(routing.logits, dim=-1).square()
        return mean_over_tokens(squares_T, weight_T)


def attach(y: Tensor, value: Tensor, weight: float, runtime: Runtime) -> Tensor:
    """Return y unchanged, with weight * value added to the loss in backward.

    Args:
        y: Output of the bank; its gradient path carries the objective.
        value: Scalar with a graph to the router.
        weight: Coefficient, already divided by the number of sites.
        runtime: Its ``balance_scale``, read in backward, multiplies the gradient.

    Returns:
        y. The return value must be used, or the objective is lost.
    """
    out: Tensor = _Attach.apply(y, value, weight, runtime)  # type: ignore[no-untyped-call]
    return out


class _Attach(torch.autograd.Function):
    """Identity on y; gradient weight * runtime.balance_scale for value."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, value: Tensor, weight: float, runtime: Runtime
    ) -> Tensor:
        ctx.weight, ctx.runtime = weight, runtime
        ctx.save_for_backward(value)
        # not a view to autograd, so a later layer may work in place on it
        return y.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (value,) = ctx.saved_tensors
        scale = ctx.weight * ctx.runtime.balance_scale
        return dy, torch.full_like(value, scale), None, None
