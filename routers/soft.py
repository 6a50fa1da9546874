"""Soft routing: every expert, weighted by a softmax.

    g = p = softmax(W x / temperature)

Reference: Zadouri et al. 2023 (MoLORA), arXiv:2309.05444, equation 2.
Shape legend: see base.py.
"""

from torch import Tensor

from molora.context import ForwardContext
from molora.routers.base import ROUTERS, GateConfig, LinearGateRouter, Routing


@ROUTERS.register("soft", paper="arXiv:2309.05444")
class SoftRouter(LinearGateRouter):
    """All experts, weighted by the softmax of a linear gate.

    Limitations: no expert is ever skipped; balance objectives count each token for its
    likeliest expert.
    """

    selects = False

    class Config(GateConfig):
        """Settings of soft routing."""

    def sums_to_one(self) -> bool:
        """See base class."""
        return True

    def forward(self, x: Tensor, context: ForwardContext) -> Routing:
        """See base class."""
        logits_TE = self.logits(x)
        gates_TE, full_TE = self.probs(logits_TE)
        return Routing(gates_TE, full_TE, logits_TE, top_k=None)
