"""collapse: a wrapped mixture becomes the same model with one expert per site."""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch import nn

from molora.collapse.apply import replace_banks, single_config, single_expert
from molora.collapse.base import COLLAPSERS, CollapseConfig, Collapser
from molora.collapse.calibration import FIT, HELD, Batch, read_calibration
from molora.collapse.factors import LowRank, SiteFactors, minus, norm, ratio
from molora.collapse.gather import gather, pool
from molora.collapse.moments import Errors, Evidence, Usage, even
from molora.collapse.passes import in_eval, plan, shared_inputs
from molora.collapse.report import CollapseReport, CollapseResult, SiteReport
from molora.errors import ConfigError, WrapError
from molora.ffn import ffns
from molora.layer import MoloraLinear
from molora.model import sites

Evaluate = Callable[[Any], Mapping[str, float]]


def collapse(
    model: nn.Module,
    method: str = "calibrated",
    rank: int | None = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    *,
    evaluate: Evaluate | None = None,
    show_progress: bool = True,
    **options: Any,
) -> CollapseResult:
    """Turn every bank into one expert without a router, in place.

    Gates that depend on the token have no static equal, so a collapse loses something
    wherever a router routes; the report says how much. With calibration data, a part of
    its rows is held out: the method learns from the rest, its error is measured on the
    held-out tokens (each site on the inputs it has in the mixture), and then it learns
    again from all rows; that last fit is what the model gets. Padding counts nowhere.

    Args:
        model: A wrapped model that is not merged. Its mode is kept.
        method: A name in ``molora.collapse.base.COLLAPSERS``.
        rank: Rank of the result, for methods that take one; None means their default. A
            site whose experts hold less rank together gets what they hold.
        calibration: Batches for model(**batch), read once into memory: input_ids,
            attention_mask, and optionally the rows' ``tasks`` (names) or ``task_ids``
            (numbers). None makes mean gates even, and no error can be measured.
        evaluate: Returns a loss per task; called with the model before and after.
        show_progress: Show a progress bar on the terminal.
        **options: The other settings of the method's ``Config``, such as ``tasks``,
            ``held_out``, ``memory_budget_mb``, ``energy``, ``expert``, ``weights``.

    Returns:
        The report, which is also kept as ``model.molora_report``.

    Raises:
        ConfigError: An unknown method, or an option that it does not read.
        DataError: Calibration data that cannot be used.
        WrapError: The model is not wrapped, merged, disabled, has an expert family
            without low-rank factors, or one expert everywhere and the method does not
            reduce ranks. Whatever is raised, the model is left as it was.
    """
    found = sites(model)
    collapser = _build(method, rank, options, calibration is not None)
    _check_model(model, collapser, method)
    _check_blocks(found, method, calibration is not None)
    with in_eval(model):
        factors = {path: SiteFactors.of(site) for path, site in found.items()}
    for site in factors.values():
        collapser.check(site)
    before = _losses(evaluate, model)
    with in_eval(model):
        bar = Progress(console=Console(stderr=True), disable=not show_progress)
        run = _Run(model, collapser, factors, bar)
        if calibration is None:
            run.without_data()
        else:
            run.with_data(read_calibration(calibration, collapser.config))
    deltas = {path: outcome.delta for path, outcome in run.outcomes.items()}
    config = single_config(
        model.molora_config,  # type: ignore[arg-type]
        {path: delta.rank for path, delta in deltas.items()},
    )
    banks = {p: single_expert(found[p], delta, config) for p, delta in deltas.items()}
    with contextlib.ExitStack() as stack:
        stack.callback(replace_banks(model, banks, config))
        after = _losses(evaluate, model)
        report = _report(method, run, before, after)
        stack.pop_all()
    model.__dict__["molora_report"] = report.to_dict()
    return CollapseResult(report)


def _build(
    method: str, rank: int | None, options: dict[str, Any], calibrated: bool
) -> Collapser:
    """Make the method with its settings; refuse settings that it does not read."""
    cls = COLLAPSERS[method]
    given = dict(options) if rank is None else {"rank": rank, **options}
    config = cls.Config.from_dict(given, f"collapse.{method}")
    collapser = cls(config)
    reason = collapser.why_calibration()
    if reason and not calibrated:
        raise ConfigError(f"collapse.{method} needs calibration data: {reason}")
    unread = config.model_fields_set & CollapseConfig.model_fields.keys()
    if unread and not calibrated:
        raise ConfigError(
            f"collapse.{method}: {', '.join(sorted(unread))} is read with calibration "
            "data only; give calibration=<batches>, or drop it"
        )
    return collapser


def _check_model(model: nn.Module, collapser: Collapser, method: str) -> None:
    found = sites(model)
    if any(site.merged for site in found.values()):
        raise WrapError("the adapter is merged into the weights; unmerge it first")
    runtime: Any = model.molora_runtime
    if runtime.disabled:
        raise WrapError("the adapter is disabled here; collapse outside of the block")
    single = all(site.experts.num_experts == 1 for site in found.values())
    if single and not collapser.reduces_rank:
        fits = [
            n for n, entry in COLLAPSERS.entries().items() if entry.cls.reduces_rank
        ]
        raise WrapError(
            f"every site has one expert already, so {method} has nothing to collapse; "
            f"{' and '.join(fits)} can lower the rank"
        )


def _check_blocks(
    found: dict[str, MoloraLinear], method: str, calibrated: bool
) -> None:
    """Whole-FFN experts pass a nonlinearity apart, which no update of a layer does."""
    blocks = [path for path, group in ffns(found).items() if group]
    if blocks and (calibrated or method != "select"):
        raise WrapError(
            f"{blocks[0]!r} mixes the outputs of whole FFNs (router.mix: block), which "
            "no update of its layers equals; collapse.select without calibration data "
            "keeps one expert, which is exact for it"
        )


def _losses(evaluate: Evaluate | None, model: nn.Module) -> dict[str, float]:
    if evaluate is None:
        return {}
    losses = {str(task): float(loss) for task, loss in evaluate(model).items()}
    for task, loss in losses.items():
        if not math.isfinite(loss):
            raise ConfigError(f"evaluate returned the loss {loss} for task {task!r}")
    return losses


@dataclass
class _Outcome:
    """The static update of one site and what is known about it."""

    delta: LowRank
    usage: Usage
    errors: Errors | None
    details: dict[str, Any]


@dataclass
class _Run:
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


def _report(
    method: str, run: _Run, before: dict[str, float], after: dict[str, float]
) -> CollapseReport:
    if before.keys() != after.keys():
        raise ConfigError(
            f"evaluate named other tasks after the collapse: {sorted(before)} before, "
            f"{sorted(after)} after"
        )
    reports = {path: run.site_report(path) for path in run.factors}
    errors = {p: r.error for p, r in reports.items() if r.error is not None}
    worst = max(errors, key=lambda path: errors[path]) if errors else None
    tokens_fit, tokens_held = run.tokens or (None, None)
    return CollapseReport(
        method=method,
        paper=COLLAPSERS.entries()[method].paper,
        options=run.collapser.config.to_dict(),
        gates="measured" if run.tokens else "even",
        tokens_fit=tokens_fit,
        tokens_held=tokens_held,
        passes=run.passes,
        sites=reports,
        mean_error=sum(errors.values()) / len(errors) if errors else None,
        worst_error=errors[worst] if worst else None,
        worst_site=worst,
        losses={t: {"before": before[t], "after": after[t]} for t in before},
        prepared=run.prepared,
        exact=_exact(run),
        notes=_notes(run),
    )


def _exact(run: _Run) -> bool:
    """Whether the result is proven equal: nothing routed, nothing truncated."""
    return all(
        site.num_experts == 1 and run.outcomes[path].delta.rank >= _full_rank(site)
        for path, site in run.factors.items()
    )


def _full_rank(site: SiteFactors) -> int:
    return min(site.total_rank, site.A_RI.shape[1], site.Bt_QO.shape[1])


def _notes(run: _Run) -> list[str]:
    if run.tokens:
        notes = run.collapser.notes()
    else:
        notes = ["No calibration data: mean gates are even, no error is measured."]
    if any(site.num_experts > 1 for site in run.factors.values()):
        notes.append("A mixture that routes by token has no static equal.")
    return notes
