"""Objectives on the entropy of the router's probabilities.

    H_q(p) = (1 - sum_e p_e^q) / (q - 1);  -sum_e p_e ln p_e for q = 1
    entropy             mean_t H_q(p_t) / H_q(uniform)
    mutual_information  1 - (H_1(mean_t p_t) - mean_t H_1(p_t)) / ln E

Both are 1 where every token is routed uniformly. The first falls as tokens become sure
of their experts, the second only if they are sure of different ones.

Shape legend: see base.py.
"""

import math

import pydantic
from torch import Tensor

from molora.context import TokenRows
from molora.routers.balance import (
    OBJECTIVES,
    Objective,
    ObjectiveConfig,
    mean_over_tokens,
)
from molora.routers.base import Routing

_TINY = 1e-30
"""Probabilities are not below this within logarithms and powers."""


def tsallis(probs: Tensor, q: float) -> Tensor:
    """Tsallis entropy H_q over the last dimension, in nats for q = 1."""
    floored = probs.clamp(min=_TINY)
    if q == 1:
        return -(probs * floored.log()).sum(-1)
    return (1 - floored.pow(q).sum(-1)) / (q - 1)


def largest_tsallis(num_experts: int, q: float) -> float:
    """H_q of the uniform distribution of E experts."""
    if q == 1:
        return math.log(num_experts)
    return float((1 - num_experts ** (1 - q)) / (q - 1))


@OBJECTIVES.register("entropy", paper="arXiv:2504.00661")
class EntropyObjective(Objective):
    """Mean Tsallis entropy of a token's probabilities over its maximum; sharpens.

    Li et al. 2025 (DynMoLE), with q = 1.1; divided by its maximum here, so
    that a coefficient means the same for every E.

    Limitations: alone it lets all tokens go to one expert; use it beside ``switch``.
    """

    class Config(ObjectiveConfig):
        """Settings of the entropy objective."""

        index: float = pydantic.Field(default=1.0, gt=0)
        """q; 1 is Shannon's entropy."""

    config: Config

    def __call__(
        self,
        routing: Routing,
        weight_T: Tensor | None,
        rows: TokenRows | None = None,
    ) -> Tensor:
        """See base class."""
        probs_TE, q = routing.probs, self.config.index
        mean = mean_over_tokens(tsallis(probs_TE, q), weight_T)
        return mean / largest_tsallis(probs_TE.shape[-1], q)


@OBJECTIVES.register("mutual_information", paper="arXiv:2212.08066")
class MutualInformation(Objective):
    """1 - I(token; expert) / ln E: tokens sure of their experts, and of different ones.

    Chen et al. 2022 (Mod-Squad), with the tokens of one forward in place of
    tasks; shifted and divided here so that uniform routing costs 1, perfect use 0.

    Limitations: the mean is of the tokens of one forward, so a small batch is noisy.
    """

    def __call__(
        self,
        routing: Routing,
        weight_T: Tensor | None,
        rows: TokenRows | None = None,
    ) -> Tensor:
        """See base class."""
        probs_TE = routing.probs
        mean_E = mean_over_tokens(probs_TE, weight_T)
        each = mean_over_tokens(tsallis(probs_TE, 1), weight_T)
        most = math.log(probs_TE.shape[-1])
        is_any = (mean_E.detach().sum() > 0).to(probs_TE.dtype)
        return is_any - (tsallis(mean_E, 1) - each) / most
