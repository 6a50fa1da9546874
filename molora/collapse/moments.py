"""What collapse keeps of the calibration tokens: sums in rank space.

A site's update of token t is d_t = Bt^T zg_t, with zg_t [Q] the gated rank vector. Of
all tokens only these sums are kept:

    C = sum x x^T [I, I]    M = sum zg x^T [Q, I]    S = sum zg zg^T [Q, Q]

They give the error of any static update W = B_r^T A_r exactly:

    sum |d - W x|^2 = tr(Bt Bt^T S) - 2 tr(Bt B_r^T A_r M^T) + tr(B_r B_r^T A_r C A_r^T)

Shape legend: see factors.py.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from molora.collapse.factors import LowRank, SiteFactors, ratio

Task = str | int | None
"""Name or id of a row's task; None when the batches name none."""


@dataclass
class Usage:
    """How much each expert of a site was used, by task.

    Attributes:
        tokens: Real tokens seen.
        gate_sum: Sum of the gates, [E] float64.
    """

    tokens: dict[Task, int] = field(default_factory=dict)
    gate_sum: dict[Task, Tensor] = field(default_factory=dict)

    def add(self, task: Task, gates_TE: Tensor) -> None:
        """Add tokens of one task."""
        self.tokens[task] = self.tokens.get(task, 0) + gates_TE.shape[0]
        gates_E = gates_TE.double().sum(0)
        self.gate_sum[task] = self.gate_sum.get(task, 0) + gates_E

    def total(self) -> int:
        """Real tokens of all tasks."""
        return sum(self.tokens.values())

    def mean(self, tasks: Iterable[Task] | None = None) -> Tensor:
        """Mean gates, over all tokens or those of some tasks; [E] float64."""
        names = list(self.tokens if tasks is None else tasks)
        total = sum(self.gate_sum[name] for name in names)
        assert isinstance(total, Tensor)
        return total / sum(self.tokens[name] for name in names)

    def __add__(self, other: "Usage") -> "Usage":
        result = Usage(dict(self.tokens), dict(self.gate_sum))
        for task, count in other.tokens.items():
            result.tokens[task] = result.tokens.get(task, 0) + count
            sums = result.gate_sum.get(task, 0) + other.gate_sum[task]
            result.gate_sum[task] = sums
        return result


class Errors(NamedTuple):
    """Relative errors of a static update on some tokens; None where 0 is divided by."""

    update: float | None
    """sqrt(sum |W x - d|^2 / sum |d|^2), against the mixture's update."""
    output: float | None
    """sqrt(sum |W x - d|^2 / sum |y|^2), against the layer's whole output."""


@dataclass
class Moments:
    """Second moments of one site over some tokens, float64.

    Attributes:
        C_II: Of the inputs; sites with one and the same input share the tensor.
        M_QI: Of the gated rank vectors with the inputs.
        S_QQ: Of the gated rank vectors.
        output: Sum of the squares of the layer's output, a scalar.
    """

    C_II: Tensor
    M_QI: Tensor
    S_QQ: Tensor
    output: Tensor

    @classmethod
    def empty(cls, factors: SiteFactors, C_II: Tensor) -> "Moments":
        """No tokens yet; C_II is where the site's input covariance is summed."""
        rows, wide = factors.Bt_QO.shape[0], factors.A_RI.shape[1]
        zeros = factors.A_RI.new_zeros
        return cls(C_II, zeros(rows, wide), zeros(rows, rows), zeros(()))

    def add(self, x_TI: Tensor, zg_TQ: Tensor, y_TO: Tensor) -> None:
        """Add tokens to all sums but C."""
        self.M_QI.addmm_(zg_TQ.t(), x_TI)
        self.S_QQ.addmm_(zg_TQ.t(), zg_TQ)
        self.output += y_TO.double().square().sum()

    def energy(self, factors: SiteFactors) -> float:
        """Sum of the squares of the mixture's update."""
        gram_QQ = factors.Bt_QO @ factors.Bt_QO.t()
        return float((gram_QQ * self.S_QQ).sum())

    def distance(self, factors: SiteFactors, delta: LowRank) -> float:
        """Sum of the squared differences between the mixture's and a static update."""
        cross_Qr = factors.Bt_QO @ delta.Bt_rO.t()
        gram_rr = delta.Bt_rO @ delta.Bt_rO.t()
        both = (cross_Qr * (self.M_QI @ delta.A_rI.t())).sum()
        own = (gram_rr * (delta.A_rI @ self.C_II @ delta.A_rI.t())).sum()
        return max(self.energy(factors) - 2 * float(both) + float(own), 0.0)

    def errors(self, factors: SiteFactors, delta: LowRank) -> Errors:
        """Relative errors of a static update on these tokens."""
        off = math.sqrt(self.distance(factors, delta))
        return Errors(
            ratio(off, math.sqrt(max(self.energy(factors), 0.0))),
            ratio(off, math.sqrt(float(self.output))),
        )


class Evidence(NamedTuple):
    """What a method may learn about one site from some of the tokens."""

    usage: Usage
    """Mean gates, by task."""
    moments: Moments | None = None
    """Second moments, where they were gathered."""


def even(factors: SiteFactors) -> Evidence:
    """Evidence that stands in for calibration data: even gates, nothing measured."""
    return Evidence(Usage({None: 1}, {None: factors.even_E}))
