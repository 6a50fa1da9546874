"""Balance without a loss: a bias on the selection that follows the load.

    chosen: the K experts with the largest p_e + b_e;  gates from p alone
    after each optimizer step:  b_e <- b_e + weight * sign(mean load - load_e)

Reference: Wang et al. 2024, arXiv:2408.15664, section 3.
Shape legend: see base.py.
"""

import torch
from torch import Tensor

from molora.context import TokenRows
from molora.routers.balance import OBJECTIVES, ObjectiveConfig, Steering
from molora.routers.base import AbstractRouter, Routing


@OBJECTIVES.register("bias", paper="arXiv:2408.15664")
class SelectionBias(Steering):
    """A bias per expert, on the selection only, moved by ``weight`` per optimizer step.

    Its value is the largest load over the mean load: 1 where all are used alike. It
    adds no gradient. The trainer calls ``molora.after_optimizer_step``; another loop
    has to.

    Limitations: for routers that take a fixed number of experts by rank. ``weight`` is
    a step in units of probability (0.001 in the paper), not divided by the number of
    sites. The load is that of the tokens since the last step, of all processes.
    """

    @classmethod
    def check(
        cls, config: ObjectiveConfig, router: type[AbstractRouter], num_experts: int
    ) -> str | None:
        """See base class."""
        if not router.ranks:
            return (
                "a bias moves experts up and down a ranking, and this router.kind does "
                "not choose by rank; set it to topk, or use the objective switch"
            )
        return super().check(config, router, num_experts)

    def __call__(
        self,
        routing: Routing,
        weight_T: Tensor | None,
        rows: TokenRows | None = None,
    ) -> Tensor:
        """See base class."""
        load_E = routing.load(weight_T)
        mean = load_E.mean()
        return load_E.amax() / mean.masked_fill(mean == 0, 1.0)

    def step(self, router: AbstractRouter) -> None:
        """See base class."""
        load_E, bias_E = router.load_E, router.bias_E
        assert bias_E is not None
        if load_E is None:
            load_E = torch.zeros_like(bias_E)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(load_E)
        bias_E += self.config.weight * torch.sign(load_E.mean() - load_E)
