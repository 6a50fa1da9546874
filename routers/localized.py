"""Localized balancing: rows of a task prefer one group of experts, evenly within it.

    Q[b, e]  mean gate of expert e over the real tokens of row b
    Z = Q * I,   I[b, e] = 1 - delta where e is in the group of row b's task, else
                 1 + delta                                       (sign: paper)
                 the two swapped                                 (sign: released)
    L = Var(Z) / Mean(Z)^2, the variance unbiased, over all rows and experts

L is smallest where Z is constant, that is Q proportional to 1 / I. With the released
sign the preferred group therefore gets the smaller gates, against the stated aim.

Reference: Dou et al. 2023 (LoRAMoE), arXiv:2312.09979, section 3.3. The paper divides
by the mean, the authors' code by its square, as here: that does not depend on the
length of a row. Unlike in the code, padding does not count, and groups may be more.
Shape legend: see base.py; B rows.
"""

from collections.abc import Sequence
from typing import Literal, Self

import pydantic
import torch
from torch import Tensor

from molora.context import TokenRows
from molora.errors import RoutingError
from molora.routers.balance import OBJECTIVES, Objective, ObjectiveConfig
from molora.routers.base import AbstractRouter, Routing

_EPSILON = 1e-10
"""Added to the squared mean, as in the authors' code."""


@OBJECTIVES.register("localized", paper="arXiv:2312.09979")
class LocalizedBalance(Objective):
    """Each task prefers its own group of experts, and is spread evenly within it.

    Limitations: every row needs a task (``molora.tasks``, or the trainer with several
    tasks); groups are equal blocks of experts in order; the variance is over the rows
    of one forward of one process, so it is not the sum over micro-batches.
    """

    class Config(ObjectiveConfig):
        """Settings of localized balancing."""

        task_groups: dict[str, int]
        """Group of experts that each task prefers, counted from 0."""
        delta: float = pydantic.Field(default=0.1, gt=0, lt=1)
        """Strength of the preference."""
        sign: Literal["paper", "released"] = "paper"
        """Whether a task's own group gets the larger gates, or, as the released code
        has it, the smaller ones."""

        @pydantic.model_validator(mode="after")
        def _groups_are_numbered(self) -> Self:
            used = sorted(set(self.task_groups.values()))
            if len(used) < 2 or used != list(range(len(used))):
                raise ValueError(
                    "task_groups: number at least two groups from 0 without gaps, got "
                    f"{used}"
                )
            return self

        @property
        def groups(self) -> int:
            """Number of groups."""
            return 1 + max(self.task_groups.values())

    config: Config
    needs_tasks = True

    @classmethod
    def check(
        cls, config: ObjectiveConfig, router: type[AbstractRouter], num_experts: int
    ) -> str | None:
        """See base class."""
        assert isinstance(config, cls.Config)
        if num_experts % config.groups:
            return (
                f"task_groups names {config.groups} groups, which does not divide "
                f"num_experts={num_experts}; change one of them"
            )
        return super().check(config, router, num_experts)

    @classmethod
    def check_tasks(cls, config: ObjectiveConfig, names: Sequence[str]) -> str | None:
        """See base class."""
        assert isinstance(config, cls.Config)
        missing = sorted(set(names) - config.task_groups.keys())
        if missing:
            return f"task_groups names no group for the tasks {missing}; add them"
        return None

    def __call__(
        self,
        routing: Routing,
        weight_T: Tensor | None,
        rows: TokenRows | None = None,
    ) -> Tensor:
        """See base class."""
        assert rows is not None
        gates_TE = routing.gates
        (T, E), B = gates_TE.shape, rows.num_rows
        gates_BSE = gates_TE.view(B, T // B, E)
        if weight_T is None:
            weight_T = gates_TE.new_ones(T)
        real_BS = weight_T.to(gates_TE.dtype).view(B, T // B)
        length_B1 = real_BS.sum(-1, keepdim=True)
        q_BE = torch.einsum("bs,bse->be", real_BS, gates_BSE) / length_B1.clamp(min=1)
        z_BE = q_BE * self._factors(rows, E).to(q_BE)
        # a row of padding alone is no row
        seen_B1 = (length_B1 > 0).to(z_BE.dtype)
        count = seen_B1.sum() * E
        mean = z_BE.sum() / count.clamp(min=1)
        squares = ((z_BE - mean).square() * seen_B1).sum()
        return squares / (count - 1).clamp(min=1) / (mean.square() + _EPSILON)

    def _factors(self, rows: TokenRows, num_experts: int) -> Tensor:
        """I, [B, E] on the CPU."""
        own_B1 = torch.tensor(self._groups(rows)).unsqueeze(-1)
        group_E = torch.arange(num_experts) // (num_experts // self.config.groups)
        # 1 in a row's own group, -1 elsewhere
        side_BE = torch.where(group_E == own_B1, 1.0, -1.0).double()
        towards = -1 if self.config.sign == "paper" else 1
        return 1 + towards * self.config.delta * side_BE

    def _groups(self, rows: TokenRows) -> list[int]:
        """Group of each row's task."""
        known = self.config.task_groups
        if rows.tasks is None:
            raise RoutingError(
                "balance objective 'localized' needs the task of every row: run inside "
                f"molora.tasks(model, [...]) with names of {sorted(known)}"
            )
        unknown = sorted(set(rows.tasks) - known.keys())
        if unknown:
            raise RoutingError(
                f"balance objective 'localized': no group is set for {unknown}; add "
                f"them to task_groups, which names {sorted(known)}"
            )
        return [known[task] for task in rows.tasks]
