"""AFLoRA's freezing against the recorded run of its authors, and in the trainer."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainingArguments,
)

import molora
from molora.errors import ConfigError, TrainingError
from molora.model import adapter_parameters, sites
from molora.run_config import RunConfig
from molora.training import MoloraTrainer, MoloraTrainingSettings
from molora.training.recipes import RECIPES
from molora.training.state import read_state
from tests.oracle import near
from tests.traces import begun, hyper

TENSORS = {"A": "A", "B": "Bt", "s_d": "lambda_d", "s_u": "lambda_b"}
FROZEN = {"A": "frozen", "B": "frozen"}


def stored(values: Tensor, name: str) -> Tensor:
    """One tensor of the trace as the experts keep it."""
    return (values.mT if name == "B" else values)[None]


def same(got: Tensor, want: Tensor, what: str) -> bool:
    """Near in proportion: scores are far below 1."""
    size = float(want.abs().max()) or 1.0
    return near(got / size, want / size, what)


def recipe_for(model: Any, **settings: Any) -> Any:
    cls = RECIPES["aflora"]
    return cls(cls.Config.from_dict({"kind": "aflora"} | settings), model)


def trainable(recipe: Any) -> list[str]:
    return [name for name in recipe.units if recipe._parameter(name).requires_grad]


def started() -> tuple[Any, Any, dict[str, Tensor], dict[str, Any]]:
    h = hyper("aflora_trace")
    epoch = h["total_step"] // h["num_train_epochs"]
    model, t = begun("aflora_trace", {"kind": "aflora", "r": h["r"]})
    for path, name, mine, experts in parameters(model):
        getattr(experts, mine).data.copy_(stored(t[f"init/{path}.{name}"], name))
        if f"{path}.{name}" in h["frozen_from_start"]:
            experts.frozen = (*experts.frozen, mine)
            getattr(experts, mine).requires_grad_(False)
    settings = {name: h[name] for name in ("deltaT", "beta1", "beta2")}
    settings["tinit"] = h["initial_warmup"] * epoch
    settings["tfinal"] = h["final_warmup"] * epoch
    return model, recipe_for(model, **settings), t, h


def parameters(model: Any) -> list[tuple[str, str, str, Any]]:
    """Layer, name there, name here and experts of every tensor of the trace."""
    return [
        (path, name, mine, site.experts)
        for path, site in sites(model).items()
        for name, mine in TENSORS.items()
    ]


def test_every_step_is_that_of_the_authors() -> None:
    model, recipe, t, h = started()
    recipe.begin(h["total_step"])
    moved = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moved, lr=h["lr"], weight_decay=0.0)
    compared = 0
    for at in range(h["total_step"]):
        optimizer.zero_grad()
        model().backward()
        for path, name, mine, experts in parameters(model):
            value = getattr(experts, mine)
            grad = torch.zeros_like(value) if value.grad is None else value.grad
            assert near(value.detach(), stored(t[f"value/{path}.{name}"][at], name))
            assert near(grad, stored(t[f"grad/{path}.{name}"][at], name))
        still = trainable(recipe)
        recipe.before_step(at + 1)
        assert trainable(recipe) == still
        # the authors' run stops to look once nothing is left
        if (retention := float(t["threshold"][at])) >= 0:
            assert recipe.retention(at + 1) == pytest.approx(retention, abs=1e-12)
        for path, name, mine, _ in parameters(model):
            kinds = ("ipt", "exp_avg_ipt", "exp_avg_unc")
            means = recipe._measured.get(f"{path}.experts.{mine}", ())
            for kind, got in zip(kinds, means, strict=False):
                want = stored(t[f"{kind}/{path}.{name}"][at], name)
                assert same(got, want, f"{kind} {path}.{name} {at}")
                compared += 1
        optimizer.step()
        recipe.after_step(at + 1, optimizer)
        for path, name, mine, experts in parameters(model):
            is_trained = bool(t[f"trainable/{path}.{name}"][at])
            assert getattr(experts, mine).requires_grad == is_trained
        units = ("l0.A", "l0.B", "l1.A", "l1.B")
        wanted = sum(int(t[f"trainable/{unit}"][at]) for unit in units)
        assert recipe.log() == {"trained_tensors": wanted}
    # A and B of the first layer in ten steps, of the second in thirteen
    assert compared == 3 * 2 * (10 + 13)


class Layers(nn.Module):
    """Linear layers side by side, of these sizes."""

    def __init__(self, *shapes: tuple[int, int]):
        super().__init__()
        self.shapes = shapes
        for i, (wide, high) in enumerate(shapes):
            self.add_module(f"l{i}", nn.Linear(wide, high))

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        """Sum of squares, so that every layer matters by its own input."""
        parts = [
            layer(inputs_embeds[..., : self.shapes[i][0]]).square().mean() * 10**i
            for i, layer in enumerate(self.children())
        ]
        return torch.stack(parts).sum()


def layers(*shapes: tuple[int, int], train: str = "all", **experts: Any) -> Any:
    torch.manual_seed(0)
    count = experts.get("num_experts", 1)
    raw: dict[str, Any] = {
        "target_modules": [f"l{i}" for i in range(len(shapes))],
        "experts": {"kind": "aflora", "r": 2} | experts,
        "train": train,
    }
    if count > 1:
        raw["router"] = {"kind": "topk", "top_k": 2}
    model = molora.wrap(Layers(*shapes), molora.AdapterConfig.from_dict(raw)).double()
    for name, values in adapter_parameters(model).items():
        if name.endswith("lambda_b"):
            values.data.normal_()
    return model


def by_hand(
    history: list[dict[str, Tensor]], total: int, config: Any
) -> dict[str, int]:
    """The step, from 0, in which each unit is frozen, from the gradients of all steps.

    Every mean is computed from the beginning, entry lists are plain Python.
    """
    end = total - config.tfinal
    gone: dict[str, int] = {}
    for t in range(total):
        scores = {}
        for name in history[0]:
            if name in gone:
                continue
            mean = spread = torch.zeros_like(history[0][name])
            for start in range(0, t - t % config.deltaT, config.deltaT):
                rows = [history[i][name].abs() for i in range(start, t)]
                now = sum(rows[: config.deltaT]) / config.deltaT
                mean = config.beta1 * mean + (1 - config.beta1) * now
                off = (now - mean).abs()
                spread = config.beta2 * spread + (1 - config.beta2) * off
            scores[name] = mean * spread
        if t >= end:
            gone |= dict.fromkeys(scores, t)
        elif t > config.tinit and t % config.deltaT == 0 and scores:
            kept = (1 - (t - config.tinit) / (end - config.tinit)) ** 3
            entries = sorted(x for s in scores.values() for x in s.flatten().tolist())
            k = int(len(entries) * (1 - kept))
            for name, score in scores.items():
                if k and float(score.mean()) < entries[k - 1]:
                    gone[name] = t
    return gone


def frozen_steps(
    model: Any, recipe: Any, total: int, width: int = 6
) -> tuple[dict[str, int], list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Train, and note when each unit is frozen, its gradients and its values."""
    recipe.begin(total)
    moved = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moved, lr=1e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(3)
    gone: dict[str, int] = {}
    grads: list[dict[str, Tensor]] = []
    values: list[dict[str, Tensor]] = []
    for t in range(total):
        found = {name: recipe._parameter(name) for name in recipe.units}
        values.append({name: p.detach().clone() for name, p in found.items()})
        x = torch.randn(5, width, generator=generator, dtype=torch.float64)
        model(inputs_embeds=x).backward()
        zero = torch.zeros(())
        grads.append(
            {n: zero if p.grad is None else p.grad.clone() for n, p in found.items()}
        )
        recipe.before_step(t + 1)
        optimizer.step()
        recipe.after_step(t + 1, optimizer)
        for name, p in found.items():
            if not p.requires_grad:
                gone.setdefault(name, t)
        # gradients that stay as zeros would let momentum and decay go on
        optimizer.zero_grad(set_to_none=False)
    return gone, grads, values


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("tfinal", [0, 3])
def test_units_freeze_as_worked_by_hand(experts: int, tfinal: int) -> None:
    total = 21
    model = layers((6, 4), (5, 3), (4, 4), num_experts=experts)
    recipe = recipe_for(model, tinit=3, tfinal=tfinal, deltaT=4)
    gone, grads, values = frozen_steps(model, recipe, total)
    wanted = by_hand(grads, total, recipe.config)
    assert gone == wanted
    assert len(set(gone.values())) > 1
    assert all(t > 3 for t in gone.values())
    if tfinal:
        assert len(gone) == len(recipe.units) == 6
        assert recipe.log() == {"trained_tensors": 0}
    for name, at in gone.items():
        # all experts of a layer move in the step that freezes them, and never again
        for e in range(experts):
            before, after = values[at][name][e], values[-1][name][e]
            if at + 1 < total:
                assert not torch.equal(before, values[at + 1][name][e])
                assert torch.equal(values[at + 1][name][e], after)
    for site in sites(model).values():
        assert site.experts.lambda_d.requires_grad
        assert site.experts.lambda_b.requires_grad


def test_retention_at_the_corners() -> None:
    recipe = recipe_for(layers((6, 4)), tinit=2, tfinal=3, deltaT=1)
    recipe.begin(9)
    got = [recipe.retention(step) for step in range(1, 10)]
    cubes = [(3 / 4) ** 3, (2 / 4) ** 3, (1 / 4) ** 3]
    assert got == [1, 1, 1, *cubes, 0, 0, 0]


def test_all_is_frozen_in_the_end_whatever_its_score() -> None:
    """Without a gradient every score is zero, and no mean is below another."""
    model = layers((6, 4), (5, 3))
    recipe = recipe_for(model, tinit=1, tfinal=2, deltaT=4)
    recipe.begin(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, 9):
        recipe.before_step(step)
        recipe.after_step(step, optimizer)
        assert recipe.log() == {"trained_tensors": 4 if step < 7 else 0}


def test_a_step_that_was_left_out_is_in_no_mean() -> None:
    """The first of a window is: the next one closes the window in its place."""
    recipe = recipe_for(layers((3, 2)), tinit=0, tfinal=1, deltaT=3)
    recipe.begin(12)
    values = recipe._parameter("l0.experts.A")
    optimizer = torch.optim.SGD([values], lr=0.0)
    for step in (1, 2, 3, 5, 6):
        values.grad = torch.full_like(values, -float(step))
        recipe.before_step(step)
        if step == 5:
            now, mean, spread = recipe._measured["l0.experts.A"]
            assert near(now, torch.full_like(values, 5.0))
            assert near(mean, torch.full_like(values, 0.15 * 2))
            assert near(spread, torch.full_like(values, 0.05 * (2 - 0.15 * 2)))
        recipe._due = []
        recipe.after_step(step, optimizer)
    assert near(recipe._measured["l0.experts.A"][0], torch.full_like(values, 5.5))


def test_scores_of_small_floats_are_kept_in_float32() -> None:
    model = layers((6, 4)).bfloat16()
    recipe = recipe_for(model, tinit=1, tfinal=1, deltaT=2)
    recipe.begin(8)
    kinds = {part.dtype for parts in recipe._measured.values() for part in parts}
    assert kinds == {torch.float32}


def test_a_tensor_that_layers_share_is_one_unit() -> None:
    model = layers((6, 4), (5, 3), shared={"A": "model"})
    recipe = recipe_for(model, tinit=1, tfinal=2, deltaT=2)
    assert recipe.units == ["l0.experts.A", "l0.experts.Bt", "l1.experts.Bt"]
    gone, grads, _ = frozen_steps(model, recipe, 12)
    assert gone == by_hand(grads, 12, recipe.config)
    both = sites(model)["l1"].experts.value("A")
    assert not both.requires_grad


def test_what_is_frozen_from_the_start_is_no_unit() -> None:
    model = layers((6, 4), (5, 3), trainability={"A": "frozen"})
    recipe = recipe_for(model, tinit=1, tfinal=2, deltaT=2)
    assert recipe.units == ["l0.experts.Bt", "l1.experts.Bt"]
    recipe.begin(12)
    assert not sites(model)["l0"].experts.A.requires_grad
    seeded = layers((6, 4), trainability={"B": "seeded"})
    assert recipe_for(seeded).units == ["l0.experts.A"]


# --- refusals


@pytest.mark.parametrize("train", ["newest", "router"])
def test_a_model_whose_projections_are_not_trained(train: str) -> None:
    model = layers((6, 4), num_experts=2, train=train)
    with pytest.raises(
        TrainingError, match=f"adapter.train is {train}; set train: all"
    ):
        recipe_for(model)


def test_projections_that_are_all_frozen() -> None:
    with pytest.raises(TrainingError, match=r"freezes A and B.*trainability"):
        recipe_for(layers((6, 4), trainability=FROZEN))


def test_a_model_that_an_earlier_recipe_froze() -> None:
    model = layers((6, 4), (5, 3))
    recipe = recipe_for(model, tinit=1, tfinal=2, deltaT=2)
    frozen_steps(model, recipe, 8)
    with pytest.raises(TrainingError, match=r"l0.experts.A is not trained.*earlier"):
        recipe_for(model)
    recipe.begin(8)
    assert trainable(recipe) == recipe.units
    fresh = recipe_for(model, tinit=1, tfinal=2, deltaT=2)
    fresh.begin(8)
    assert_same(recipe.state(), fresh.state())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"tinit": 4, "tfinal": 4}, r"recipe.tinit=4 and recipe.tfinal=4.* 8 steps"),
        ({"tinit": 9}, "recipe.tinit=9"),
        ({"tinit": 4, "tfinal": 1, "deltaT": 4}, "recipe.deltaT=4: no window"),
        ({"deltaT": 8}, "recipe.deltaT=8: no window"),
    ],
)
def test_a_run_too_short(settings: dict[str, int], reason: str) -> None:
    recipe = recipe_for(layers((6, 4)), **settings)
    with pytest.raises(TrainingError, match=reason):
        recipe.begin(8)
    recipe.begin(80)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"tinit": -1}, "tinit"),
        ({"tfinal": -1}, "tfinal"),
        ({"deltaT": 0}, "deltaT"),
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": 0.0}, "beta2"),
        ({"final_threshold": 0.1}, "final_threshold"),
    ],
)
def test_settings_that_mean_nothing(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        RECIPES["aflora"].Config.from_dict({"kind": "aflora"} | settings)


def run_config(**adapter: Any) -> RunConfig:
    raw: dict[str, Any] = {
        "model": {"name": "x"},
        "data": {"tasks": [{"name": "a", "train": "a.jsonl"}]},
        "training": {"output_dir": "o", "recipe": {"kind": "aflora"}},
    }
    experts = {"target_modules": ["q_proj"], "experts": {"kind": "aflora"}}
    return RunConfig.from_dict(raw | {"adapter": experts | adapter})


def test_a_config_that_leaves_nothing_to_freeze() -> None:
    square = {"match": "q_proj", "experts": {"trainability": FROZEN}}
    run_config(overrides=[square])
    with pytest.raises(ConfigError, match=r"training.recipe: .*trains experts of kind"):
        run_config(experts={"kind": "vera"})
    with pytest.raises(ConfigError, match=r"training.recipe: .*leaves neither"):
        run_config(experts={"kind": "aflora", "trainability": FROZEN})
    routed = {"kind": "aflora", "num_experts": 3}
    router = {"kind": "topk", "top_k": 2}
    for train in ("router", "newest"):
        with pytest.raises(ConfigError, match=f"adapter.train is {train}"):
            run_config(experts=routed, router=router, train=train)


# --- in the trainer


class Batches(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """24 rows of tokens."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, 64, (24, 6), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


class Watch(TrainerCallback):
    """Notes how many tensors train in each forward, and spoils gradients."""

    def __init__(self, model: Any, spoil: set[int]):
        self.model, self.spoil = model, spoil
        self.trained: list[int] = []
        first = next(
            p for n, p in adapter_parameters(model).items() if n.endswith("lambda_d")
        )
        first.register_hook(lambda g: g * float("nan") if self.bad else g)
        self.bad = False

    def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        self.bad = state.global_step in self.spoil
        moved = adapter_parameters(self.model).values()
        self.trained.append(sum(p.requires_grad for p in moved))


def tiny_base() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    marks = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **heads, **marks))


def tiny(experts: int = 3) -> Any:
    raw: dict[str, Any] = {
        "target_modules": ["q_proj", "up_proj", "down_proj"],
        "experts": {"kind": "aflora", "num_experts": experts, "lora_dropout": 0.2},
        "overrides": [{"match": "q_proj", "experts": {"trainability": FROZEN}}],
    }
    if experts > 1:
        raw["router"] = {"kind": "topk", "top_k": 2, "noise": 0.5}
    return molora.wrap(tiny_base(), molora.AdapterConfig.from_dict(raw))


RECIPE = {"kind": "aflora", "tinit": 2, "tfinal": 3, "deltaT": 2}


def trainer_for(folder: Path, **changes: Any) -> MoloraTrainer:
    model = changes.pop("model", None) or tiny()
    spoil = changes.pop("spoil", set())
    recipe = changes.pop("recipe", RECIPE)
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 12,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    trainer = MoloraTrainer(
        model=model,
        args=TrainingArguments(**defaults | changes),
        train_dataset=Batches(),
        settings=MoloraTrainingSettings.from_dict({"recipe": recipe}),
    )
    trainer.watch = Watch(model, spoil)  # type: ignore[attr-defined]
    trainer.add_callback(trainer.watch)  # type: ignore[attr-defined]
    return trainer


def outcome(trainer: Any) -> dict[str, Any]:
    """What must not depend on whether the run was stopped, gradient norms included."""
    names = ("loss", "grad_norm", "trained_tensors", "learning_rate", "step")
    logs = [
        {name: log[name] for name in names}
        for log in trainer.state.log_history
        if "loss" in log
    ]
    parameters = adapter_parameters(trainer.model).items()
    return {
        "adapter": {n: p.data.clone() for n, p in parameters},
        "trained": {n: p.requires_grad for n, p in parameters},
        "optimizer": trainer.optimizer.state_dict(),
        "recipe": trainer.recipe.state(),
        "logs": logs,
    }


def assert_same(got: Any, wanted: Any, place: str = "") -> None:
    """Equal bit for bit; NaN equals NaN."""
    if isinstance(wanted, Tensor):
        torch.testing.assert_close(
            got, wanted, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{place}: {m}"
        )
    elif isinstance(wanted, dict):
        assert got.keys() == wanted.keys(), place
        for key, value in wanted.items():
            assert_same(got[key], value, f"{place}.{key}")
    elif isinstance(wanted, list | tuple):
        assert len(got) == len(wanted), place
        for i, (one, other) in enumerate(zip(got, wanted, strict=True)):
            assert_same(one, other, f"{place}[{i}]")
    else:
        assert got == wanted or (got != got and wanted != wanted), place


def saved(folder: Path, step: int) -> Any:
    """The recipe's state in a checkpoint."""
    return read_state(folder / f"checkpoint-{step}", "progress")["recipe"]["state"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """12 steps without a stop, the fourth left out; a checkpoint after each."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = trainer_for(folder, spoil={3})
    trainer.train()
    return folder, trainer


def test_trained_tensors_fall_in_the_log(whole_run: tuple[Path, Any]) -> None:
    _, trainer = whole_run
    logs = [log for log in trainer.state.log_history if "loss" in log]
    counts = [int(log["trained_tensors"]) for log in logs]
    # up_proj and down_proj of two layers; t = 4 is the first choice, t = 9 the end
    assert counts[:4] == [8] * 4
    assert counts == sorted(counts, reverse=True)
    assert counts[9:] == [0, 0, 0]
    assert any(0 < count < 8 for count in counts)
    others = trainer.watch.trained[0] - 8
    assert trainer.watch.trained == [others + c for c in [8, *counts[:-1]]]
    frozen = trainer.recipe.state()["frozen"]
    assert len(frozen) == 8 and not trainer.recipe.state()["measured"]
    steps = trainer.optimizer.state_dict()["state"].values()
    assert len({int(s["step"]) for s in steps}) > 2


# before anything is frozen; after the step left out; inside a window with some of it
# frozen; with all of it frozen
@pytest.mark.parametrize("step", [2, 4, 5, 10])
def test_resumed_run_equals_the_whole_one(
    whole_run: tuple[Path, Any], tmp_path: Path, step: int
) -> None:
    folder, trainer = whole_run
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    shutil.copy(folder / "routing_log.jsonl", tmp_path)
    torch.manual_seed(99)
    resumed: Any = trainer_for(tmp_path, spoil={3})
    resumed.train(resume_from_checkpoint=True)
    assert_same(outcome(resumed), outcome(trainer))
    assert resumed.watch.trained == trainer.watch.trained[step:]
    for later in range(step + 1, 13):
        assert_same(*(saved(part, later) for part in (tmp_path, folder)))


def test_a_checkpoint_names_what_is_frozen(whole_run: tuple[Path, Any]) -> None:
    states = [saved(whole_run[0], step) for step in range(1, 13)]
    assert states[0]["frozen"] == []
    assert set(states[0]["measured"]) == set(whole_run[1].recipe.units)
    assert 0 < len(states[4]["frozen"]) < len(whole_run[1].recipe.units)
    for state in states:
        both = {*state["frozen"], *state["measured"]}
        assert both == set(whole_run[1].recipe.units)
    assert states[-1]["measured"] == {}


class Stop(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, a: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


def test_the_same_trainer_goes_back_and_on(tmp_path: Path) -> None:
    """Stopped with all frozen, it goes on from before; then it starts anew."""
    trainer: Any = trainer_for(tmp_path, model=tiny(1))
    stop = Stop(11)
    trainer.add_callback(stop)
    trainer.train()
    assert trainer.recipe.log() == {"trained_tensors": 0}
    assert not any(
        trainer.recipe._parameter(n).requires_grad for n in trainer.recipe.units
    )
    trainer.remove_callback(stop)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    got = outcome(trainer)
    plain: Any = trainer_for(tmp_path / "plain", model=tiny(1))
    plain.train()
    wanted = outcome(plain)
    assert_same(got["adapter"], wanted["adapter"])
    assert_same(got["recipe"], wanted["recipe"])
    assert_same(got["logs"], wanted["logs"])

    trainer.watch.trained.clear()
    before = trainer.watch.trained
    trainer.train()
    others = sum(v for v in got["trained"].values())
    assert before[:3] == [others + 8] * 3
    assert before[-1] == others


def test_a_step_is_of_the_optimizer_not_of_a_batch(tmp_path: Path) -> None:
    """Two batches of two rows are one of four, and the windows with them."""
    runs = []
    for parts, rows in ((2, 2), (1, 4)):
        model = tiny(1)
        for site in sites(model).values():
            site.experts.lora_dropout = 0.0
        trainer: Any = trainer_for(
            tmp_path / str(parts),
            model=model.double(),
            gradient_accumulation_steps=parts,
            per_device_train_batch_size=rows,
            save_strategy="no",
            optim="sgd",
            max_steps=6,
            recipe=RECIPE | {"tinit": 1, "tfinal": 1, "deltaT": 4},
        )
        trainer.add_callback(Stop(4))
        trainer.train()
        runs.append(trainer.recipe.state()["measured"])
    assert runs[0].keys() == runs[1].keys() and runs[0]
    for name, parts in runs[0].items():
        assert parts[0].any()
        for one, other in zip(parts, runs[1][name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-14)


def test_a_second_process_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(tmp_path)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(TrainingError, match="trains in one process"):
        trainer.set_up_recipe(trainer.settings.recipe)


def test_a_saved_adapter_trains_anew(tmp_path: Path) -> None:
    trainer: Any = trainer_for(tmp_path, max_steps=9, save_strategy="no")
    trainer.train()
    frozen = adapter_parameters(trainer.model)
    trainer.model.save_pretrained(tmp_path / "done")
    model: Any = molora.load(tiny_base(), tmp_path / "done", trainable=True)
    assert recipe_for(model).units == trainer.recipe.units
    for name, values in adapter_parameters(model).items():
        assert torch.equal(values, frozen[name])
