"""LoraHub: one weight per expert, searched without gradients by the loss on a few rows.

    delta:   W = sum_e w_e s_e B_e A_e                              rank R
    factors: W = (sum_e w_e s_e B_e) (sum_e w_e A_e)                rank r of one expert

    minimise  loss(w) + penalty * mean_e |w_e|    with w in [-bound, bound], w = 0 first

``delta`` is the weighted sum of the experts itself; ``factors`` is the paper's form,
which holds cross terms B_i A_j that no expert has. The weights are those of all layers
together. nevergrad's NGOpt searches: ``pip install molora[lorahub]``.

Reference: Huang et al. 2023 (LoraHub), arXiv:2307.13269, section 3; bound 1.5, penalty
0.05 and 40 steps as there. The loss here is the mean over all tokens with a label.
Shape legend: see factors.py; B rows of a batch, S positions.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, Self

import numpy as np
import pydantic
import torch
from rich.progress import Progress
from torch import Tensor, nn

from molora.collapse.apply import replace_banks, single_config, single_expert
from molora.collapse.base import COLLAPSERS, CollapseConfig, Collapser
from molora.collapse.calibration import FIT, HELD, Batch
from molora.collapse.factors import LowRank, SiteFactors, truncate
from molora.collapse.moments import Evidence
from molora.collapse.passes import forward
from molora.errors import ConfigError, DataError
from molora.experts import LoRAExperts
from molora.model import sites

_IGNORE = -100
"""Label of a token that no loss is taken of."""


@COLLAPSERS.register("lorahub", paper="arXiv:2307.13269")
class LoraHub(Collapser):
    """Weights per expert that a gradient-free search finds by the loss on a few rows.

    The router is not asked: its mixture is only what the report's errors compare with.
    Weights are searched on the rows that are not held out, before any truncation; no
    weight at all (the base alone) and what NGOpt recommends at the end are tried too,
    so that the result is the best of budget + 2 evaluations on these rows. The loss on
    the held-out rows is reported.

    Limitations: as many experts at every layer; calibration rows need labels; small
    rows overfit.
    """

    searches = True

    class Config(CollapseConfig):
        """Settings of the search."""

        form: Literal["delta", "factors"] = "delta"
        """What is weighted: the updates, exactly, or A and B apart as in the paper."""
        rank: int | None = pydantic.Field(default=None, ge=1)
        """Rank that the found sum of updates is truncated to; None keeps all of R."""
        budget: int = pydantic.Field(default=40, ge=1, le=100)
        """Evaluations. NGOpt takes COBYLA up to 100; beyond, it asks for models that
        fail under this numpy."""
        penalty: float = pydantic.Field(default=0.05, ge=0)
        """Coefficient of mean |w|."""
        bound: float = pydantic.Field(default=1.5, gt=0)
        """Largest weight, and with a minus sign the smallest."""
        seed: int = pydantic.Field(default=0, ge=0)
        """Seed of the search."""

        @pydantic.model_validator(mode="after")
        def _rank_is_of_updates(self) -> Self:
            if self.form == "factors" and self.rank is not None:
                raise ValueError(
                    "form: factors has the rank of one expert; drop rank, or set form "
                    "to delta"
                )
            return self

    config: Config
    note = (
        "The error is the distance from the mixture on the held-out rows; lorahub "
        "does not aim at the mixture, but at the loss on the other rows."
    )

    def __init__(self, config: Config):
        super().__init__(config)
        self._weights_E: Tensor | None = None

    def notes(self) -> list[str]:
        """See base class."""
        if self._weights_E is None or self._weights_E.any():
            return [self.note]
        return [
            self.note,
            "No weights that were tried beat the base alone on these rows, so every "
            "weight is 0 and the result is the base; raise budget or lower penalty.",
        ]

    def why_calibration(self) -> str | None:
        """See base class."""
        return "the weights are searched by the loss on its rows, which need labels"

    def check(self, factors: SiteFactors) -> None:
        """See base class."""
        _nevergrad()
        if self.config.budget < factors.num_experts + 2:
            raise ConfigError(
                f"collapse.lorahub.budget={self.config.budget}: COBYLA cannot take a "
                f"step among {factors.num_experts} weights with less than "
                f"{factors.num_experts + 2}"
            )
        if self.config.form == "delta":
            return
        ranks = factors.expert_R.bincount().tolist()
        if len(set(ranks)) > 1:
            raise ConfigError(
                "collapse.lorahub.form: factors adds A and B row by row, but the "
                f"experts at site {factors.path!r} have ranks {ranks}; set delta"
            )
        if factors.shared_A or len(factors.Bt_QO) < factors.total_rank:
            raise ConfigError(
                f"collapse.lorahub.form: the experts at site {factors.path!r} share A "
                "or B, which factors would weigh twice; set form to delta"
            )

    def prepare(
        self,
        model: nn.Module,
        factors: dict[str, SiteFactors],
        batches: list[Batch],
        progress: Progress,
    ) -> dict[str, Any]:
        """Search the weights; see base class."""
        counts = {path: site.num_experts for path, site in factors.items()}
        if len(set(counts.values())) > 1:
            raise ConfigError(
                "collapse.lorahub: one weight per expert of the model needs as many "
                f"experts at every layer, but there are {sorted(set(counts.values()))}"
            )
        _check_labels(batches)
        count = next(iter(counts.values()))
        bar = progress.add_task("weights", total=self.config.budget + 2)
        banks, undo = self._banks(model, factors)

        def loss(weights: np.ndarray, held: bool = False) -> float:
            weights_E = torch.from_numpy(weights)
            for path, bank in banks.items():
                delta = self.combined(factors[path], weights_E)
                bank.A.copy_(delta.A_rI)
                bank.Bt.copy_(delta.Bt_rO)
            return _loss(model, batches, held)

        def objective(weights: np.ndarray) -> float:
            value = loss(weights)
            if not math.isfinite(value):
                raise DataError(
                    f"collapse.lorahub: the loss is {value} with the weights "
                    f"{weights.tolist()}; lower collapse.bound, or look for rows that "
                    "the base cannot read"
                )
            progress.advance(bar)
            return value + self.config.penalty * float(np.abs(weights).mean())

        try:
            with _numpy_kept():
                found, start, best = self._search(objective, count)
            held = {
                "before": loss(np.zeros(count), held=True),
                "after": loss(found, held=True),
            }
        finally:
            undo()
        self._weights_E = torch.from_numpy(found)
        return {
            "weights": found.tolist(),
            "objective": {"before": start, "after": best},
            "held_out_loss": held,
        }

    def solve(
        self, factors: SiteFactors, data: Evidence, tuned: dict[str, float]
    ) -> tuple[LowRank, dict[str, Any]]:
        """See base class."""
        assert self._weights_E is not None
        delta = self.combined(factors, self._weights_E)
        if self.config.rank is not None:
            delta = truncate(delta, self.config.rank)
        return delta, {}

    def combined(self, factors: SiteFactors, weights_E: Tensor) -> LowRank:
        """The experts of one site under these weights, as the settings say."""
        weights_E = weights_E.to(factors.scale_E)
        if self.config.form == "delta":
            return factors.combine(weights_E)
        A_ErI = factors.A_RI.view(len(weights_E), -1, factors.A_RI.shape[1])
        Bt_ErO = factors.Bt_QO.view(len(weights_E), -1, factors.Bt_QO.shape[1])
        return LowRank(
            torch.einsum("e,eri->ri", weights_E, A_ErI),
            torch.einsum("e,ero->ro", weights_E * factors.scale_E, Bt_ErO),
        )

    def _banks(
        self, model: nn.Module, factors: dict[str, SiteFactors]
    ) -> tuple[dict[str, LoRAExperts], Callable[[], None]]:
        """Banks of one expert to try weights in, and what puts the mixture back."""
        deltas = {
            path: self.combined(site, torch.zeros_like(site.scale_E))
            for path, site in factors.items()
        }
        ranks = {path: delta.rank for path, delta in deltas.items()}
        found = sites(model)
        config = single_config(model.molora_config, ranks, found)  # type: ignore[arg-type]
        banks = {p: single_expert(found[p], d, config) for p, d in deltas.items()}
        return banks, replace_banks(model, banks, config)

    def _search(
        self, objective: Callable[[np.ndarray], float], count: int
    ) -> tuple[np.ndarray, float, float]:
        """The best weights of all that were tried, and the objective at 0 and there."""
        nevergrad = _nevergrad()
        space = nevergrad.p.Array(init=np.zeros(count))
        space = space.set_bounds(-self.config.bound, self.config.bound)
        space.random_state = np.random.RandomState(self.config.seed)
        optimizer = nevergrad.optimizers.NGOpt(space, budget=self.config.budget)
        tried = [(objective(np.zeros(count)), np.zeros(count))]
        try:
            with warnings.catch_warnings():
                # scipy replaces the step size and the count that nevergrad gives it
                warnings.filterwarnings("ignore", "COBYLA: Invalid", UserWarning)
                for _ in range(self.config.budget):
                    asked = optimizer.ask()
                    tried.append((objective(asked.value), asked.value))
                    optimizer.tell(asked, tried[-1][0])
                last = optimizer.provide_recommendation().value
            tried.append((objective(last), last))
        finally:
            # its thread waits for an answer as long as somebody holds it
            del optimizer
        best, found = min(tried, key=lambda pair: pair[0])
        return found, tried[0][0], best


@contextlib.contextmanager
def _numpy_kept() -> Iterator[None]:
    """Keep numpy's global generator, which nevergrad draws from, for the caller."""
    before = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(before)


def _nevergrad() -> Any:
    try:
        with _numpy_kept():
            import nevergrad
    except ImportError as error:
        raise ConfigError(
            f"collapse.lorahub needs nevergrad ({error}); install it with: "
            "pip install molora[lorahub]"
        ) from None
    return nevergrad


def _check_labels(batches: list[Batch]) -> None:
    for batch in batches:
        labels = batch.labels
        if labels is None or labels.dim() != 2:
            shape = None if labels is None else tuple(labels.shape)
            raise DataError(
                "calibration: lorahub takes the loss, so every batch needs labels of "
                f"shape [rows, positions], got {shape}"
            )
    for held, what in ((False, "to fit"), (True, "to hold out")):
        if not any(_learned(batch, held)[1] for batch in batches):
            raise DataError(f"calibration: no row {what} has a label; give more rows")


def _learned(batch: Batch, held: bool) -> tuple[Tensor, int]:
    """Labels of the rows to fit or of those held out, and how many a loss is taken of.

    The first position of a row is predicted by nothing.
    """
    assert batch.labels is not None
    mine_B1 = (batch.part_B == (HELD if held else FIT)).unsqueeze(1)
    labels_BS = batch.labels.masked_fill(~mine_B1.to(batch.labels.device), _IGNORE)
    return labels_BS, int((labels_BS[:, 1:] != _IGNORE).sum())


def _loss(model: nn.Module, batches: list[Batch], held: bool) -> float:
    """Mean loss over all tokens with a label."""
    total, tokens = 0.0, 0
    for batch in batches:
        labels_BS, count = _learned(batch, held)
        if count:
            total += count * float(forward(model, batch, labels_BS).loss)
            tokens += count
    return total / tokens
