"""Sigmoid gates: each expert is switched by itself, by its own gate vector.

    g_e = sigmoid(v_e x / temperature)
    g_e = 0  where task_experts names another expert for the task of the row

With ``task_experts`` and frozen experts this learns each gate vector on the data of its
own expert alone: the second stage of PHATGOOSE, where the gate multiplies the input of
the expert, which is the same as its output.

Reference: Muqeeth et al. 2024 (PHATGOOSE), arXiv:2402.05859, section 3.
Shape legend: see base.py; B rows.
"""

import torch
from torch import Tensor

from molora.context import ForwardContext
from molora.errors import RoutingError
from molora.routers.base import (
    ROUTERS,
    GateConfig,
    LinearGateRouter,
    RouterConfig,
    Routing,
)


@ROUTERS.register("sigmoid", paper="arXiv:2402.05859")
class SigmoidRouter(LinearGateRouter):
    """One independent sigmoid gate per expert; gates do not sum to one.

    Limitations: gates start at one half, so more experts make a larger update. There is
    nothing to balance, and neither expert dropout nor capacity. To route by the learned
    vectors, load them with router ``phatgoose``.
    """

    selects = False
    has_probs = False

    class Config(GateConfig):
        """Settings of sigmoid gates."""

        task_experts: dict[str, int] = {}
        """The only expert, from 0, that rows of each task use; empty: all of them."""

    config: Config

    @classmethod
    def check(cls, config: RouterConfig, num_experts: int) -> str | None:
        """See base class."""
        assert isinstance(config, cls.Config)
        outside = [e for e in config.task_experts.values() if not 0 <= e < num_experts]
        if outside and num_experts > 1:
            return (
                f"router.task_experts names {sorted(outside)}, but experts are counted "
                f"from 0 to {num_experts - 1}"
            )
        if config.expert_dropout:
            return (
                "router.expert_dropout: with router.kind 'sigmoid' no other expert "
                "would take the gate over; drop it"
            )
        return super().check(config, num_experts)

    @classmethod
    def known_tasks(cls, config: RouterConfig) -> tuple[str, ...]:
        """See base class."""
        assert isinstance(config, cls.Config)
        return tuple(config.task_experts) or super().known_tasks(config)

    def forward(self, x: Tensor, context: ForwardContext) -> Routing:
        """See base class.

        Raises:
            RoutingError: As in the base class; also when the task of a row is missing
                or unknown although ``task_experts`` is set.
        """
        logits_TE = self.logits(x)
        gates_TE = torch.sigmoid(logits_TE)
        if not self.config.task_experts:
            return Routing(gates_TE, gates_TE, logits_TE, top_k=None)
        own_TE = self._own(x, context, gates_TE.shape[-1])
        gates_TE = torch.where(own_TE, gates_TE, gates_TE.new_zeros(()))
        return Routing(gates_TE, gates_TE, logits_TE, top_k=1)

    def _own(self, x: Tensor, context: ForwardContext, num_experts: int) -> Tensor:
        """True at the expert of each token's task, [T, E]."""
        known = self.config.task_experts
        rows = context.token_rows(x.shape, self.site)
        missing = sorted({task for task in rows.tasks or [""] if task not in known})
        if missing or rows.tasks is None:
            raise RoutingError(
                f"site {self.site!r}: router.task_experts needs the task of every row, "
                f"and knows {sorted(known)}, not {missing}; run inside molora.tasks"
            )
        expert_B = torch.tensor([known[t] for t in rows.tasks], device=x.device)
        expert_T = expert_B.repeat_interleave(x.shape[0] // rows.num_rows)
        expert_E = torch.arange(num_experts, device=x.device)
        return expert_T.unsqueeze(-1) == expert_E
