"""AdaLoRA's budget against the recorded run of PEFT, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor

import molora
from molora.model import sites
from molora.training.recipes import RECIPES
from tests.oracle import near
from tests.traces import begun, hyper

TENSORS = {"A": "A", "B": "Bt", "E": "E"}


def stored(values: Tensor, name: str) -> Tensor:
    """One tensor of the trace as the experts keep it."""
    return {"A": values, "B": values.mT, "E": values.squeeze(-1)}[name][None]


def started(**changes: Any) -> tuple[Any, Any, dict[str, Tensor], dict[str, Any]]:
    h = hyper("adalora_trace")
    experts = {"kind": "adalora", "init_r": h["init_r"], "lora_alpha": h["alpha"]}
    model, t = begun("adalora_trace", experts)
    for path, site in sites(model).items():
        for name, mine in TENSORS.items():
            getattr(site.experts, mine).data.copy_(
                stored(t[f"{path}/init.{name}"], name)
            )
    names = (
        "target_r",
        "tinit",
        "tfinal",
        "deltaT",
        "beta1",
        "beta2",
        "orth_reg_weight",
    )
    raw = {"kind": "adalora"} | {name: h[name] for name in names} | changes
    cls = RECIPES["adalora"]
    recipe: Any = cls(cls.Config.from_dict(raw), model)
    return model, recipe, t, h


def test_every_step_is_that_of_peft() -> None:
    model, recipe, t, h = started()
    recipe.begin(h["total_step"])
    moved = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moved, lr=h["lr"], weight_decay=0.0)
    for step in range(1, h["total_step"] + 1):
        at = step - 1
        assert recipe.budget(step) == h["budget"][at]
        loss = model()
        loss.backward()
        penalty = recipe.after_backward()
        assert near(loss.detach() + penalty, t["loss"][at], "loss")
        for path, site in sites(model).items():
            for name, mine in TENSORS.items():
                grad = getattr(site.experts, mine).grad
                assert near(grad, stored(t[f"{path}/g{name}"][at], name), name)
        optimizer.step()
        recipe.after_step(step, optimizer)
        for path, site in sites(model).items():
            for name, mine in TENSORS.items():
                value = getattr(site.experts, mine).detach()
                assert near(value, stored(t[f"{path}/{name}"][at], name), name)
                mean, spread = recipe._means[f"{path}.experts.{mine}"]
                assert near(mean, stored(t[f"{path}/ipt{name}"][at], name), name)
                assert near(spread, stored(t[f"{path}/unc{name}"][at], name), name)
            score = recipe.scores()[f"{path}.experts"][0]
            assert near(score, t[f"{path}/score"][at], "score")
            if h["mask_applied"][at]:
                keep = recipe._keep[f"{path}.experts"][0]
                assert torch.equal(keep, t[f"{path}/mask"][at])
        optimizer.zero_grad()
    assert recipe.log() == {"ranks": h["budget"][-1]}


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(5, 4), torch.nn.Linear(4, 3)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(inputs_embeds).tanh())
        return y


Values = dict[str, Tensor]


def now(model: Any) -> Values:
    """Values and gradients of all experts."""
    found = {}
    for path, site in sites(model).items():
        for name in TENSORS.values():
            value = getattr(site.experts, name)
            found[f"{path}.{name}"] = value.detach().clone()
            found[f"{path}.{name}.grad"] = value.grad.clone()
    return found


def sensitivity(seen: list[Values], key: str, at: tuple[int, ...]) -> float:
    """s(p) of one value after these steps; both betas are 0.85."""
    mean = spread = 0.0
    for step in seen:
        size = abs(float(step[key][at] * step[f"{key}.grad"][at]))
        mean = 0.85 * mean + 0.15 * size
        spread = 0.85 * spread + 0.15 * abs(size - mean)
    return mean * spread


def score(seen: list[Values], path: str, e: int, i: int) -> float:
    """S_i of one triplet; a stack of one row is that of every expert."""
    total = sensitivity(seen, f"{path}.E", (e, i))
    for name in ("A", "Bt"):
        stack, _, wide = seen[0][f"{path}.{name}"].shape
        values = (
            sensitivity(seen, f"{path}.{name}", (e % stack, i, j)) for j in range(wide)
        )
        total += sum(values) / wide
    return total


def want(seen: list[Values], before: Values, pruned: int) -> Values:
    """E of every layer once the triplets with the smallest scores are gone."""
    places = [(p, e, i) for p in ("a", "b") for e in range(3) for i in range(2)]
    places.sort(key=lambda at: score(seen, *at))
    found = {path: before[f"{path}.E"].clone() for path in ("a", "b")}
    for path, e, i in places[:pruned]:
        found[path][e, i] = 0
    return found


@pytest.mark.parametrize("shared", [[], ["A"]])
def test_triplets_of_all_experts_share_one_budget(shared: list[str]) -> None:
    torch.manual_seed(0)
    experts = {"kind": "adalora", "num_experts": 3, "init_r": 2, "shared": shared}
    raw = {
        "target_modules": ["a", "b"],
        "experts": experts,
        "router": {"kind": "topk", "top_k": 2, "init_range": 0.5},
    }
    model: Any = molora.wrap(Two(), molora.AdapterConfig.from_dict(raw)).double()
    cls = RECIPES["adalora"]
    config = {"kind": "adalora", "target_r": 1, "tinit": 1, "tfinal": 1, "deltaT": 2}
    recipe: Any = cls(cls.Config.from_dict(config), model)
    recipe.begin(6)
    assert (recipe.initial, recipe.target) == (12, 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    seen: list[Values] = []
    # budgets 6 + 6 (3/4)^3, cut off, and then 6; none are chosen after steps 1 and 3
    for step, pruned in enumerate([0, 4, 0, 6, 6, 6], 1):
        (model(torch.randn(2, 4, 5).double()) - 1).square().mean().backward()
        optimizer.step()
        before = now(model)
        seen += [before] if step < 5 else []
        recipe.after_step(step, optimizer)
        optimizer.zero_grad()
        for path, E in want(seen, before, pruned).items():
            assert torch.equal(sites(model)[path].experts.E, E), (step, path)
