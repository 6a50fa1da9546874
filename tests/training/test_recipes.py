"""What a trainer does for any recipe, seen with AdaLoRA's."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from molora.errors import CheckpointError, ConfigError, TrainingError
from molora.model import adapter_parameters, sites
from molora.training import MoloraTrainingSettings
from molora.training.recipes import RECIPES
from tests.recipe_runs import check_resume, run_config, trainer_for, wrapped

Factory = Callable[..., PreTrainedModel]
EXPERTS = {"kind": "adalora", "num_experts": 3, "init_r": 4}
TOP2 = {"kind": "topk", "top_k": 2, "init_range": 0.3}
RECIPE = {"kind": "adalora", "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(tiny_llama: Factory, folder: Path, **settings: Any) -> Any:
    recipe = settings.pop("recipe", RECIPE)
    model = wrapped(tiny_llama(), EXPERTS, TOP2)
    return trainer_for(model, folder, recipe, **settings)


def test_a_resumed_run_equals_the_whole_one(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    # before any choice, after one, and once it is final; two steps are left out
    found = check_resume(
        lambda folder: made(tiny_llama, folder, poison={3, 8}), tmp_path, [2, 5, 10]
    )
    assert found["recipe"]["state"]["is_final"]
    logs = [log for log in found["logs"] if "ranks" in log]
    assert logs[0]["ranks"] == 4 * 3 * 4
    assert logs[-1]["ranks"] == 4 * 3 * 2
    assert all(log["recipe_penalty"] > 0 for log in logs)


def test_the_adapter_in_the_end_has_the_ranks_of_the_budget(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    trainer = made(tiny_llama, tmp_path, save_strategy="no")
    trainer.train()
    experts: list[Any] = [site.experts for site in sites(trainer.model).values()]
    assert sum(int(e.E.count_nonzero()) for e in experts) == 24
    assert {int(e.E[i].count_nonzero()) for e in experts for i in range(3)} != {2}
    ranks = [len(part.expert_factors(e)[0]) for part in experts for e in range(3)]
    assert sum(ranks) == sum(
        max(int(p.E[e].count_nonzero()), 1) for p in experts for e in range(3)
    )


def test_a_step_that_is_left_out_leaves_the_recipe_alone(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    trainer = made(tiny_llama, tmp_path, poison={0}, max_steps=6, save_steps=1)
    seen = []
    after, before = trainer.recipe.after_step, trainer.recipe.before_step
    trainer.recipe.after_step = lambda step, opt: (seen.append(step), after(step, opt))
    trainer.recipe.before_step = lambda step: (seen.append(-step), before(step))
    trainer.train()
    assert seen == [-2, 2, -3, 3, -4, 4, -5, 5, -6, 6]
    assert all(mean.isfinite().all() for mean, _ in trainer.recipe._means.values())


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_penalty_counts_once_in_a_step(
    tiny_llama: Factory, tmp_path: Path, accumulation: int
) -> None:
    settings = {
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 18 // accumulation,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
    }
    # one step, which chooses nothing: only the penalty is looked at
    recipe = {**RECIPE, "tinit": 0, "tfinal": 0, "target_r": 4, "orth_reg_weight": 3.0}
    results = []
    for chosen in (recipe, None):
        trainer = made(tiny_llama, tmp_path, recipe=chosen, **settings)
        trainer.train()
        results.append(
            {
                n: p.detach().clone()
                for n, p in adapter_parameters(trainer.model).items()
            }
        )
    model = wrapped(tiny_llama(), EXPERTS, TOP2)
    first = adapter_parameters(model)
    matrices = [
        p[e] for n, p in first.items() if n[-2:] in (".A", "Bt") for e in range(3)
    ]
    norms = [(m @ m.T - torch.eye(4)).pow(2).sum().sqrt() for m in matrices]
    penalty = 3.0 * sum(norms) / len(norms)
    assert len(norms) == 24
    grads = torch.autograd.grad(penalty, list(first.values()), allow_unused=True)
    for (name, with_it), grad in zip(results[0].items(), grads, strict=True):
        moved = results[1][name] - with_it
        want = torch.zeros_like(moved) if grad is None else grad
        torch.testing.assert_close(moved, want, rtol=1e-4, atol=2e-6)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert "recipe_penalty" not in logs[0]


def test_own_groups_leave_those_of_the_run(tiny_llama: Factory, tmp_path: Path) -> None:
    trainer = made(tiny_llama, tmp_path, weight_decay=0.1)
    own = [site.experts.E for site in sites(trainer.model).values()]
    trainer.recipe.groups = lambda: [{"params": own, "lr": 0.5, "weight_decay": 0.0}]
    groups = trainer.create_optimizer().param_groups
    assert [id(p) for p in groups[-1]["params"]] == [id(p) for p in own]
    assert groups[-1]["lr"] == 0.5 and groups[0]["lr"] == 1e-2
    listed = [id(p) for group in groups for p in group["params"]]
    trained = [id(p) for p in trainer.model.parameters() if p.requires_grad]
    assert sorted(listed) == sorted(trained)


def test_own_groups_and_an_optimizer_of_the_caller(
    tiny_llama: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = made(tiny_llama, tmp_path)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    trainer.set_up_recipe(trainer.settings.recipe)
    monkeypatch.setattr(RECIPES["adalora"], "groups", lambda self: [{"params": []}])
    with pytest.raises(TrainingError, match="optimizer of your own"):
        trainer.set_up_recipe(trainer.settings.recipe)


def test_several_processes(
    tiny_llama: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = made(tiny_llama, tmp_path)
    monkeypatch.setattr(RECIPES["adalora"], "one_process", True)
    trainer.set_up_recipe(trainer.settings.recipe)
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    with pytest.raises(TrainingError, match="trains in one process"):
        trainer.set_up_recipe(trainer.settings.recipe)


@pytest.mark.parametrize(
    "optim", ["lomo", "galore_adamw_layerwise", "schedule_free_adamw"]
)
def test_optimizers_that_keep_things_to_themselves(
    tiny_llama: Factory, tmp_path: Path, optim: str
) -> None:
    with pytest.raises(TrainingError, match=f"optim '{optim}' keeps one of the two"):
        made(tiny_llama, tmp_path, optim=optim)


def test_too_few_steps_are_told_before_anything_is_loaded() -> None:
    run = {"output_dir": "out", "max_steps": 5}
    with pytest.raises(ConfigError, match="training.recipe: .* leave none of the 5"):
        run_config(RECIPE, ADALORA, training=run)
    assert run_config(RECIPE, ADALORA, training={**run, "max_steps": 6})


def test_a_second_run_begins_anew(tiny_llama: Factory, tmp_path: Path) -> None:
    trainer = made(tiny_llama, tmp_path, save_strategy="no")
    trainer.train()
    chosen = []
    choose = trainer.recipe._choose
    trainer.recipe._choose = lambda pruned: (chosen.append(pruned), choose(pruned))[1]
    trainer.train()
    assert chosen == [48 - trainer.recipe.budget(step) for step in (4, 6, 8, 9)]


def test_a_checkpoint_from_before_the_end_is_warned_of(
    tiny_llama: Factory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made(tiny_llama, tmp_path)
    assert not caplog.text
    trainer = made(tiny_llama, tmp_path)
    trainer.args.load_best_model_at_end = True
    trainer.set_up_recipe(trainer.settings.recipe)
    assert "may be one from before recipe 'adalora' was done" in caplog.text


def test_another_model(tiny_llama: Factory, tmp_path: Path) -> None:
    trainer = made(tiny_llama, tmp_path)
    trainer.model = trainer.model_wrapped = wrapped(tiny_llama(), EXPERTS, TOP2)
    with pytest.raises(TrainingError, match="another model than when it was made"):
        trainer.train()


def test_adapters_that_rows_name(tiny_llama: Factory) -> None:
    named = {"kind": "adapter", "adapters": ["sql", "b", "c"]}
    with pytest.raises(ConfigError, match="router.kind adapter trains each by itself"):
        run_config(RECIPE, EXPERTS, router=named)
    model = wrapped(tiny_llama(), EXPERTS, named)
    cls = RECIPES["adalora"]
    with pytest.raises(TrainingError, match="router.kind adapter trains each"):
        cls(cls.Config(kind="adalora"), model)


def test_a_recipe_without_its_experts(tiny_llama: Factory, tmp_path: Path) -> None:
    model = wrapped(tiny_llama(), {"kind": "lora"})
    with pytest.raises(TrainingError, match="experts of kind adalora.*has none"):
        trainer_for(model, tmp_path, RECIPE)


def test_too_few_steps(tiny_llama: Factory, tmp_path: Path) -> None:
    trainer = made(tiny_llama, tmp_path, max_steps=5)
    with pytest.raises(TrainingError, match="tinit=2 and recipe.tfinal=3.* 5 steps"):
        trainer.train()


def test_shares_of_the_run(tiny_llama: Factory) -> None:
    model = wrapped(tiny_llama(), EXPERTS, TOP2)
    cls = RECIPES["adalora"]
    config = {**RECIPE, "tinit": 0.1, "tfinal": 0.25}
    recipe: Any = cls(cls.Config.from_dict(config), model)
    recipe.begin(30)
    assert (recipe.start, recipe.end) == (3, 30 - 7)
    assert recipe.budget(3) == recipe.initial > recipe.budget(4)
    assert recipe.budget(10) > recipe.budget(23) == recipe.target


@pytest.mark.parametrize(("had", "has"), [(RECIPE, None), (None, RECIPE)])
def test_resuming_with_another_recipe(
    tiny_llama: Factory, tmp_path: Path, had: Any, has: Any
) -> None:
    made(tiny_llama, tmp_path, recipe=had, max_steps=6).train()
    told = "with training.recipe (adalora|none), and this one has (adalora|none)"
    with pytest.raises(CheckpointError, match=told):
        made(tiny_llama, tmp_path, recipe=has).train(resume_from_checkpoint=True)


def test_changed_settings_are_told(
    tiny_llama: Factory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made(tiny_llama, tmp_path, max_steps=12).train()
    changed = {**RECIPE, "beta1": 0.5}
    path = str(tmp_path / "checkpoint-6")
    made(tiny_llama, tmp_path, recipe=changed).train(resume_from_checkpoint=path)
    assert "recipe changed since the checkpoint" in caplog.text


ADALORA = {"kind": "adalora", "init_r": 6}


@pytest.mark.parametrize(
    ("recipe", "experts", "told"),
    [
        (RECIPE, {"kind": "lora"}, "training.recipe: adalora trains experts of kind"),
        ({"kind": "adalore"}, ADALORA, "training.recipe.kind: .*mean 'adalora'"),
        ({"target_r": 2}, ADALORA, r"training.recipe.kind: this field is required"),
        ({"kind": "adalora", "t_init": 1}, ADALORA, "recipe.t_init: .*mean 'tinit'"),
        ({"kind": "adalora", "beta1": 1.0}, ADALORA, "training.recipe.beta1: "),
        ({"kind": "adalora", "tinit": -1}, ADALORA, "training.recipe.tinit: "),
        ({"kind": "adalora", "tinit": 1.5}, ADALORA, "recipe.tinit: give whole steps"),
        ("adalora", ADALORA, "training.recipe: "),
        ({"kind": "adalora", "target_r": 7}, ADALORA, "target_r=7 is above .*init_r=6"),
        (
            {"kind": "adalora", "target_r": 7},
            {"kind": "dora", "inner": ADALORA},
            "target_r=7 is above .*init_r=6",
        ),
        (
            {"kind": "adalora", "target_r": 2},
            {**ADALORA, "shared": {"A": "type"}},
            "share A or B among the experts",
        ),
        (
            {"kind": "adalora", "target_r": 2},
            {**ADALORA, "num_experts": 2, "shared": ["E"]},
            "share A or B among the experts",
        ),
    ],
)
def test_what_a_config_refuses(recipe: Any, experts: Any, told: str) -> None:
    more = {"router": TOP2} if experts.get("num_experts") else {}
    with pytest.raises(ConfigError, match=told):
        run_config(recipe, experts, **more)


def test_experts_inside_of_others_are_found(tiny_llama: Factory) -> None:
    inner = {"kind": "dora", "inner": {"kind": "adalora", "init_r": 4}}
    assert run_config({"kind": "adalora", "target_r": 2}, inner)
    model = wrapped(tiny_llama(), inner)
    cls = RECIPES["adalora"]
    recipe: Any = cls(cls.Config.from_dict({"kind": "adalora", "target_r": 2}), model)
    assert len(recipe.parts) == 4
    assert all(path.endswith(".experts.inner") for path in recipe.parts)


def test_settings_know_every_recipe() -> None:
    for name, entry in RECIPES.entries().items():
        settings = MoloraTrainingSettings.from_dict({"recipe": {"kind": name}})
        assert settings.recipe == entry.cls.Config(kind=name)
        assert settings.to_dict()["recipe"]["kind"] == name
        assert re.match(r"arXiv:\d{4}\.\d{5}$", entry.paper) and entry.limitations


def test_own_loops_need_no_trainer(tiny_llama: Factory) -> None:
    model = wrapped(tiny_llama(), EXPERTS, TOP2)
    cls = RECIPES["adalora"]
    recipe = cls(cls.Config.from_dict({**RECIPE, "tfinal": 1}), model)
    recipe.begin(4)
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-2)
    ids = torch.randint(3, 128, (2, 8), generator=torch.Generator().manual_seed(0))
    for step in range(1, 5):
        model(ids, labels=ids).loss.backward()
        recipe.after_backward()
        recipe.before_step(step)
        optimizer.step()
        recipe.after_step(step, optimizer)
        optimizer.zero_grad()
    experts: list[Any] = [site.experts for site in sites(model).values()]
    assert sum(int(part.E.count_nonzero()) for part in experts) == 24
