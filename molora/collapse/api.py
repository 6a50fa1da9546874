"""collapse: a wrapped mixture becomes the same model with one expert per site."""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import Progress
from torch import nn

from molora.collapse.apply import replace_banks
from molora.collapse.base import COLLAPSERS, CollapseConfig, Collapser
from molora.collapse.calibration import read_calibration
from molora.collapse.factors import SiteFactors
from molora.collapse.linear import Linear
from molora.collapse.passes import in_eval
from molora.collapse.report import CollapseReport, CollapseResult
from molora.collapse.run import Run
from molora.collapse.select import Select
from molora.collapse.vectors import VectorRun, on_vectors
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

    Vectors of (IA)^3 become one vector, by ``linear`` or ``select``.

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
            that the method cannot read, one expert everywhere and the method does not
            reduce ranks, or layers that calibration data is not for (embeddings,
            convolutions). Whatever is raised, the model is left as it was.
    """
    found = sites(model)
    collapser = _build(method, rank, options, calibration is not None)
    _check_model(model, collapser, method)
    _check_blocks(found, method, calibration is not None)
    if calibration is not None:
        _check_hosts(found)
    bar = Progress(console=Console(stderr=True), disable=not show_progress)
    with in_eval(model):
        run = _run(model, found, collapser, method, bar)
    before = _losses(evaluate, model)
    with in_eval(model):
        if calibration is None:
            run.without_data()
        else:
            run.with_data(read_calibration(calibration, collapser.config))
    config, banks = run.result()
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


def _check_hosts(found: dict[str, MoloraLinear]) -> None:
    """Sums over tokens are those of the rows that a linear layer reads."""
    for path, site in found.items():
        if not site.host.by_token:
            name = type(site.base).__name__
            raise WrapError(
                f"site {path!r}: calibration data is summed over the rows that a layer "
                f"multiplies, and this {name} reads {site.host.READS}; collapse "
                "without calibration data (linear, svd, concat, select)"
            )


def _losses(evaluate: Evaluate | None, model: nn.Module) -> dict[str, float]:
    if evaluate is None:
        return {}
    losses = {str(task): float(loss) for task, loss in evaluate(model).items()}
    for task, loss in losses.items():
        if not math.isfinite(loss):
            raise ConfigError(f"evaluate returned the loss {loss} for task {task!r}")
    return losses


def _run(
    model: nn.Module,
    found: dict[str, MoloraLinear],
    collapser: Collapser,
    method: str,
    bar: Progress,
) -> Run | VectorRun:
    """Read the experts of every site; settings that do not fit one are refused."""
    if on_vectors(found, collapser, method):
        assert isinstance(collapser, Linear | Select)
        return VectorRun(model, collapser, found, bar)
    factors = {path: SiteFactors.of(site) for path, site in found.items()}
    for site in factors.values():
        collapser.check(site)
    return Run(model, collapser, factors, bar)


def _report(
    method: str, run: Run | VectorRun, before: dict[str, float], after: dict[str, float]
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
        exact=run.exact(),
        notes=run.notes(),
    )
