"""Summing what sites see in one pass over the calibration rows.

Shape legend: see factors.py. B rows of a batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from molora.collapse.calibration import FIT, HELD, Batch
from molora.collapse.factors import SiteFactors
from molora.collapse.moments import Evidence, Moments, Usage
from molora.collapse.passes import forward, hooked
from molora.errors import DataError, WrapError
from molora.layer import MoloraLinear
from molora.model import sites

Sums = dict[str, list[Evidence]]
"""Evidence of the FIT and the HELD rows, by site."""


@dataclass
class _Seen:
    """The last input that a hook saw, and its rows in use."""

    x: Tensor
    version: int
    leader: str
    picked: list[Tensor]
    rows: list[Tensor | None]

    def serves(self, x: Tensor, leader: str, path: str) -> bool:
        """Whether a site with this input may use what was picked for another."""
        same = x is self.x and x._version == self.version
        return same and leader in (self.leader, path)


class Gather:
    """Forward hook that adds one site's tokens to its sums."""

    def __init__(
        self,
        model: Any,
        factors: Mapping[str, Any],
        leaders: dict[str, str],
        with_moments: list[bool],
    ):
        self.runtime = model.molora_runtime
        self.factors, self.leaders = factors, leaders
        self.with_moments = with_moments
        self.sums: Sums = {}
        self.batch: Batch | None = None
        self.seen: _Seen | None = None
        for path, site in factors.items():
            self.sums[path] = [
                Evidence(Usage(), self._moments(site, part)) for part in (FIT, HELD)
            ]

    def _moments(self, site: SiteFactors, part: int) -> Moments | None:
        if not self.with_moments[part]:
            return None
        leader = self.leaders.get(site.path, site.path)
        if leader != site.path:
            first = self.sums[leader][part].moments
            assert first is not None
            return Moments.empty(site, first.C_II)
        wide = site.A_RI.shape[1]
        return Moments.empty(site, site.A_RI.new_zeros(wide, wide))

    def __call__(self, site: MoloraLinear, args: tuple[Tensor, ...], y: Tensor) -> None:
        seen = self._look(site, args[0])
        factors = self.factors[site.path]
        context = self.runtime.context_for(site.path, needed=False)
        if site.decider is None:
            gates_TE = seen.x.new_ones(seen.x.numel() // site.in_features, 1)
        else:
            gates_TE = site.routing(seen.x, context).gates
        y_TO = y.reshape(-1, site.out_features)
        for part, evidence in enumerate(self.sums[site.path]):
            picked, rows_TI = seen.picked[part], seen.rows[part]
            self._add_usage(evidence.usage, gates_TE, picked)
            if evidence.moments is None or rows_TI is None:
                continue
            if self.leaders.get(site.path, site.path) == site.path:
                evidence.moments.C_II.addmm_(rows_TI.t(), rows_TI)
            zg_TQ = factors.gated(rows_TI, gates_TE[picked])
            evidence.moments.add(rows_TI, zg_TQ, y_TO[picked])

    def _look(self, site: MoloraLinear, x: Tensor) -> _Seen:
        """Rows of the input in use; kept while sites read the same tensor."""
        leader = self.leaders.get(site.path, site.path)
        if self.seen is not None and self.seen.serves(x, leader, site.path):
            return self.seen
        if leader != site.path:
            raise WrapError(
                f"site {site.path!r} read the same input as {leader!r} in the first "
                "calibration batch and another one now; exclude it from the targets"
            )
        self.seen = self._pick(site, x)
        return self.seen

    def _pick(self, site: MoloraLinear, x: Tensor) -> _Seen:
        context = self.runtime.context_for(site.path, needed=False)
        part_T = self._per_token(self._batch.part_B, site, x)
        mask_T = context.token_mask(x.shape, site.path)
        if mask_T is not None:
            part_T = part_T.where(mask_T, -1)
        x_TI = x.reshape(-1, site.in_features)
        picked = [(part_T == part).nonzero()[:, 0] for part in (FIT, HELD)]
        rows = [
            x_TI[index].double() if wanted else None
            for index, wanted in zip(picked, self.with_moments, strict=True)
        ]
        return _Seen(x, x._version, site.path, picked, rows)

    def _per_token(self, value_B: Tensor, site: MoloraLinear, x: Tensor) -> Tensor:
        tokens, rows = x.numel() // site.in_features, value_B.shape[0]
        if tokens % rows:
            raise DataError(
                f"calibration: site {site.path!r} sees {tokens} tokens of a batch of "
                f"{rows} rows, which is no multiple; exclude it from the targets"
            )
        return value_B.to(x.device).repeat_interleave(tokens // rows)

    def _add_usage(self, usage: Usage, gates_TE: Tensor, picked: Tensor) -> None:
        """Add the picked tokens, task by task."""
        names = self._batch.tasks
        row_T = picked // (gates_TE.shape[0] // len(names))
        for task in dict.fromkeys(names):
            of_task_B = torch.tensor([name == task for name in names])
            index = picked[of_task_B.to(picked.device)[row_T]]
            if index.numel():
                usage.add(task, gates_TE[index])

    @property
    def _batch(self) -> Batch:
        assert self.batch is not None
        return self.batch


def gather(
    model: nn.Module,
    batches: list[Batch],
    factors: Mapping[str, Any],
    leaders: dict[str, str],
    with_moments: list[bool],
    step: Callable[[], None],
) -> Sums:
    """Sum what some sites see in one pass over the calibration rows.

    Args:
        model: The uncollapsed model, in eval mode.
        batches: Calibration rows.
        factors: Experts of the sites of this group, ``SiteFactors`` for moments.
        leaders: What ``shared_inputs`` found.
        with_moments: Whether second moments of the FIT and the HELD rows are kept.
        step: Called after each batch.

    Raises:
        DataError: A site saw no real token of a part, or a number that is not finite.
    """
    found = sites(model)
    hook = Gather(model, factors, leaders, with_moments)
    with hooked(model, {path: found[path] for path in factors}, hook):
        for batch in batches:
            hook.batch = batch
            forward(model, batch)
            hook.seen = None
            step()
    for path, parts in hook.sums.items():
        _check(path, parts)
    return hook.sums


def _check(path: str, parts: list[Evidence]) -> None:
    for name, (usage, moments) in zip(("fit", "hold out"), parts, strict=True):
        if usage.total() == 0:
            raise DataError(
                f"calibration: site {path!r} saw no real token in the rows to {name}; "
                "give more rows, or exclude a layer that is never reached"
            )
        if moments is not None:
            total = moments.C_II.trace() + moments.M_QI.sum() + moments.output
            if not torch.isfinite(total):
                raise DataError(
                    f"calibration: the inputs or outputs of site {path!r} hold NaN or "
                    "infinity; look for the first layer that overflows"
                )


def pool(sums: Sums, leaders: dict[str, str]) -> dict[str, Evidence]:
    """Add the HELD rows to the FIT rows, in place; both need the same moments."""
    pooled = {}
    for path, (fit, held) in sums.items():
        if fit.moments is not None and held.moments is not None:
            if leaders.get(path, path) == path:
                fit.moments.C_II += held.moments.C_II
            fit.moments.M_QI += held.moments.M_QI
            fit.moments.S_QQ += held.moments.S_QQ
            fit.moments.output += held.moments.output
        pooled[path] = Evidence(fit.usage + held.usage, fit.moments)
    return pooled
