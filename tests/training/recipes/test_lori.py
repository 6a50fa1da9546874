"""LoRI in one run against two runs by hand, its masks against the recorded ones."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import molora
from molora.errors import ConfigError, TrainingError
from molora.model import adapter_parameters, sites
from molora.training.recipes import RECIPES
from tests.oracle import load, near
from tests.recipe_runs import check_resume, run_config, trainer_for, wrapped
from tests.traces import hyper

Factory = Callable[..., PreTrainedModel]
MASKED = {"A": "frozen", "B": "masked"}
EXPERTS = {"kind": "lora", "num_experts": 2, "r": 3, "trainability": MASKED}
SOFT = {"kind": "soft", "init_range": 0.3}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe_for(model: Any, steps: int, **settings: Any) -> Any:
    cls = RECIPES["lori"]
    recipe: Any = cls(cls.Config.from_dict({"kind": "lori", **settings}), model)
    recipe.begin(steps)
    return recipe


def test_masks_are_those_of_the_authors() -> None:
    t, h = load("lori_mask"), hyper("lori_mask")
    model: Any = nn.Module()
    for i in range(len(h["names"])):
        model.add_module(f"lin{i}", nn.Linear(11, len(t[f"B/{i}"])))
    experts = {"kind": "lora", "r": t["B/0"].shape[1], "trainability": MASKED}
    raw = {"target_modules": list(dict(model.named_children())), "experts": experts}
    model = molora.wrap(model, molora.AdapterConfig.from_dict(raw))
    recipe = recipe_for(model, 4, density=1 - h["sparsity"], calibration=3)
    parts: list[Any] = [site.experts for site in sites(model).values()]
    optimizer = torch.optim.AdamW([part.Bt for part in parts])
    for i, part in enumerate(parts):
        part.Bt.data.copy_(t[f"B/{i}"].t())
        optimizer.state[part.Bt] = {"step": torch.tensor(3.0)}
    recipe.after_step(2, optimizer)
    assert all(part.Bt.any() and part.mask_Bt.all() for part in parts)
    recipe.after_step(3, optimizer)
    for i, part in enumerate(parts):
        assert torch.equal(part.mask_Bt[0].t(), t[f"model/{i}"])
        assert not part.Bt.any()
    assert not optimizer.state
    assert recipe.log() == {"entries": sum(int(part.mask_Bt.sum()) for part in parts)}
    before = [part.mask_Bt.clone() for part in parts]
    recipe.after_step(4, optimizer)
    assert all(
        torch.equal(part.mask_Bt, m) for part, m in zip(parts, before, strict=True)
    )


def by_hand(model: Any, losses: Callable[[int], Tensor], masks: Any) -> None:
    """Train B with AdamW, written out, under masks; two steps after every start."""
    stacks = [site.experts.Bt for site in sites(model).values()]
    m = [torch.zeros_like(b) for b in stacks]
    v = [torch.zeros_like(b) for b in stacks]
    for step in (1, 2):
        grads = torch.autograd.grad(losses(step), stacks)
        for i, (b, grad) in enumerate(zip(stacks, grads, strict=True)):
            g = grad * masks[i]
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g * g
            size = m[i] / (1 - 0.9**step) / ((v[i] / (1 - 0.999**step)).sqrt() + 1e-8)
            b.data.mul_(1 - 0.01 * 0.1).sub_(0.01 * size)


def test_one_run_is_two_runs_by_hand(tiny_llama: Factory) -> None:
    def start() -> tuple[Any, Callable[[int], Tensor]]:
        experts = {**EXPERTS, "num_experts": 1}
        model = wrapped(tiny_llama(), experts).double()
        ids = torch.randint(
            3, 128, (4, 2, 8), generator=torch.Generator().manual_seed(0)
        )
        return model, lambda step: model(ids[step - 1], labels=ids[step - 1]).loss

    model, loss = start()
    recipe = recipe_for(model, 4, density=0.2, calibration=0.5)
    moved = [p for p in adapter_parameters(model).values() if p.requires_grad]
    optimizer = torch.optim.AdamW(moved, lr=0.01, weight_decay=0.1)
    for step in range(1, 5):
        loss(step).backward()
        optimizer.step()
        recipe.after_step(step, optimizer)
        optimizer.zero_grad()
    twin, loss = start()
    stacks = [site.experts.Bt for site in sites(twin).values()]
    by_hand(twin, loss, [torch.ones_like(b) for b in stacks])
    sizes = torch.cat([b.abs().flatten() for b in stacks]).sort(descending=True).values
    limit = sizes[int(0.2 * len(sizes)) - 1]
    masks = [b.abs() >= limit for b in stacks]
    for b in stacks:
        b.data.zero_()
    by_hand(twin, lambda step: loss(step + 2), masks)
    for site, other, mask in zip(sites(model).values(), stacks, masks, strict=True):
        assert torch.equal(site.experts.mask_Bt, mask)
        assert near(site.experts.Bt.detach(), other.detach())
        assert bool(site.experts.Bt.any()) and not site.experts.Bt[~mask].any()


def test_a_resumed_run_equals_the_whole_one(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    recipe = {"kind": "lori", "density": 0.3, "calibration": 6}

    def make(folder: Path) -> Any:
        model = wrapped(tiny_llama(), EXPERTS, SOFT)
        # the step of the masking is left out, so that the next one does it
        return trainer_for(model, folder, recipe, poison={5})

    found = check_resume(make, tmp_path, [4, 6, 7, 9])
    logs = [log for log in found["logs"] if "loss" in log]
    assert ["entries" in log for log in logs] == [False] * 6 + [True] * 6
    assert logs[-1]["entries"] == found["recipe"]["state"]["kept"]


def test_a_second_run_masks_anew(tiny_llama: Factory, tmp_path: Path) -> None:
    model = wrapped(tiny_llama(), EXPERTS, SOFT)
    recipe = {"kind": "lori", "density": 0.5}
    trainer = trainer_for(model, tmp_path, recipe, max_steps=4, save_strategy="no")
    trainer.train()
    first = trainer.recipe.kept
    for site in sites(model).values():
        site.experts.mask_Bt.fill_(True)
    trainer.train()
    assert trainer.recipe.kept == first
    masks = [site.experts.mask_Bt for site in sites(model).values()]
    assert sum(int(mask.sum()) for mask in masks) == first


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"trainability": {}}, "here none is; set experts.trainability"),
        ({"density": 0.5}, "experts.density=0.5 draws them; leave"),
    ],
)
def test_what_has_no_masks_to_set(
    tiny_llama: Factory, settings: dict[str, Any], told: str
) -> None:
    experts = {**EXPERTS, "num_experts": 1, **settings}
    with pytest.raises(ConfigError, match=told):
        run_config({"kind": "lori"}, experts)
    model = wrapped(tiny_llama(), experts)
    with pytest.raises(TrainingError, match=told):
        recipe_for(model, 4)


@pytest.mark.parametrize("calibration", [0, 0.1, 4, 7])
def test_a_part_without_a_step(tiny_llama: Factory, calibration: float) -> None:
    model = wrapped(tiny_llama(), EXPERTS, SOFT)
    with pytest.raises(TrainingError, match=r"recipe.calibration=.* 4 steps"):
        recipe_for(model, 4, calibration=calibration)
