"""DynMoLE: top-p routing that falls back to all experts where the router is unsure.

    H_q(p) = (1 - sum_e p_e^q) / (q - 1);  -sum_e p_e ln p_e for q = 1
    chosen: all experts where H_q(p) > entropy_threshold, else those of top-p

Reference: Li et al. 2025 (DynMoLE), arXiv:2504.00661, section 3.
Shape legend: see base.py.
"""

import pydantic
from torch import Tensor

from molora.routers.base import ROUTERS, RouterConfig
from molora.routers.entropy import largest_tsallis, tsallis
from molora.routers.topp import TopPRouter


@ROUTERS.register("dynmole", paper="arXiv:2504.00661")
class DynMoLERouter(TopPRouter):
    """Top-p, or all experts where the Tsallis entropy of a token is high.

    Limitations: the entropy is not divided by its maximum, which grows with E. Unlike
    in the authors' code, the expert that crosses top_p is chosen too, and gates are
    divided by their sum unless told otherwise. Train it with the objectives ``entropy``
    and ``switch``.
    """

    class Config(TopPRouter.Config):
        """Settings of DynMoLE; defaults are those of the authors' code."""

        top_p: float = pydantic.Field(default=0.75, gt=0, le=1)
        """Probability to reach, in (0, 1]."""
        min_experts: int = pydantic.Field(default=2, ge=1)
        """Experts that every token uses at least."""
        entropy_threshold: float = pydantic.Field(default=0.9, gt=0)
        """Entropy above which a token uses all experts."""
        entropy_index: float = pydantic.Field(default=1.1, gt=0)
        """q; 1 is Shannon's entropy in nats."""

    config: Config

    @classmethod
    def check(cls, config: RouterConfig, num_experts: int) -> str | None:
        """See base class."""
        assert isinstance(config, cls.Config)
        largest = largest_tsallis(num_experts, config.entropy_index)
        if num_experts > 1 and config.entropy_threshold >= largest:
            return (
                f"router.entropy_threshold={config.entropy_threshold} is never "
                f"exceeded: the entropy of {num_experts} experts is at most "
                f"{largest:.4g}; lower it, or set router.kind to topp"
            )
        return super().check(config, num_experts)

    def choose(self, probs: Tensor) -> Tensor:
        """See base class."""
        entropy_T = tsallis(probs, self.config.entropy_index)
        unsure_T1 = (entropy_T > self.config.entropy_threshold).unsqueeze(-1)
        return super().choose(probs) | unsure_T1
