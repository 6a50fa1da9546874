"""BiLoRA's two levels against loops by hand."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import molora
from molora.errors import ConfigError, TrainingError
from molora.model import adapter_parameters, sites
from molora.training.recipes import RECIPES
from tests.oracle import near
from tests.recipe_runs import check_resume, run_config, trainer_for, wrapped

EXPERTS = {"kind": "bilora", "num_experts": 2, "r": 3, "singular_values": "softmax"}
TOP1 = {"kind": "soft", "init_range": 0.3}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe_for(model: Any, **settings: Any) -> Any:
    cls = RECIPES["bilora"]
    return cls(cls.Config.from_dict({"kind": "bilora", **settings}), model)


class One(torch.nn.Module):
    """y = x W^T, whose update BiLoRA learns."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = torch.nn.Linear(5, 4, bias=False)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        y: Tensor = self.lin(inputs_embeds)
        return y


def adamw(value: Tensor, grad: Tensor, m: Tensor, v: Tensor, t: int, lr: float) -> None:
    """AdamW without decay, in place."""
    m.mul_(0.9).add_(0.1 * grad)
    v.mul_(0.999).add_(0.001 * grad * grad)
    value.sub_(lr * m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))


@pytest.mark.parametrize("lower_steps", [1, 2])
@pytest.mark.parametrize("form", ["raw", "softmax", "sigmoid"])
def test_levels_alternate(form: str, lower_steps: int) -> None:
    """Closed gradients of a linear model, P and Q by SGD, Lambda by AdamW."""
    torch.manual_seed(0)
    experts = {"kind": "bilora", "r": 3, "singular_values": form}
    raw = {"target_modules": ["lin"], "experts": experts}
    model: Any = molora.wrap(One(), molora.AdapterConfig.from_dict(raw)).double()
    part: Any = sites(model)["lin"].experts
    for p in (part.A, part.Bt, part.Lambda):
        p.data.normal_()
    data = torch.randn(9, 6, 5).double()
    goals = torch.randn(9, 6, 4).double()

    def loss(n: int) -> Tensor:
        total: Tensor = 0.5 * (model(data[n][None])[0] - goals[n]).square().sum()
        return total

    recipe = recipe_for(
        model, lower_steps=lower_steps, upper_learning_rate=0.05, orth_reg_weight=0.3
    )
    recipe.held = lambda n: loss(8 - n)
    recipe.begin(4)
    optimizer = torch.optim.SGD([part.A, part.Bt, part.Lambda], lr=0.01)
    # by hand: W + P diag(s) Q, with the derivatives written out
    W = model.lin.weight.detach()
    Q, P, lam = (p.detach()[0].clone() for p in (part.A, part.Bt, part.Lambda))
    P = P.t().clone()
    m, v = torch.zeros(3).double(), torch.zeros(3).double()

    def outer(n: int, s: Tensor) -> Tensor:
        error = data[n] @ (W + P @ s.diag() @ Q).t() - goals[n]
        return error.t() @ data[n]

    def values() -> tuple[Tensor, Tensor]:
        """s and the matrix of its derivatives by lambda."""
        if form == "raw":
            return lam, torch.eye(3).double()
        if form == "sigmoid":
            s = 1 / (1 + (-lam).exp())
            return s, (s * (1 - s)).diag()
        s = lam.exp() / lam.exp().sum()
        return s, s.diag() - s[:, None] * s[None]

    eye = torch.eye(3).double()
    for step in range(1, 5):
        loss(step).backward()
        recipe.after_backward()
        assert part.Lambda.grad is None
        optimizer.step()
        recipe.after_step(step, optimizer)
        optimizer.zero_grad()
        G, (s, _) = outer(step, values()[0]), values()
        dP = G @ Q.t() @ s.diag() + 0.3 * 4 * P @ (P.t() @ P - eye)
        dQ = s.diag() @ P.t() @ G + 0.3 * 4 * (Q @ Q.t() - eye) @ Q
        P, Q = P - 0.01 * dP, Q - 0.01 * dQ
        if step % lower_steps == 0:
            n = step // lower_steps - 1
            s, jacobian = values()
            ds = (P.t() @ outer(8 - n, s) @ Q.t()).diagonal()
            adamw(lam, jacobian.t() @ ds, m, v, n + 1, 0.05)
        assert near(part.A.detach()[0], Q), step
        assert near(part.Bt.detach()[0].t(), P), step
        assert near(part.Lambda.detach()[0], lam), step


def test_a_resumed_run_equals_the_whole_one(tiny_llama: Any, tmp_path: Path) -> None:
    recipe = {"kind": "bilora", "lower_steps": 2, "orth_reg_weight": 0.01}

    def make(folder: Path) -> Any:
        return trainer_for(wrapped(tiny_llama(), EXPERTS, TOP1), folder, recipe, {3})

    found = check_resume(make, tmp_path, [3, 6])
    logs = [log for log in found["logs"] if "loss" in log]
    assert ["held_loss" in log for log in logs] == [False] + [True] * 11
    steps = {
        float(s["step"]) for s in found["recipe"]["state"]["upper"]["state"].values()
    }
    # the fourth step was left out, and an upper one with it
    assert steps == {5.0}


def test_rows_are_held_out_and_seen_in_evaluation_mode(
    tiny_llama: Any, tmp_path: Path
) -> None:
    experts = {**EXPERTS, "lora_dropout": 0.5}
    model = wrapped(tiny_llama(), experts, TOP1)
    trainer = trainer_for(model, tmp_path, {"kind": "bilora"}, save_strategy="no")
    rest, held = trainer.train_dataset, trainer.recipe.held.rows
    assert (len(rest), len(held), rest.epoch_size) == (14, 4, 14)
    seen = [
        str(rows[i]["input_ids"]) for rows in (rest, held) for i in range(len(rows))
    ]
    assert len(set(seen)) == 18
    for name, value in adapter_parameters(model).items():
        # dropout shows where the update is not small
        if name.endswith("Bt"):
            value.data.normal_(0, 3.0)
    model.train()
    one, two = trainer.recipe.held(0), trainer.recipe.held(0)
    assert model.training and torch.equal(one, two)
    assert not torch.equal(one, trainer.recipe.held(1))
    batches = [held[i] for i in trainer.recipe.held.sampler.draw(0)[:2]]
    inputs = trainer.data_collator(batches)
    inputs.pop("task_ids")
    model.eval()
    assert float(model(**inputs).loss.detach()) == pytest.approx(
        float(one.detach()), rel=1e-6
    )


def test_what_the_levels_do_not_touch(tiny_llama: Any, tmp_path: Path) -> None:
    """The upper step moves Lambda alone; without it Lambda stays."""
    model = wrapped(tiny_llama(), EXPERTS, TOP1)
    recipe = {"kind": "bilora", "lower_steps": 5, "upper_learning_rate": 0.3}
    trainer = trainer_for(model, tmp_path, recipe, max_steps=4, weight_decay=0.5)
    before = {n: p.detach().clone() for n, p in adapter_parameters(model).items()}
    trainer.train()
    after = adapter_parameters(model)
    moved = {
        n.rpartition(".")[2] for n, p in after.items() if not torch.equal(p, before[n])
    }
    assert moved == {"A", "Bt", "weight"}
    trainer.recipe.config = trainer.recipe.config.model_copy(update={"lower_steps": 1})
    before = {n: p.detach().clone() for n, p in after.items()}
    trainer.recipe.after_step(1, trainer.optimizer)
    moved = {
        n.rpartition(".")[2] for n, p in after.items() if not torch.equal(p, before[n])
    }
    assert moved == {"Lambda"}
    assert all(p.grad is None for p in model.parameters())


def test_refusals(tiny_llama: Any, tmp_path: Path) -> None:
    frozen = {
        "kind": "bilora",
        "singular_values": "softmax",
        "trainability": {"Lambda": "frozen"},
    }
    with pytest.raises(ConfigError, match="does not train it; take it out"):
        run_config({"kind": "bilora"}, frozen)
    with pytest.raises(TrainingError, match="does not train it; take it out"):
        recipe_for(wrapped(tiny_llama(), frozen))
    model = wrapped(tiny_llama(), EXPERTS, TOP1)
    with pytest.raises(TrainingError, match="needs rows that are held out"):
        recipe_for(model).begin(4)
    with pytest.raises(ConfigError, match="held_share"):
        run_config({"kind": "bilora", "held_share": 1.0}, {"kind": "bilora"})
    with pytest.raises(TrainingError, match="set bf16"):
        trainer = trainer_for(model, tmp_path, None)
        trainer.args.fp16 = True
        trainer.set_up_recipe(recipe_for(model).config)
    with pytest.raises(TrainingError, match="needs a TaskMixture"):
        trainer = trainer_for(model, tmp_path, None)
        trainer.train_dataset = [trainer.train_dataset[0]]
        trainer.set_up_recipe(recipe_for(model).config)
