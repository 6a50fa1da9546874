"""AdaLoRA's budget against the recorded run of PEFT, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor

import molora
from molora.errors import ConfigError, TrainingError
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
        penalty = recipe.add_penalty()
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
