"""One collapse of low-rank experts: every site is solved, with or without data.

Shape legend: see factors.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.progress import Progress
from torch import nn

from molora.collapse.apply import single_config, single_expert
from molora.collapse.base import Collapser
from molora.collapse.calibration import FIT, HELD, Batch
from molora.collapse.factors import LowRank, SiteFactors, minus, norm, ratio
from molora.collapse.gather import gather, pool
from molora.collapse.moments import Errors, Evidence, Usage, even
from molora.collapse.passes import plan, shared_inputs
from molora.collapse.report import SiteReport
from molora.config import AdapterConfig
from molora.experts import AbstractExperts
from molora.model import sites


@dataclass
class _Outcome:
    """The static update of one site and what is known about it."""

    delta: LowRank
    usage: Usage
    errors: Errors | None
    details: dict[str, Any]


@dataclass
class Run:
    """One collapse: solves all sites, with or without data."""

    model: nn.Module
    collapser: Collapser
    factors: dict[str, SiteFactors]
    progress: Progress
    outcomes: dict[str, _Outcome] = field(default_factory=dict)
    passes: int = 0
    tokens: tuple[int, int] | None = None
    prepared: dict[str, Any] = field(default_factory=dict)

    def without_data(self) -> None:
        """Solve every site with even gates."""
        for path, site in self.factors.items():
            data = even(site)
            delta, details = self.collapser.solve(site, data, {})
            self.outcomes[path] = _Outcome(delta, data.usage, None, details)

    def with_data(self, batches: list[Batch]) -> None:
        """Solve the sites group by group, one pass over the batches each."""
        leaders = shared_inputs(self.model, batches[0])
        parts = 1 + self.collapser.needs_moments
        budget = self.collapser.config.memory_budget_mb
        groups = plan(self.factors, leaders, parts, budget)
        self.passes = len(groups)
        with self.progress as bar:
            self.prepared = self.collapser.prepare(
                self.model, self.factors, batches, bar
            )
            read = bar.add_task("calibration batches", total=len(groups) * len(batches))
            solved = bar.add_task("sites", total=len(self.factors))
            for group in groups:
                self._solve(group, batches, leaders, lambda: bar.advance(read))
                bar.advance(solved, len(group))
        # in model order again, whatever the groups were
        self.outcomes = {path: self.outcomes[path] for path in self.factors}

    def _solve(
        self,
        group: list[str],
        batches: list[Batch],
        leaders: dict[str, str],
        step: Callable[[], None],
    ) -> None:
        """Judge every site of a group, then solve it with all rows.

        The sums live in here alone, so that those of two groups never stand together.
        """
        members = {path: self.factors[path] for path in group}
        with_moments = [self.collapser.needs_moments, True]
        sums = gather(self.model, batches, members, leaders, with_moments, step)
        judged = {path: self._judge(site, sums[path]) for path, site in members.items()}
        for path, data in pool(sums, leaders).items():
            tuned, errors = judged[path]
            delta, details = self.collapser.solve(members[path], data, tuned)
            self.outcomes[path] = _Outcome(
                delta, data.usage, errors, {**tuned, **details}
            )

    def _judge(
        self, site: SiteFactors, parts: list[Evidence]
    ) -> tuple[dict[str, float], Errors]:
        """Choose what is tuned, fit on the FIT rows, measure on the HELD rows."""
        fit, held = parts[FIT], parts[HELD]
        assert held.moments is not None
        self.tokens = (fit.usage.total(), held.usage.total())
        tuned = self.collapser.tune(site, fit, held)
        trial, _ = self.collapser.solve(site, fit, tuned)
        return tuned, held.moments.errors(site, trial)

    def site_report(self, path: str) -> SiteReport:
        """Report of one site."""
        site, outcome = self.factors[path], self.outcomes[path]
        gates_E = outcome.usage.mean()
        mean = site.combine(gates_E)
        errors = outcome.errors or Errors(None, None)
        return SiteReport(
            experts=site.num_experts,
            total_rank=site.total_rank,
            rank=outcome.delta.rank,
            gates=gates_E.tolist(),
            weight_error=ratio(norm(minus(outcome.delta, mean)), norm(mean)),
            error=errors.update,
            output_error=errors.output,
            details=outcome.details,
        )

    def result(self) -> tuple[AdapterConfig, dict[str, AbstractExperts]]:
        """Config and banks of one expert for every site."""
        deltas = {path: outcome.delta for path, outcome in self.outcomes.items()}
        found = sites(self.model)
        config = single_config(
            self.model.molora_config,  # type: ignore[arg-type]
            {path: delta.rank for path, delta in deltas.items()},
            found,
        )
        return config, {
            p: single_expert(found[p], delta, config) for p, delta in deltas.items()
        }

    def exact(self) -> bool:
        """Whether the result is proven equal: nothing routed, nothing truncated."""
        return all(
            site.num_experts == 1 and self.outcomes[path].delta.rank >= _full_rank(site)
            for path, site in self.factors.items()
        )

    def notes(self) -> list[str]:
        """How to read the report."""
        if self.tokens:
            notes = self.collapser.notes()
        else:
            notes = ["No calibration data: mean gates are even, no error is measured."]
        if any(site.num_experts > 1 for site in self.factors.values()):
            notes.append("A mixture that routes by token has no static equal.")
        return notes


def _full_rank(site: SiteFactors) -> int:
    return min(site.total_rank, site.A_RI.shape[1], site.Bt_QO.shape[1])
