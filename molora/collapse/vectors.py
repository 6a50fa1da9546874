"""Collapse of (IA)^3 mixtures: one vector stands for all.

    1 + sum_e gbar_e (l_e - 1)      linear: gbar the mean gates, or the given weights
    l_e                             select

Both are exact where the gates are constant (those gates; gate 1 for one expert). The
update diag(l - 1) W has no low-rank factors, so other methods are refused.

Shape legend: see factors.py; n features that are scaled (I or O).
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from molora.collapse.base import Collapser
from molora.collapse.calibration import FIT, HELD, Batch
from molora.collapse.factors import even_gates, ratio
from molora.collapse.gather import Gather, gather
from molora.collapse.linear import Linear
from molora.collapse.moments import Errors, Evidence, Usage
from molora.collapse.passes import forward, hooked
from molora.collapse.report import SiteReport
from molora.collapse.select import Select
from molora.config import AdapterConfig
from molora.errors import ConfigError, DataError, WrapError
from molora.experts import AbstractExperts, IA3Experts
from molora.layer import MoloraLinear


@dataclass(frozen=True)
class SiteVectors:
    """The experts of one site, as changes of what they multiply.

    Attributes:
        path: Module path of the site.
        change_En: l_e - 1, float64.
        weight_n: Norm of the frozen weight's row or column of each feature, float64.
        even_E: Mean gates of a router that prefers nobody, float64.
    """

    path: str
    change_En: Tensor
    weight_n: Tensor
    even_E: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, site: MoloraLinear) -> "SiteVectors":
        """Read the vectors of a site."""
        experts = site.experts
        assert isinstance(experts, IA3Experts)
        vectors = experts.vectors.detach()
        weight_OI = experts.frozen_weight().double()
        return cls(
            path=site.path,
            change_En=vectors.double() - 1,
            weight_n=weight_OI.norm(dim=0 if experts.on_input else 1),
            even_E=even_gates(site, vectors),
        )

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.change_En)


def on_vectors(
    found: dict[str, MoloraLinear], collapser: Collapser, method: str
) -> bool:
    """Whether the experts are (IA)^3 vectors that this method can collapse.

    Raises:
        ConfigError: A rank is asked for.
        WrapError: Only some of the experts are, or the method needs low-rank factors.
    """
    kinds = [isinstance(site.experts, IA3Experts) for site in found.values()]
    if not any(kinds):
        return False
    if not all(kinds):
        raise WrapError(
            "some sites hold (IA)^3 vectors and others another family, which become no "
            "single adapter together; deploy the mixture itself (save_pretrained)"
        )
    if not isinstance(collapser, Linear | Select):
        raise WrapError(
            f"collapse.{method} works on low-rank factors, and IA3Experts has none: "
            "scaling by a vector is an update of full rank. linear and select make one "
            "vector of a mixture"
        )
    if "rank" in collapser.config.model_fields_set:
        raise ConfigError(
            f"collapse.{method}.rank: an (IA)^3 vector has no rank; drop it"
        )
    return True


@dataclass
class VectorRun:
    """One collapse of vectors; see ``run.Run``, whose results it has."""

    model: nn.Module
    collapser: Linear | Select
    found: dict[str, MoloraLinear]
    progress: Progress
    passes: int = 0
    tokens: tuple[int, int] | None = None
    prepared: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.factors = {path: SiteVectors.of(site) for path, site in self.found.items()}
        for vectors in self.factors.values():
            self.collapser.check(vectors)
        self.usage: dict[str, Usage] = {}
        self.errors: dict[str, Errors] = {}
        self.solved: dict[str, tuple[Tensor, dict[str, Any]]] = {}

    def without_data(self) -> None:
        """Solve every site with even gates."""
        for path, vectors in self.factors.items():
            self.usage[path] = Usage({None: 1}, {None: vectors.even_E})
            self.solved[path] = self._solve(vectors, self.usage[path], False)

    def with_data(self, batches: list[Batch]) -> None:
        """Measure gates in one pass, the error of a fit in another; fit all rows."""
        self.passes = 2
        with self.progress as bar:
            read = bar.add_task("calibration batches", total=2 * len(batches))
            parts = [False, False]
            sums = gather(
                self.model, batches, self.factors, {}, parts, lambda: bar.advance(read)
            )
            trials = {
                path: self._bank(path, self._solve(vectors, sums[path][FIT].usage)[0])
                for path, vectors in self.factors.items()
            }
            judge = _Judge(self.model, self.factors, {}, parts)
            judge.trials = trials
            with hooked(self.model, self.found, judge):
                for batch in batches:
                    judge.batch = batch
                    forward(self.model, batch)
                    judge.seen = None
                    bar.advance(read)
        for path, (fit, held) in sums.items():
            self.tokens = fit.usage.total(), held.usage.total()
            self.usage[path] = fit.usage + held.usage
            self.errors[path] = judge.errors(path)
            self.solved[path] = self._solve(self.factors[path], self.usage[path])

    def result(self) -> tuple[AdapterConfig, dict[str, AbstractExperts]]:
        """Config and banks of one vector for every site."""
        config: Any = self.model.molora_config
        positions = {p: self._settings(p).position for p in self.found}
        usual = Counter(positions.values()).most_common(1)[0][0]
        single = AdapterConfig.from_dict(
            {
                **config.model_dump(include={"target_modules", "exclude_modules"}),
                "experts": {"kind": "ia3", "num_experts": 1, "position": usual},
                "router": {"kind": "none"},
                "overrides": [
                    {"match": f"^{re.escape(p)}$", "experts": {"position": position}}
                    for p, position in positions.items()
                    if position != usual
                ],
            }
        )
        return single, {p: self._bank(p, c_n) for p, (c_n, _) in self.solved.items()}

    def exact(self) -> bool:
        """Whether every site had one expert."""
        return all(vectors.num_experts == 1 for vectors in self.factors.values())

    def notes(self) -> list[str]:
        """How to read the report."""
        if self.tokens:
            notes = self.collapser.notes()
        else:
            notes = ["No calibration data: mean gates are even, no error is measured."]
        return [
            *notes,
            "Vectors have no rank. The collapse is exact where gates are constant.",
        ]

    def site_report(self, path: str) -> SiteReport:
        """Report of one site."""
        vectors, (change_n, details) = self.factors[path], self.solved[path]
        gates_E = self.usage[path].mean()
        mean_n = gates_E @ vectors.change_En
        errors = self.errors.get(path, Errors(None, None))
        off = float(((change_n - mean_n) * vectors.weight_n).norm())
        return SiteReport(
            experts=vectors.num_experts,
            total_rank=0,
            rank=0,
            gates=gates_E.tolist(),
            weight_error=ratio(off, float((mean_n * vectors.weight_n).norm())),
            error=errors.update,
            output_error=errors.output,
            details=details,
        )

    def _solve(
        self, vectors: SiteVectors, usage: Usage, measured: bool = True
    ) -> tuple[Tensor, dict[str, Any]]:
        """The change [n] of one site, and what was chosen."""
        if isinstance(self.collapser, Select):
            chosen = self.collapser.chosen(vectors.num_experts, usage)
            return vectors.change_En[chosen], {"expert": chosen}
        if measured and self.collapser.config.weights is None:
            weights_E = usage.mean()
        else:
            weights_E = self.collapser.weights(vectors, Evidence(usage))
        return weights_E @ vectors.change_En, {"weights": weights_E.tolist()}

    def _settings(self, path: str) -> IA3Experts.Config:
        experts = self.found[path].experts
        assert isinstance(experts, IA3Experts)
        return experts.config

    def _bank(self, path: str, change_n: Tensor) -> IA3Experts:
        """A bank of one vector, where the mixture was."""
        site = self.found[path]
        bank = IA3Experts(
            self._settings(path).model_copy(update={"num_experts": 1}),
            in_features=site.in_features,
            out_features=site.out_features,
            generator=torch.Generator(),
        )
        old = next(site.experts.parameters())
        with torch.no_grad():
            bank.vectors.copy_(1 + change_n)
        bank.requires_grad_(any(p.requires_grad for p in site.experts.parameters()))
        return bank.to(old.device).train(site.training)


class _Judge(Gather):
    """Forward hook that sums how far trial vectors are off on the HELD rows."""

    trials: dict[str, IA3Experts]

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.squares: dict[str, Tensor] = {}

    def __call__(self, site: MoloraLinear, args: tuple[Tensor, ...], y: Tensor) -> None:
        held = self._look(site, args[0]).picked[HELD]
        x_TI, trial = (
            args[0].reshape(-1, site.in_features)[held],
            self.trials[site.path],
        )
        plain_TO = site.base(x_TI)
        ours_TO = trial(x_TI, None, site.base(trial.edit_input(x_TI, None)))
        y_TO = y.reshape(-1, site.out_features)[held].double()
        parts = (ours_TO.double() - y_TO, plain_TO.double() - y_TO, y_TO)
        sums = torch.stack([part.square().sum() for part in parts])
        self.squares[site.path] = self.squares.get(site.path, 0) + sums

    def errors(self, path: str) -> Errors:
        """Relative errors at a site."""
        off, update, whole = (math.sqrt(s) for s in self.squares[path].tolist())
        if not math.isfinite(off + whole):
            raise DataError(
                f"calibration: the outputs of site {path!r} hold NaN or infinity; look "
                "for the first layer that overflows"
            )
        return Errors(ratio(off, update), ratio(off, whole))
