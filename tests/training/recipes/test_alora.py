"""ALoRA's rounds: scores against a model without gates, and what moves where."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import molora
from molora.errors import ConfigError, TrainingError
from molora.model import sites
from molora.training.recipes import RECIPES
from molora.training.recipes.alora import Rank
from tests.recipe_runs import check_resume, run_config, trainer_for, wrapped

EXPERTS = {"kind": "alora", "num_experts": 2, "r": 4}
SOFT = {"kind": "soft", "init_range": 0.3}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        y: Tensor = self.c(self.b(self.a(inputs_embeds).tanh()).tanh())
        return y


def three(r: int = 3, num_experts: int = 1, **settings: Any) -> Any:
    torch.manual_seed(0)
    experts = {"kind": "alora", "r": r, "num_experts": num_experts, **settings}
    raw: dict[str, Any] = {"target_modules": ["a", "b", "c"], "experts": experts}
    if num_experts > 1:
        raw["router"] = SOFT
    return molora.wrap(Three(), molora.AdapterConfig.from_dict(raw)).double()


def recipe_for(model: Any, steps: int | None = 20, **settings: Any) -> Any:
    cls = RECIPES["alora"]
    recipe: Any = cls(cls.Config.from_dict({"kind": "alora", **settings}), model)
    data = torch.randn(9, 7, 5, generator=torch.Generator().manual_seed(1)).double()
    recipe.held = lambda n: (model(data[n][None]) - 0.5).square().mean()
    recipe.data = data
    if steps:
        recipe.begin(steps)
    return recipe


def drawn(model: Any) -> None:
    """As after some training."""
    for site in sites(model).values():
        site.experts.Bt.data.normal_()


def parts(model: Any) -> dict[str, Any]:
    return {path: site.experts for path, site in sites(model).items()}


def plain_loss(model: Any, x: Tensor, gone: set[Rank], alone: Rank | None) -> float:
    """The loss with the update of every layer added rank by rank, one expert."""
    for path, part in parts(model).items():
        layer = getattr(model, path)
        weight = layer.weight.detach().clone()
        for i in range(part.A.shape[1]):
            rank = Rank(f"{path}.experts", 0, i)
            lives = part.gates[0, i] == 1 and rank not in gone
            if rank == alone if alone is not None else lives:
                scale = part.config.lora_alpha / part.config.r
                weight += scale * torch.outer(part.Bt[0, i], part.A[0, i]).detach()
        x = x @ weight.t() + layer.bias.detach()
        x = x if path == "c" else x.tanh()
    return float((x - 0.5).square().mean())


def test_scores_are_those_of_models_without_gates() -> None:
    model = three()
    recipe = recipe_for(model, init_r=2, rounds=2)
    drawn(model)
    before = {path: part.gates.clone() for path, part in parts(model).items()}
    scores = recipe.scores(4)
    assert len(scores) == 6 and {rank.number for rank in scores} == {0, 1}
    x = recipe.data[4]
    base = plain_loss(model, x, set(), None)
    for rank, score in scores.items():
        want = plain_loss(model, x, {rank}, None) - base
        want -= plain_loss(model, x, set(), rank)
        assert score == pytest.approx(want, rel=1e-10)
    assert all(torch.equal(p.gates, before[path]) for path, p in parts(model).items())


def test_gates_come_back_where_scoring_stops() -> None:
    model = three()
    recipe = recipe_for(model, init_r=2)
    drawn(model)
    held, calls = recipe.held, []

    def stops(n: int) -> Tensor:
        calls.append(n)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return held(n)  # type: ignore[no-any-return]

    recipe.held = stops
    with pytest.raises(KeyboardInterrupt):
        recipe.scores(0)
    for part in parts(model).values():
        assert part.gates.tolist() == [[1, 1, 0]]


def planned(recipe: Any, scores: dict[tuple[str, int, int], float]) -> Any:
    named = {Rank(f"{p}.experts", e, i): s for (p, e, i), s in scores.items()}
    closed, opened = recipe._plan(named)
    short = lambda ranks: [(r.path[0], r.expert, r.number) for r in ranks]  # noqa: E731
    return short(closed), short(opened)


def test_where_ranks_go() -> None:
    # a loses one; c matters more than b, so c is served first
    recipe = recipe_for(three(r=3), init_r=2, moved=1)
    scores = {("a", 0, 0): 0.1, ("a", 0, 1): 5.0, ("b", 0, 0): 1.0, ("b", 0, 1): 1.0}
    scores |= {("c", 0, 0): 2.0, ("c", 0, 1): 2.0}
    assert planned(recipe, scores) == ([("a", 0, 0)], [("c", 0, 2)])
    # both ranks of a go, one to c and one to b, though c has the higher mean
    recipe = recipe_for(three(r=4), init_r=2, moved=2)
    scores["a", 0, 1] = 0.2
    closed, opened = planned(recipe, scores)
    assert closed == [("a", 0, 0), ("a", 0, 1)]
    assert opened == [("c", 0, 2), ("b", 0, 2)]
    # three would have to go, and only c has lost none: it has room for two
    recipe = recipe_for(three(r=4), init_r=2, moved=3)
    scores["b", 0, 0] = 0.3
    closed, opened = planned(recipe, scores)
    assert closed == [("a", 0, 0), ("a", 0, 1)]
    # as many as there are modules, where nothing is said
    recipe = recipe_for(three(r=9), init_r=2)
    assert len(planned(recipe, scores)[0]) == 3
    # c is full, so nobody can take anything from both of the others
    recipe = recipe_for(three(r=3), init_r=2, moved=2)
    for path, part in recipe._experts().items():
        part.gates.data[:] = 1 if path == "c.experts" else part.gates
    scores = {("a", 0, 0): 0.1, ("a", 0, 1): 5.0, ("b", 0, 0): 0.2, ("b", 0, 1): 1.0}
    scores |= {("c", 0, i): 2.0 for i in range(3)}
    assert planned(recipe, scores) == ([("a", 0, 0)], [("b", 0, 2)])
    everything_low = {**scores, ("a", 0, 0): 9.0, ("b", 0, 0): 9.0, ("b", 0, 1): 9.0}
    everything_low |= {("c", 0, i): 0.1 for i in range(3)}
    # c loses two and the others take one each, the one with the higher mean first
    closed, opened = planned(recipe, everything_low)
    assert closed == [("c", 0, 0), ("c", 0, 1)]
    assert opened == [("b", 0, 2), ("a", 0, 2)]


@pytest.mark.parametrize("num_experts", [1, 2])
def test_a_round(num_experts: int) -> None:
    model = three(r=4, num_experts=num_experts)
    recipe = recipe_for(model, init_r=2, moved=2, warmup=2, interval=2, rounds=3)
    moved = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moved, lr=0.05)
    live = recipe.live()
    assert len(live) == 6 * num_experts
    for step in range(1, 8):
        recipe.held(8).backward()
        optimizer.step()
        before = {p: part.gates.clone() for p, part in parts(model).items()}
        rows = {p: part.A.detach().clone() for p, part in parts(model).items()}
        moments = {
            p: optimizer.state[part.Bt]["exp_avg"].clone()
            for p, part in parts(model).items()
        }
        scores = recipe.scores(recipe._round) if step in (2, 4, 6) else {}
        recipe.after_step(step, optimizer)
        optimizer.zero_grad()
        assert len(recipe.live()) == 6 * num_experts
        assert recipe.log()["rounds"] == sum(step >= at for at in (2, 4, 6))
        changed = [
            Rank(f"{p}.experts", *at)
            for p, part in parts(model).items()
            for at in (part.gates != before[p]).nonzero().tolist()
        ]
        assert len(changed) == (4 if scores else 0)
        lowest = set(sorted(scores, key=lambda rank: scores[rank])[:2])
        assert {rank for rank in changed if rank in scores} == lowest
        for rank in changed:
            part, path = parts(model)[rank.path[0]], rank.path[0]
            at = rank.expert, rank.number
            for value in (part.A, part.Bt):
                state = optimizer.state[value]
                assert not state["exp_avg"][at].any()
                assert not state["exp_avg_sq"][at].any()
            if rank not in lowest:
                assert not part.Bt[at].any() and part.gates[at] == 1
                assert not torch.equal(part.A[at], rows[path][at])
                assert (
                    float(part.A[at].detach().abs().max()) <= part.A.shape[-1] ** -0.5
                )
        for path, part in parts(model).items():
            known = moments[path].clone()
            for rank in lowest:
                if rank.path == f"{path}.experts":
                    known[rank.expert, rank.number] = 0
            assert torch.equal(optimizer.state[part.Bt]["exp_avg"], known)


def test_experts_that_were_trained_keep_their_live_ranks() -> None:
    model = three(r=4)
    recipe = recipe_for(model, init_r=1)
    assert [p.gates.sum() for p in parts(model).values()] == [1, 1, 1]
    recipe.begin(20)
    assert [p.gates.sum() for p in parts(model).values()] == [1, 1, 1]
    drawn(model)
    parts(model)["b"].gates.data[0, 2] = 1
    recipe.begin(20)
    assert [p.gates.sum() for p in parts(model).values()] == [1, 2, 1]
    for part in parts(model).values():
        part.gates.data.fill_(1)
    with pytest.raises(TrainingError, match="every rank of these trained experts"):
        recipe.begin(20)


def test_a_score_that_is_not_finite(caplog: pytest.LogCaptureFixture) -> None:
    model = three(r=4)
    recipe = recipe_for(model, warmup=1, interval=1, rounds=1)
    held = recipe.held
    recipe.held = lambda n: held(n) * float("nan")
    recipe.after_step(1, torch.optim.AdamW(model.parameters()))
    assert "no rank is moved in this round" in caplog.text
    assert recipe.log() == {"ranks": 6, "rounds": 1, "moved": 0}


def test_a_resumed_run_equals_the_whole_one(tiny_llama: Any, tmp_path: Path) -> None:
    recipe = {"kind": "alora", "warmup": 3, "interval": 3, "rounds": 3, "moved": 5}

    def make(folder: Path) -> Any:
        model = wrapped(tiny_llama(), EXPERTS, SOFT)
        # the second round's step is left out, and the next one makes up for it
        return trainer_for(model, folder, recipe, poison={5})

    found = check_resume(make, tmp_path, [2, 3, 6, 8])
    logs = [log for log in found["logs"] if "loss" in log]
    assert [log["rounds"] for log in logs] == [0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3]
    assert {log["ranks"] for log in logs} == {16}
    assert [log["moved"] for log in logs] == [0, 0] + [5] * 10


class Coded(torch.optim.AdamW):
    """Keeps one of its moments as codes."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for state in self.state.values():
            state["exp_avg"] = torch.zeros_like(state["exp_avg"], dtype=torch.uint8)


def test_an_optimizer_with_codes() -> None:
    model = three(r=4)
    recipe = recipe_for(model)
    optimizer = Coded([p for p in model.parameters() if p.requires_grad])
    recipe.held(0).backward()
    optimizer.step()
    with pytest.raises(TrainingError, match="Coded with its state in torch.uint8"):
        recipe.after_step(1, optimizer)


@pytest.mark.parametrize(
    ("experts", "settings", "told"),
    [
        ({"r": 2}, {"init_r": 2}, "raise experts.r, or lower recipe.init_r"),
        ({"r": 1}, {}, "raise experts.r, or lower recipe.init_r"),
        ({"r": 2}, {"init_r": 3}, "recipe.init_r=3 ranks, and experts.r=2 is all"),
        ({"shared": ["A"]}, {}, "leave both out"),
        ({"trainability": {"A": "frozen"}}, {}, "leave both out"),
    ],
)
def test_ranks_that_cannot_move(
    experts: dict[str, Any], settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        run_config({"kind": "alora", **settings}, {"kind": "alora", **experts})
    with pytest.raises(TrainingError, match=told):
        recipe_for(three(**{"r": 4, **experts}), **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"warmup": 0, "rounds": 1},
        {"warmup": 4, "interval": 4, "rounds": 5},
        {"warmup": 4, "interval": 0, "rounds": 2},
        {"warmup": 0.01},
    ],
)
def test_rounds_that_do_not_fit(settings: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=r"recipe.rounds=\d .* 20 steps"):
        recipe_for(three(r=4), **settings)
    assert recipe_for(three(r=4), warmup=4, interval=4, rounds=4)
