"""SoRA's thresholds against the recorded runs of the authors' code."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import molora
from molora.errors import ConfigError, TrainingError
from molora.model import adapter_parameters, sites
from molora.training.recipes import RECIPES
from tests.oracle import load, near
from tests.recipe_runs import check_resume, run_config, trainer_for, wrapped
from tests.traces import hyper

SOFT = {"kind": "soft", "init_range": 0.3}
EXPERTS = {"kind": "sora", "num_experts": 2, "r": 4}
THREE = {"kind": "sora", "num_experts": 3, "r": 4}
TOP2 = {"kind": "topk", "top_k": 2, "init_range": 0.3}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe_for(model: Any, **settings: Any) -> Any:
    cls = RECIPES["sora"]
    return cls(cls.Config.from_dict({"kind": "sora", **settings}), model)


def begun(model: Any, steps: int, **settings: Any) -> Any:
    recipe = recipe_for(model, **settings)
    recipe.begin(steps)
    return recipe


class One(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.lin = nn.Linear(weight.shape[1], weight.shape[0])
        self.lin.weight.data, self.lin.bias.data = weight.clone(), bias.clone()

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        y: Tensor = self.lin(inputs_embeds)
        return y


@pytest.mark.parametrize("name", ["sora_trace", "sora_trace_multiply_lr"])
def test_every_step_is_that_of_the_authors(name: str) -> None:
    t, h = load(name), hyper(name)
    experts = {"kind": "sora", "r": h["r"], "lora_alpha": float(h["alpha"])}
    raw = {"target_modules": ["lin"], "experts": experts}
    plain = One(t["base.weight"], t["base.bias"])
    model: Any = molora.wrap(plain, molora.AdapterConfig.from_dict(raw)).double()
    part: Any = sites(model)["lin"].experts
    part.A.data.copy_(t["init.A"])
    part.Bt.data.copy_(t["init.B"].t())
    part.gate.data.copy_(t["init.gate"])
    recipe = recipe_for(
        model,
        sparse_lambda=h["sparse_lambda_loss"],
        prox_lambda=h["prox_lambda"],
        multiply_lr=h["multiply_lr"],
        gate_learning_rate=h["gate_lr"],
    )
    recipe.begin(h["steps"])
    optimizer = torch.optim.AdamW([part.A, part.Bt], lr=h["lr"], weight_decay=0.0)
    (group,) = recipe.groups()
    optimizer.add_param_group(group)
    m, v = torch.zeros(2, 1, h["r"]).double()
    for step in range(1, h["steps"] + 1):
        loss = (model(t["x"][None])[0] - t["target"]).square().mean()
        loss.backward()
        penalty = recipe.after_backward()
        at = step - 1
        assert near(loss.detach() + penalty, t["loss"][at], "loss")
        assert near(part.A.grad[0], t["grad.A"][at], "A")
        assert near(part.Bt.grad[0].t(), t["grad.B"][at], "B")
        assert near(part.gate.grad, t["grad.gate"][at], "gate")
        # their AdamW, with eps before the correction of the bias
        grad, part.gate.grad = part.gate.grad, None
        m = 0.9 * m + 0.1 * grad
        v = 0.999 * v + 0.001 * grad * grad
        size = h["gate_lr"] * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
        part.gate.data.sub_(size * m / (v.sqrt() + 1e-6))
        assert near(part.gate.detach(), t["gate_pre"][at], "before")
        optimizer.step()
        recipe.after_step(step, optimizer)
        optimizer.zero_grad()
        assert near(part.A.detach()[0], t["A"][at], "A")
        assert near(part.Bt.detach()[0].t(), t["B"][at], "B")
        assert near(part.gate.detach(), t["gate"][at], "gate")
        assert recipe.log() == {"ranks": int(t["gate"][at].count_nonzero())}


@pytest.mark.parametrize("schedule", ["linear", "log_linear", "exp_linear"])
def test_lambdas_are_those_of_the_authors(tiny_llama: Any, schedule: str) -> None:
    t, h = load("sora_lambda"), hyper("sora_lambda")
    recipe = recipe_for(
        wrapped(tiny_llama(), EXPERTS, SOFT),
        lambda_schedule=schedule,
        prox_lambda=h["first"],
        max_lambda=h["last"],
        lambda_num=h["num"],
    )
    recipe.begin(21)
    found = torch.tensor([recipe.threshold(step) for step in range(1, 22)]).double()
    assert torch.allclose(found, t[schedule].repeat_interleave(3), rtol=1e-6, atol=0)
    lambdas = torch.tensor(recipe.config.lambdas(), dtype=torch.float64)
    assert near(lambdas, t[schedule])
    recipe.begin(10)
    phases = [recipe.config.lambdas().index(recipe.threshold(s)) for s in range(1, 11)]
    assert phases == [0, 0, 1, 2, 2, 3, 4, 4, 5, 6]


@pytest.mark.parametrize("hard", [True, False])
def test_the_threshold_is_a_proximal_step(tiny_llama: Any, hard: bool) -> None:
    """Without the hard one it is the z that is best in (z - g)^2 / 2 + xi |z|."""
    model = wrapped(tiny_llama(), EXPERTS, SOFT)
    recipe = recipe_for(model, prox_lambda=0.1, hard_threshold=hard, sparse_lambda=0)
    recipe.begin(4)
    gate = recipe.gates[0]
    start = torch.tensor([[0.05, -0.15, 0.25, -0.1], [0.19, -0.2, 3.0, 0.0]])
    gate.data.copy_(start)
    recipe.after_step(1, torch.optim.SGD(recipe.gates, lr=0.5))
    grid = torch.linspace(-3, 3, 6001)
    cost = (grid - start.flatten()[:, None]).square() / 2 + 0.1 * grid.abs()
    best = grid[cost.argmin(1)].view(2, 4)
    if hard:
        best = torch.where(best.abs() < 0.1 - 1e-6, 0.0, best)
    assert torch.allclose(gate, best, atol=2e-3)
    assert torch.equal(gate == 0, best.abs() < 1e-6)
    assert recipe.penalised() == []


def test_a_resumed_run_equals_the_whole_one(tiny_llama: Any, tmp_path: Path) -> None:
    recipe = {
        "kind": "sora",
        "gate_learning_rate": 0.2,
        "prox_lambda": 0.01,
        "lambda_schedule": "linear",
        "max_lambda": 0.1,
        "lambda_num": 3,
        "multiply_lr": True,
    }

    def make(folder: Path) -> Any:
        model = wrapped(tiny_llama(), EXPERTS, SOFT)
        return trainer_for(model, folder, recipe, poison={4}, weight_decay=0.1)

    found = check_resume(make, tmp_path, [2, 7])
    logs = [log for log in found["logs"] if "loss" in log]
    assert logs[0]["ranks"] > logs[-1]["ranks"] > 0
    gate = found["optimizer"]["param_groups"][-1]
    assert (len(gate["params"]), gate["initial_lr"], gate["weight_decay"]) == (
        4,
        0.2,
        0,
    )


def test_exports_leave_the_closed_ranks_out(tiny_llama: Any, tmp_path: Path) -> None:
    model = wrapped(tiny_llama(), {"kind": "sora", "r": 4})
    recipe = {"kind": "sora", "gate_learning_rate": 0.3, "prox_lambda": 0.05}
    trainer = trainer_for(model, tmp_path / "run", recipe, save_strategy="no")
    trainer.train()
    live = [int(site.experts.gate.count_nonzero()) for site in sites(model).values()]
    assert min(live) < 4 and sum(live) == trainer.recipe.log()["ranks"]
    ids = torch.arange(3, 13)[None]
    model.eval()
    before = model(ids).logits
    molora.export_peft(model, tmp_path / "peft", rank=max(live))
    back = molora.import_peft(tiny_llama(), [tmp_path / "peft"]).eval()
    assert torch.allclose(back(ids).logits, before, atol=1e-5)


def test_a_gate_that_layers_share_is_thresholded_once(tiny_llama: Any) -> None:
    experts = {**EXPERTS, "shared": {"gate": "type"}}
    recipe = recipe_for(wrapped(tiny_llama(), experts, SOFT), prox_lambda=0.1)
    assert (len(recipe.parts), len(recipe.gates)) == (4, 2)
    recipe.begin(4)
    gate = recipe.gates[0]
    gate.data.fill_(1.0)
    recipe.after_step(1, torch.optim.SGD(recipe.gates, lr=0.5))
    assert torch.allclose(gate, torch.tensor(0.9))


FROZEN = {"kind": "sora", "trainability": {"gate": "frozen"}}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_lambda": 1.0}, "max_lambda: nothing reads it without lambda_schedule"),
        ({"lambda_num": 3}, "lambda_num: nothing reads it without lambda_schedule"),
        ({"lambda_schedule": "linear"}, "needs max_lambda and lambda_num"),
        (
            {"lambda_schedule": "linear", "max_lambda": 1e-4, "lambda_num": 2},
            "max_lambda: 0.0001 is where the schedule ends",
        ),
        (
            {
                "lambda_schedule": "exp_linear",
                "prox_lambda": 0.0,
                "max_lambda": 1e-4,
                "lambda_num": 2,
            },
            "exp_linear begins above 0",
        ),
        ({"prox_lambda": 0.0}, "prox_lambda: at 0 nothing is pruned"),
        ({"prox_lambda": -1.0}, "training.recipe.prox_lambda"),
        ({"lambda_num": 1}, "training.recipe.lambda_num"),
        ({"gate_lr": 0.1}, "recipe.gate_lr: unknown field"),
    ],
)
def test_settings_that_mean_nothing(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        run_config({"kind": "sora", **settings}, {"kind": "sora"})


def test_refusals(tiny_llama: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="take gate out of there"):
        run_config({"kind": "sora"}, FROZEN)
    with pytest.raises(TrainingError, match="take gate out of there"):
        recipe_for(wrapped(tiny_llama(), FROZEN))
    schedule = {"lambda_schedule": "linear", "max_lambda": 1.0, "lambda_num": 5}
    recipe = recipe_for(wrapped(tiny_llama(), EXPERTS, SOFT), **schedule)
    with pytest.raises(TrainingError, match="lambda_num=5 phases .* 4 steps"):
        recipe.begin(4)


def stepped(g: float, xi: float, hard: bool) -> float:
    """One gate after the thresholds."""
    left = math.copysign(max(abs(g) - xi, 0.0), g)
    return 0.0 if hard and abs(left) < xi else left


@pytest.mark.parametrize("hard", [True, False])
def test_the_thresholds_of_single_values(tiny_llama: Any, hard: bool) -> None:
    model = wrapped(tiny_llama(num_hidden_layers=1), {"kind": "sora", "r": 8})
    settings = {"prox_lambda": 0.25, "hard_threshold": hard}
    recipe = begun(model, 1, **settings)
    values = [0.0, 0.25, -0.25, 0.375, -0.4375, 0.5, -0.5, 2.0]
    for gate in recipe.gates:
        gate.data.copy_(torch.tensor([values]))
    recipe.after_step(1, torch.optim.SGD(recipe.groups(), lr=1.0))
    soft = [0, 0, 0, 0.125, -0.1875, 0.25, -0.25, 1.75]
    hardened = [0, 0, 0, 0, 0, 0.25, -0.25, 1.75]
    for gate in recipe.gates:
        assert gate.tolist() == [hardened if hard else soft]
    assert recipe.log() == {"ranks": 2 * (3 if hard else 5)}


@pytest.mark.parametrize(
    ("shared", "count"),
    [([], 4 * 3), (["gate"], 4), ({"gate": "type"}, 2), ({"gate": "model"}, 1)],
)
def test_every_gate_is_stepped_and_counted_once(
    tiny_llama: Any, shared: Any, count: int
) -> None:
    model = wrapped(tiny_llama(), {**THREE, "shared": shared}, TOP2).double()
    settings = {"prox_lambda": 0.4, "multiply_lr": True, "sparse_lambda": 3.0}
    recipe = begun(model, 9, gate_learning_rate=0.3, **settings)
    gates = {n: p for n, p in adapter_parameters(model).items() if n.endswith("gate")}
    assert sum(len(gate) for gate in gates.values()) == count
    others = [p for n, p in adapter_parameters(model).items() if n not in gates]
    groups = [{"params": others}, *recipe.groups()]
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.5)
    ids = torch.randint(3, 128, (2, 8), generator=torch.Generator().manual_seed(0))
    model(ids, labels=ids).loss.backward()
    # B is zero, so gates have no other gradient than that of the penalty
    assert all(not p.grad.any() for p in gates.values() if p.grad is not None)
    before = {name: gate.detach().clone() for name, gate in gates.items()}
    penalty = recipe.after_backward()
    total = sum(abs(g) for gate in before.values() for g in gate.flatten().tolist())
    assert float(penalty) == pytest.approx(3.0 * total / (4 * count), rel=1e-12)
    optimizer.step()
    recipe.after_step(1, optimizer)
    live = 0
    for name, gate in gates.items():
        for e, row in enumerate(before[name].tolist()):
            for i, g in enumerate(row):
                moved = g - 0.3 * math.copysign(3.0 / (4 * count), g)
                want = stepped(moved, 0.4 * 0.3, hard=True)
                assert gate[e, i].item() == pytest.approx(want, rel=1e-12), name
                live += want != 0
    assert recipe.log() == {"ranks": live}
    assert 0 < live < 4 * count or count < 4


def test_a_gate_at_zero_can_come_back(tiny_llama: Any) -> None:
    model = wrapped(tiny_llama(), {"kind": "sora", "r": 4}).double()
    for site in sites(model).values():
        site.experts.Bt.data.normal_(generator=torch.Generator().manual_seed(1))
        site.experts.gate.data.zero_()
    recipe = begun(model, 1, prox_lambda=1e-4)
    optimizer = torch.optim.SGD(recipe.groups(), lr=1.0)
    ids = torch.randint(3, 128, (2, 8), generator=torch.Generator().manual_seed(0))
    model(ids, labels=ids).loss.backward()
    penalty = recipe.after_backward()
    assert float(penalty) == 0
    assert all(not s.experts.A.grad.any() for s in sites(model).values())
    optimizer.step()
    recipe.after_step(1, optimizer)
    assert recipe.log()["ranks"] > 0


def made(tiny_llama: Any, folder: Path, recipe: Any, **settings: Any) -> Any:
    model = wrapped(tiny_llama(), THREE, TOP2)
    return trainer_for(model, folder, recipe, **settings)


def test_the_penalty_counts_once_and_the_gates_have_no_decay(
    tiny_llama: Any, tmp_path: Path
) -> None:
    settings = {
        "gradient_accumulation_steps": 3,
        "per_device_train_batch_size": 6,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.5,
        "weight_decay": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
    }
    recipe = {"kind": "sora", "prox_lambda": 0.125, "sparse_lambda": 24.0}
    trainer = made(tiny_llama, tmp_path, recipe, **settings)
    gates = [site.experts.gate for site in sites(trainer.model).values()]
    before = [gate.detach().clone() for gate in gates]
    trainer.train()
    # 48 gates, each with a gradient of 24 / 48; B was zero
    for gate, g in zip(gates, before, strict=True):
        moved = g - 0.5 * 0.5 * g.sign()
        left = moved.sign() * (moved.abs() - 0.125).clamp(min=0)
        want = left * (left.abs() >= 0.125)
        torch.testing.assert_close(gate.detach(), want)


def test_the_rate_is_that_of_the_step(tiny_llama: Any, tmp_path: Path) -> None:
    recipe = {
        "kind": "sora",
        "prox_lambda": 0.03,
        "sparse_lambda": 2.0,
        "gate_learning_rate": 0.5,
        "multiply_lr": True,
        "hard_threshold": False,
    }
    trainer = made(tiny_llama, tmp_path, recipe, max_steps=4, save_strategy="no")
    seen: list[tuple[Tensor, Tensor]] = []
    step_of = trainer.recipe.after_step
    gate = sites(trainer.model)["model.layers.0.self_attn.q_proj"].experts.gate

    def watched(step: int, optimizer: Any) -> None:
        before = gate.detach().clone()
        step_of(step, optimizer)
        seen.append((before, gate.detach().clone()))

    trainer.recipe.after_step = watched
    trainer.train()
    # the rate falls in equal parts, and that of the first step is the whole one
    for share, (before, after) in zip([1, 0.75, 0.5, 0.25], seen, strict=True):
        want = before.sign() * (before.abs() - 0.03 * 0.5 * share).clamp(min=0)
        torch.testing.assert_close(after, want, rtol=1e-5, atol=1e-7)


def test_groups_have_the_rate_of_the_run_or_their_own(
    tiny_llama: Any, tmp_path: Path
) -> None:
    for given, want in ((None, 1e-2), (0.25, 0.25)):
        recipe = {"kind": "sora", "gate_learning_rate": given}
        trainer = made(tiny_llama, tmp_path, recipe, weight_decay=0.1)
        *rest, own = trainer.create_optimizer().param_groups
        assert (own["lr"], own["weight_decay"]) == (want, 0.0)
        assert {group["lr"] for group in rest} == {1e-2}
        gates = {id(site.experts.gate) for site in sites(trainer.model).values()}
        assert {id(p) for p in own["params"]} == gates


@pytest.mark.parametrize("kind", ["frozen", "seeded"])
@pytest.mark.parametrize("inside", [False, True])
def test_gates_that_are_not_trained(tiny_llama: Any, kind: str, inside: bool) -> None:
    experts: dict[str, Any] = {"kind": "sora", "trainability": {"gate": kind}}
    if inside:
        experts = {"kind": "dora", "inner": experts}
    told = rf"trainability: \{{'gate': '{kind}'\}} does not train them; take gate out"
    with pytest.raises(ConfigError, match=told):
        run_config({"kind": "sora"}, experts)
    with pytest.raises(TrainingError, match=told):
        begun(wrapped(tiny_llama(), experts), 4)


def test_a_gate_that_was_frozen_by_hand(tiny_llama: Any) -> None:
    model = wrapped(tiny_llama(), {"kind": "sora"})
    gate = sites(model)["model.layers.1.mlp.up_proj"].experts.gate
    gate.requires_grad_(False)
    told = r"layers.1.mlp.up_proj.experts.gate is not trained.* requires_grad_\(True\)"
    with pytest.raises(TrainingError, match=told):
        begun(model, 4)


def test_an_optimizer_without_the_gates(tiny_llama: Any) -> None:
    model = wrapped(tiny_llama(), {"kind": "sora"})
    recipe = begun(model, 2, multiply_lr=True)
    others = [site.experts.A for site in sites(model).values()]
    with pytest.raises(TrainingError, match="multiply_lr: the optimizer has no"):
        recipe.after_step(1, torch.optim.SGD(others, lr=0.1))
