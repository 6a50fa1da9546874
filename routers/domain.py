"""Domain classification: the router learns which expert a row's task belongs to.

    L = mean over real tokens of -log softmax(z_t)[e(t)]

z are the logits after noise and temperature, e(t) the expert of the task of the token's
row. L is log E under uniform routing, whatever K is, and 0 at best: unlike the other
objectives it is not scaled to 1 there, so that weight means what it does for any
cross-entropy.

Reference: Feng et al. 2024 (Mixture-of-LoRAs), arXiv:2403.03432: one LoRA per domain,
trained alone, then routers trained with the domains as labels. Without published code,
the loss is the cross-entropy that the paper names, per token and layer.
Shape legend: see base.py; B rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pydantic
import torch
from torch import Tensor
from torch.nn import functional as F

from molora.context import TokenRows
from molora.errors import ConfigError, RoutingError
from molora.routers.balance import (
    OBJECTIVES,
    Objective,
    ObjectiveConfig,
    mean_over_tokens,
)
from molora.routers.base import AbstractRouter, Routing


@OBJECTIVES.register("domain", paper="arXiv:2403.03432")
class DomainLoss(Objective):
    """Each task has its own expert, and routers learn to tell the tasks apart.

    Limitations: every row needs a task (``molora.tasks``, or the trainer with several
    tasks); as many experts as tasks at every layer.
    """

    class Config(ObjectiveConfig):
        """Settings of the domain loss."""

        tasks: list[str] = pydantic.Field(min_length=2)
        """Task of each expert, in their order."""

        @pydantic.field_validator("tasks")
        @classmethod
        def _once_each(cls, tasks: list[str]) -> list[str]:
            if len(set(tasks)) < len(tasks):
                raise ValueError("a task is listed twice; each expert has its own")
            return tasks

    config: Config
    needs_tasks = True

    @classmethod
    def check(
        cls, config: ObjectiveConfig, router: type[AbstractRouter], num_experts: int
    ) -> str | None:
        """See base class."""
        assert isinstance(config, cls.Config)
        if len(config.tasks) != num_experts:
            return (
                f"tasks names {len(config.tasks)} tasks for num_experts={num_experts}; "
                "name one for each expert, in their order"
            )
        return super().check(config, router, num_experts)

    @classmethod
    def check_tasks(cls, config: ObjectiveConfig, names: Sequence[str]) -> str | None:
        """See base class."""
        assert isinstance(config, cls.Config)
        missing = sorted(set(names) - set(config.tasks))
        if missing:
            return f"tasks names no expert for {missing}; it names {config.tasks}"
        return None

    @classmethod
    def grown(cls, raw: Mapping[str, Any], task: str | None) -> dict[str, Any]:
        """See base class."""
        if task is None:
            raise ConfigError(
                "the balance objective 'domain' needs the task of the new expert: "
                "molora.grow(model, task=...)"
            )
        return {**raw, "tasks": [*raw["tasks"], task]}

    def __call__(
        self,
        routing: Routing,
        weight_T: Tensor | None,
        rows: TokenRows | None = None,
    ) -> Tensor:
        """See base class."""
        assert rows is not None
        logits_TE = routing.logits
        expert_B = torch.tensor(self._experts(rows), device=logits_TE.device)
        expert_T = expert_B.repeat_interleave(len(logits_TE) // rows.num_rows)
        loss_T = F.cross_entropy(logits_TE, expert_T, reduction="none")
        return mean_over_tokens(loss_T, weight_T)

    def _experts(self, rows: TokenRows) -> list[int]:
        """Expert of each row's task."""
        known = self.config.tasks
        if rows.tasks is None:
            raise RoutingError(
                "balance objective 'domain' needs the task of every row: run inside "
                f"molora.tasks(model, [...]) with names of {known}"
            )
        unknown = sorted(set(rows.tasks) - set(known))
        if unknown:
            raise RoutingError(
                f"balance objective 'domain': no expert is named for {unknown}; its "
                f"tasks are {known}"
            )
        return [known.index(task) for task in rows.tasks]
