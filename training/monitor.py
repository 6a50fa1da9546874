"""What the routers do during training: numbers for the log, and a warning on collapse.

Of the real tokens of one window, at one site:

    weight_e = sum of the gates of expert e / sum of all gates
    share_e  = part of all assignments that went to expert e; a soft router assigns each
               token to its likeliest expert
    entropy  = -sum_e weight_e ln(weight_e) / ln E;  1 when all weigh alike, 0 when one
    live     = number of experts with weight_e > 1 / (10 E)

Entropy and live experts are of the weights, not of the shares: the shares of a soft
router say little, since near uniform gates may well have one likeliest expert.

A router has collapsed when, over the last ``collapse_window`` steps, it had no more
live experts than it gives one token, though it could choose, or when one expert of
three or more had a weight above ``collapse_weight``.

Shape legend
    E experts   N all numbers of all sites, one after the other
"""

import logging
import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from molora.model import sites
from molora.records import SiteStats
from molora.routers import AdapterRouter
from molora.training.arguments import MoloraTrainingSettings

logger = logging.getLogger(__name__)

LIVE = 0.1
"""An expert is live above this part of its weight under uniform routing."""


@dataclass(frozen=True)
class SiteUse:
    """What one router did over some steps; defined at the top of this file.

    Attributes:
        tokens: Real tokens routed.
        mean_weight: weight_e by expert; sums to 1.
        share: share_e by expert; sums to 1.
        entropy: 0 to 1.
        live_experts: Between 0 and E.
        per_token: Experts that one token was assigned to, on average.
        balance: Value of each objective, mean over forwards.
    """

    tokens: float
    mean_weight: list[float]
    share: list[float]
    entropy: float
    live_experts: int
    per_token: float
    balance: dict[str, float]

    def collapse(self, limit: float) -> str | None:
        """Say how this router has collapsed, or return None.

        Args:
            limit: Weight above which one expert of three or more is too heavy.
        """
        experts = len(self.mean_weight)
        heaviest = max(range(experts), key=self.mean_weight.__getitem__)
        # per_token comes from float32 sums, hence the margins
        if self.live_experts <= self.per_token + 0.01 < experts - 0.5:
            return f"only {self.live_experts} of {experts} experts are in use"
        if experts > 2 and self.mean_weight[heaviest] > limit:
            weight = self.mean_weight[heaviest]
            return f"expert {heaviest} of {experts} has {weight:.0%} of the weight"
        return None


@dataclass(frozen=True)
class _Place:
    """Where the numbers of one site stand among N."""

    path: str
    start: int
    experts: int
    kinds: tuple[str, ...]

    @property
    def size(self) -> int:
        return 2 + 2 * self.experts + len(self.kinds)


class RoutingMonitor:
    """Reads the running sums of all routers at log steps and looks for collapse.

    Between log steps nothing is read, so that no device is waited for. Under data
    parallelism the numbers are of the tokens of this process.

    Args:
        model: A wrapped model. Its ``molora_runtime.stats`` is used from now on.
        settings: Window and limit of the collapse warning.
    """

    def __init__(self, model: nn.Module, settings: MoloraTrainingSettings):
        self.model = model
        self.settings = settings
        self.places: list[_Place] = []
        size = 0
        for path, site in sites(model).items():
            if site.router is None:
                continue
            kinds = tuple(objective.config.kind for objective, _ in site.objectives)
            self.places.append(_Place(path, size, site.experts.num_experts, kinds))
            size += self.places[-1].size
        self.window: deque[tuple[int, Tensor]] = deque()
        self.collapsed: set[str] = set()
        # where rows say what they use, nothing is chosen that could collapse
        self.named = {
            path
            for path, site in sites(model).items()
            if isinstance(site.router, AdapterRouter)
        }
        self._runtime.stats = {} if self.places else None

    @property
    def _runtime(self) -> Any:
        return self.model.molora_runtime

    def stop(self) -> None:
        """Let forwards collect no more."""
        self._runtime.stats = None

    def read(self, steps: int) -> dict[str, SiteUse]:
        """Read what was collected since the last call, and start anew.

        Warns of routers that have collapsed, once until they recover.

        Args:
            steps: Optimizer steps since the last call.

        Returns:
            Use by site that saw real tokens, in model order.
        """
        if not self.places:
            return {}
        numbers_N = self._collected()
        self._runtime.stats = {}
        self._watch(steps, numbers_N)
        return self._uses(numbers_N)

    def _collected(self) -> Tensor:
        """All running sums in one float64 vector on the CPU, moved at once."""
        stats: dict[str, SiteStats] = self._runtime.stats
        pieces = []
        for place in self.places:
            site = stats.get(place.path)
            if site is None:
                pieces.append(torch.zeros(place.size))
                continue
            single = [torch.full_like(site.tokens, site.forwards), site.tokens]
            balance = [site.balance[kind].reshape(1) for kind in place.kinds]
            parts = [torch.stack(single), site.gate_sum_E, site.chosen_sum_E, *balance]
            pieces.append(torch.cat(parts))
        device = pieces[0].device
        return torch.cat([piece.to(device) for piece in pieces]).cpu().double()

    def _uses(self, numbers_N: Tensor) -> dict[str, SiteUse]:
        uses = {}
        for place in self.places:
            row = numbers_N[place.start : place.start + place.size]
            use = _use(place, row.tolist())
            if use is not None:
                uses[place.path] = use
        return uses

    def _watch(self, steps: int, numbers_N: Tensor) -> None:
        """Move the window on and warn of new collapses in it."""
        wanted = self.settings.collapse_window
        if not wanted:
            return
        self.window.append((steps, numbers_N))
        covered = sum(steps for steps, _ in self.window)
        while covered - self.window[0][0] >= wanted:
            covered -= self.window.popleft()[0]
        if covered < wanted:
            return
        total_N = torch.stack([numbers for _, numbers in self.window]).sum(0)
        found = {
            path: reason
            for path, use in self._uses(total_N).items()
            if path not in self.named
            and (reason := use.collapse(self.settings.collapse_weight))
        }
        new = [path for path in found if path not in self.collapsed]
        self.collapsed = set(found)
        if new:
            shown = "".join(f"\n  {path}: {found[path]}" for path in new[:5])
            more = f"\n  and {len(new) - 5} more" if len(new) > 5 else ""
            logger.warning(
                "%d of %d routers have collapsed over the last %d steps (try a balance "
                "objective, a larger balance weight, a lower learning rate):%s%s",
                len(found),
                len(self.places),
                covered,
                shown,
                more,
            )

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if it had not stopped."""
        return {
            "sites": [place.path for place in self.places],
            "open": self._collected() if self.places else None,
            "window": [(steps, numbers) for steps, numbers in self.window],
            "collapsed": sorted(self.collapsed),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what ``state`` returned, for a model with the same sites."""
        self.window = deque((steps, numbers) for steps, numbers in state["window"])
        self.collapsed = set(state["collapsed"])
        modules = sites(self.model)
        for place in self.places:
            row = state["open"][place.start : place.start + place.size]
            device = modules[place.path].weight.device
            numbers = row.float().to(device)
            E = place.experts
            site = SiteStats(
                tokens=numbers[1].clone(),
                gate_sum_E=numbers[2 : 2 + E].clone(),
                chosen_sum_E=numbers[2 + E : 2 + 2 * E].clone(),
                forwards=int(row[0]),
            )
            for kind, value in zip(place.kinds, numbers[2 + 2 * E :], strict=True):
                site.balance[kind] = value.clone()
            self._runtime.stats[place.path] = site


def _use(place: _Place, row: list[float]) -> SiteUse | None:
    """Turn the sums of one site into numbers; None without a real token."""
    E = place.experts
    forwards, tokens = row[:2]
    gates, chosen, balance = row[2 : 2 + E], row[2 + E : 2 + 2 * E], row[2 + 2 * E :]
    if not tokens:
        return None
    weight = [gate / max(sum(gates), 1e-30) for gate in gates]
    nats = -math.fsum(w * math.log(w) for w in weight if w > 0)
    return SiteUse(
        tokens=tokens,
        mean_weight=weight,
        share=[count / max(sum(chosen), 1) for count in chosen],
        entropy=nats / math.log(E),
        live_experts=sum(w > LIVE / E for w in weight),
        per_token=sum(chosen) / tokens,
        balance={k: b / forwards for k, b in zip(place.kinds, balance, strict=True)},
    )
