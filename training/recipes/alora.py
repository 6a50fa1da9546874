"""ALoRA: ranks move from the modules that need them least to those that lost none.

A module is one expert of one layer. In a round every live rank is scored on a batch of
rows that are held out, with S the negative loss,

    IS(r) = S(M) - S(M without r) + S(M with r alone)

M the model with all live ranks. The ``moved`` ranks with the lowest scores are closed.
As many are opened, one after the other in the modules that have lost none, those with
the highest mean score first; a module is full when it has experts.r. Fewer move where
these modules have no room for all, so that the number of live ranks never changes. A
rank is opened with A drawn as at the start, B zero and an optimizer that knows nothing
of it, which leaves the model's function as it is.

Reference: Liu et al. 2024, arXiv:2403.16187, section 3; no code was
published. The paper draws new rows and says nothing of B and the optimizer.

Shape legend: E experts, r capacity of a module, I in features.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import pydantic
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from molora.config import AdapterConfig
from molora.errors import TrainingError
from molora.experts.alora import ALoRAExperts
from molora.progress import long_work
from molora.training.recipes.base import (
    RECIPES,
    Recipe,
    RecipeConfig,
    Steps,
    blocks_in,
    steps_of,
)

logger = logging.getLogger(__name__)


class Rank(NamedTuple):
    """One rank of one module."""

    path: str
    expert: int
    number: int


@RECIPES.register("alora", paper="arXiv:2403.16187")
class ALoRA(Recipe):
    """Moves ranks between the modules of ALoRA experts by what leaving them out costs.

    Limitations: a round takes two forwards of a batch for every live rank. Experts
    share no tensor and train all of A and B. The optimizer forgets what it has of the
    shape of A and B, not Adam's count of steps, so that the first steps of a new rank
    are several times as long, nor Adafactor's sums; one that keeps codes (8 bits) is
    refused.

    Args:
        config: Settings.
        model: A wrapped model with alora experts.

    Raises:
        TrainingError: No module could ever take a rank, or the ranks are not single
            experts' own.
    """

    families = ("alora",)
    one_process = True

    class Config(RecipeConfig):
        """Settings of ALoRA's rounds."""

        kind: Literal["alora"] = "alora"
        """Registered name."""
        init_r: int | None = pydantic.Field(default=None, ge=1)
        """Live ranks of a module at first, of the experts.r that it can have; null is
        half of these."""
        warmup: Steps = 0.2
        """Steps before the first round, or their share of the run."""
        interval: Steps = 0.1
        """Steps from one round to the next, or their share."""
        rounds: int = pydantic.Field(default=8, ge=1)
        """How many rounds there are."""
        moved: int | None = pydantic.Field(default=None, ge=1)
        """Ranks that move in a round; null is the number of modules."""
        held_share: float = pydantic.Field(default=0.05, gt=0, lt=1)
        """Share of every task's training rows that is kept for the scores."""

        def starts(self, total_steps: int) -> list[int]:
            """Steps after which the rounds take place."""
            first = steps_of(self.warmup, total_steps)
            apart = steps_of(self.interval, total_steps)
            return [first + n * apart for n in range(self.rounds)]

        def check_steps(self, total_steps: int) -> str | None:
            """See base class."""
            starts = self.starts(total_steps)
            apart = len(set(starts)) == self.rounds
            if starts[0] > 0 and starts[-1] < total_steps and apart:
                return None
            return (
                f"recipe.rounds={self.rounds} from recipe.warmup={self.warmup} on, "
                f"recipe.interval={self.interval} apart, do not fit between the first "
                f"and the last of the {total_steps} steps of this run, a step at least "
                "for each; lower one of them, or train longer"
            )

        def first_rank(self, capacity: int) -> int:
            """Live ranks of a module at first."""
            return max(1, capacity // 2) if self.init_r is None else self.init_r

    config: Config

    def __init__(self, config: Config, model: nn.Module):
        super().__init__(config, model)
        reason = _reason([part.config for part in self._experts().values()], config)
        if reason:
            raise TrainingError(f"recipe 'alora' {reason}")
        self._round = self._moved = 0
        self._is_checked = False

    @classmethod
    def check(cls, config: RecipeConfig, adapter: AdapterConfig) -> str | None:
        """See base class."""
        assert isinstance(config, cls.Config)
        reason = super().check(config, adapter)
        found = blocks_in(adapter, ALoRAExperts.Config)
        if reason or not found:
            return reason
        reason = _reason(found, config)
        return f"alora {reason}" if reason else None

    def held_share(self) -> float:
        """See base class."""
        return self.config.held_share

    @torch.no_grad()
    def begin(self, total_steps: int) -> None:
        """See base class; closes ranks of modules that are new.

        One that was trained, or has closed ranks, keeps the live ranks that it has.

        Raises:
            TrainingError: No module has room for a rank.
        """
        super().begin(total_steps)
        self._round = self._moved = 0
        for part in self._experts().values():
            if bool(part.gates.all()) and not bool(part.Bt.any()):
                part.gates[:, self.config.first_rank(part.config.r) :] = 0
        if all(bool(part.gates.all()) for part in self._experts().values()):
            raise TrainingError(
                "recipe 'alora' hands ranks on, and every rank of these trained "
                "experts is live, so that no module has room; close some with "
                "mask_ranks, or leave the recipe out"
            )

    def after_step(self, step: int, optimizer: Optimizer) -> None:
        """See base class."""
        self._check_state(optimizer)
        starts = self.config.starts(self.total_steps)
        if self._round == len(starts) or step < starts[self._round]:
            return
        self._move(self.scores(self._round), optimizer)
        self._round += 1

    def live(self) -> list[Rank]:
        """Every live rank, in the order of the model."""
        return [
            Rank(path, e, i)
            for path, part in self._experts().items()
            for e, i in part.gates.nonzero().tolist()
        ]

    @torch.no_grad()
    def scores(self, batch: int) -> dict[Rank, float]:
        """IS of every live rank.

        Args:
            batch: Number of the held-out batch.
        """
        assert self.held is not None
        ranks = self.live()
        gates = {path: part.gates for path, part in self._experts().items()}
        before = {path: gate.clone() for path, gate in gates.items()}
        scores = {}
        try:
            with long_work("Scoring ranks", 2 * len(ranks)) as advance:
                whole = float(self.held(batch))
                for rank in ranks:
                    gates[rank.path][rank.expert, rank.number] = 0
                    scores[rank] = float(self.held(batch)) - whole
                    gates[rank.path][rank.expert, rank.number] = 1
                    advance()
                for gate in gates.values():
                    gate.zero_()
                for rank in ranks:
                    gates[rank.path][rank.expert, rank.number] = 1
                    scores[rank] -= float(self.held(batch))
                    gates[rank.path][rank.expert, rank.number] = 0
                    advance()
        finally:
            for path, gate in gates.items():
                gate.copy_(before[path])
        return scores

    @torch.no_grad()
    def _move(self, scores: Mapping[Rank, float], optimizer: Optimizer) -> None:
        """Close the ranks with the lowest scores, and open as many elsewhere."""
        if not torch.tensor(list(scores.values())).isfinite().all():
            logger.warning(
                "alora: the loss on held-out rows is not finite without some rank; "
                "no rank is moved in this round"
            )
            self._moved = 0
            return
        closed, opened = self._plan(scores)
        for rank in closed:
            self._experts()[rank.path].gates[rank.expert, rank.number] = 0
            # it stays so, as no gradient reaches what is closed
            self._forget(rank, optimizer)
        for rank in opened:
            part = self._experts()[rank.path]
            bound = part.A.shape[-1] ** -0.5
            part.A[rank.expert, rank.number].uniform_(-bound, bound)
            part.Bt[rank.expert, rank.number] = 0
            part.gates[rank.expert, rank.number] = 1
        self._moved = len(closed)

    def _plan(self, scores: Mapping[Rank, float]) -> tuple[list[Rank], list[Rank]]:
        """Ranks to close, and ranks to open in their place."""
        modules = [
            (path, e)
            for path, part in self._experts().items()
            for e in range(part.num_experts)
        ]
        order = sorted(scores, key=lambda rank: scores[rank])
        means = {module: _mean(module, scores) for module in modules}
        wanted = min(self.config.moved or len(modules), len(order))
        for count in range(wanted, 0, -1):
            losers = {(rank.path, rank.expert) for rank in order[:count]}
            takers = [module for module in modules if module not in losers]
            takers.sort(key=lambda module: -means[module])
            room = [self._room(module) for module in takers]
            if sum(map(len, room)) >= count:
                return order[:count], list(_in_turn(room, count))
        return [], []

    def _room(self, module: tuple[str, int]) -> list[Rank]:
        """Ranks of a module that are not live."""
        path, e = module
        closed = (self._experts()[path].gates[e] == 0).nonzero().flatten()
        return [Rank(path, e, i) for i in closed.tolist()]

    def _forget(self, rank: Rank, optimizer: Optimizer) -> None:
        """Have the optimizer know nothing of a rank."""
        part = self._experts()[rank.path]
        for values in (part.A, part.Bt):
            for kept in optimizer.state.get(values, {}).values():
                if isinstance(kept, Tensor) and kept.shape == values.shape:
                    kept[rank.expert, rank.number] = 0

    def _check_state(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer whose state has no zero to set; its first step shows."""
        if self._is_checked:
            return
        self._is_checked = True
        for part in self._experts().values():
            for kept in optimizer.state.get(part.A, {}).values():
                is_whole = isinstance(kept, Tensor) and kept.shape == part.A.shape
                if is_whole and not kept.is_floating_point():
                    raise TrainingError(
                        "recipe 'alora' has the optimizer forget single ranks, which "
                        f"{type(optimizer).__name__} with its state in {kept.dtype} "
                        "cannot; take adamw_torch, for example"
                    )

    def log(self) -> dict[str, float]:
        """See base class; live ranks, rounds so far, and what the last one moved."""
        return {
            "ranks": len(self.live()),
            "rounds": self._round,
            "moved": self._moved,
        }

    def state(self) -> dict[str, Any]:
        """See base class."""
        return {"round": self._round, "moved": self._moved}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See base class; gates come with the adapter."""
        self._round, self._moved = state["round"], state["moved"]

    def _experts(self) -> dict[str, ALoRAExperts]:
        return self.parts  # type: ignore[return-value]


def _mean(module: tuple[str, int], scores: Mapping[Rank, float]) -> float:
    """Mean score of the live ranks of a module; one without any comes last."""
    found = [s for rank, s in scores.items() if (rank.path, rank.expert) == module]
    return sum(found) / len(found) if found else float("-inf")


def _in_turn(room: list[list[Rank]], count: int) -> Iterator[Rank]:
    """One rank of every module, then the next one of each, until there are count."""
    longest = max(len(ranks) for ranks in room)
    every = [ranks[n] for n in range(longest) for ranks in room if n < len(ranks)]
    yield from every[:count]


def _reason(experts: list[ALoRAExperts.Config], config: ALoRA.Config) -> str | None:
    """Why ranks of these experts cannot move."""
    for own in experts:
        if own.scopes() or own.trainability:
            return (
                "moves ranks between single experts, and experts.shared or "
                "experts.trainability ties or freezes theirs; leave both out"
            )
        if config.first_rank(own.r) > own.r:
            return (
                f"begins with recipe.init_r={config.init_r} ranks, and experts.r="
                f"{own.r} is all that a module can have; lower the one or raise the "
                "other"
            )
    if all(config.first_rank(own.r) == own.r for own in experts):
        return (
            "hands ranks on, and no module has room for any, since experts.r is no "
            "more than the ranks at first; raise experts.r, or lower recipe.init_r"
        )
    return None
