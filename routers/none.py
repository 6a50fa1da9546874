"""No routing: one expert, always on."""

from torch import Tensor

from molora.context import ForwardContext
from molora.routers.base import ROUTERS, AbstractRouter, RouterConfig, Routing


@ROUTERS.register("none", paper="arXiv:2106.09685")
class NoRouter(AbstractRouter):
    """One expert with gate 1: an ordinary adapter. No router module is built."""

    own_site = True

    class Config(RouterConfig):
        """Settings of no routing."""

    @classmethod
    def check(cls, config: RouterConfig, num_experts: int) -> str | None:
        """See base class."""
        if num_experts > 1:
            return (
                f"router.kind 'none' cannot choose among num_experts={num_experts}; "
                "set router.kind to soft or topk, or num_experts to 1"
            )
        return super().check(config, num_experts)

    def forward(self, x: Tensor, context: ForwardContext) -> Routing:
        """Never called: a bank of one expert has no router."""
        raise AssertionError("a bank with one expert builds no router")
