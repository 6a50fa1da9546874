"""How experts are used, in numbers: at one site, in one layer, by one task.

Of the real tokens that reach a site:

    gate_e  = mean gate of expert e
    share_e = part of all assignments that went to expert e; a soft router assigns each
              token to its likeliest expert
    entropy = -sum_e w_e ln(w_e) / ln E, with w_e = gate_e / sum of all gates;
              1 when all are used alike, 0 when one is
    live    = number of experts with w_e > 1 / (10 E)

Entropy and live experts are those of the training log (training/monitor.py).

A layer is the mean over its sites, a task the mean over all sites. Where layers have
different numbers of experts, the mean of expert e is over the sites that have it.

Legend: E experts
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from molora.records import RoutingTrace

LIVE = 0.1
"""An expert is live above this part of the weight that even routing would give it."""


@dataclass(frozen=True)
class Use:
    """How experts were used at one site, or on average over several.

    Attributes:
        gate: Mean gate by expert.
        share: Part of the assignments by expert; sums to 1 at one site.
        entropy: Normalised entropy of the gates, 0 to 1.
        live: Experts in use.
    """

    gate: list[float]
    share: list[float]
    entropy: float
    live: float

    @property
    def busiest(self) -> int:
        """Expert with the largest mean gate."""
        return max(range(len(self.gate)), key=self.gate.__getitem__)


@dataclass(frozen=True)
class TaskUse:
    """Use of the experts by the tokens of one task.

    Attributes:
        tokens: Real tokens that reached the routers.
        sites: Use by module path, in model order.
    """

    tokens: int
    sites: dict[str, Use]

    def layers(self) -> dict[str, Use]:
        """Mean use by layer, in model order."""
        groups: dict[str, list[Use]] = {}
        for path, use in self.sites.items():
            groups.setdefault(layer_of(path), []).append(use)
        return {layer: mean_use(uses) for layer, uses in groups.items()}

    def mean(self) -> Use:
        """Mean use over all sites."""
        return mean_use(self.sites.values())

    def to_dict(self) -> dict[str, Any]:
        """The numbers, JSON-ready."""
        return {
            "tokens": self.tokens,
            "mean": asdict(self.mean()),
            "layers": {name: asdict(use) for name, use in self.layers().items()},
            "sites": {path: asdict(use) for path, use in self.sites.items()},
        }


def layer_of(path: str) -> str:
    """Layer that a module path belongs to: its first number, else the path itself."""
    return next((part for part in path.split(".") if part.isdigit()), path)


def mean_use(uses: Iterable[Use]) -> Use:
    """Average the use of one or more sites."""
    several = list(uses)
    return Use(
        gate=_columns([use.gate for use in several]),
        share=_columns([use.share for use in several]),
        entropy=math.fsum(use.entropy for use in several) / len(several),
        live=math.fsum(use.live for use in several) / len(several),
    )


def task_use(trace: RoutingTrace, tasks: Sequence[str]) -> TaskUse:
    """Use by the tokens of some tasks together.

    Args:
        trace: A recording.
        tasks: Names in it, of which at least one has tokens.
    """
    sites = {}
    most = 0
    for path, record in trace.sites.items():
        seen = [task for task in tasks if record.tokens.get(task)]
        if not seen:
            continue
        tokens = sum(record.tokens[task] for task in seen)
        gate_E = _total([record.gate_sum[task] for task in seen])
        chosen_E = _total([record.chosen_sum[task] for task in seen])
        sites[path] = _use(gate_E / tokens, chosen_E)
        most = max(most, tokens)
    return TaskUse(most, sites)


def _total(sums: Sequence[Tensor]) -> Tensor:
    total_E = sums[0].clone()
    for sum_E in sums[1:]:
        total_E += sum_E
    return total_E


def _use(gate_E: Tensor, chosen_E: Tensor) -> Use:
    weight = (gate_E / gate_E.sum().clamp(min=1e-30)).tolist()
    nats = -math.fsum(w * math.log(w) for w in weight if w > 0)
    return Use(
        gate=gate_E.tolist(),
        share=(chosen_E / chosen_E.sum().clamp(min=1)).tolist(),
        entropy=nats / math.log(len(weight)),
        live=sum(w > LIVE / len(weight) for w in weight),
    )


def _columns(rows: list[list[float]]) -> list[float]:
    """Mean of every column over the rows that have it."""
    means = []
    for expert in range(max(map(len, rows))):
        values = [row[expert] for row in rows if expert < len(row)]
        means.append(math.fsum(values) / len(values))
    return means
