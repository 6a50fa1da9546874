"""RoSA's schedule by the authors' numbers, the choice of places, exact resume."""

import functools
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback, TrainingArguments

import molora
from molora.errors import TrainingError
from molora.model import adapter_parameters, sites
from molora.training import Collator, MoloraTrainer, MoloraTrainingSettings, TaskMixture
from molora.training.mixture import TaskRows
from molora.training.recipes import RECIPES
from molora.training.recipes.rosa import RoSA
from tests.oracle import load, near
from tests.traces import hyper

LOW = {"kind": "lora", "r": 2, "lora_alpha": 4.0}
FEW = {"kind": "sparse", "density": 0.1, "exact": True}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe_of(model: nn.Module, **settings: Any) -> Any:
    cls = RECIPES["rosa"]
    return cls(cls.Config.from_dict({"kind": "rosa", **settings}), model)


class Chain(nn.Module):
    """Two layers; no gradient is asked of what the first one reads."""

    def __init__(self, sizes: dict[str, list[int]]):
        super().__init__()
        torch.manual_seed(0)
        for name, (wide, out) in sizes.items():
            self.add_module(name, nn.Linear(wide, out))

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        first, second = self.children()
        y: Tensor = second(F.silu(first(inputs_embeds)))
        return y


def wrapped_chain(
    parts: list[Any],
    E: int = 1,
    router: Any = None,
    sizes: Any = None,
    dtype: torch.dtype = torch.float64,
) -> Any:
    sizes = sizes or {"lin": [12, 10], "out": [10, 6]}
    experts = {"kind": "sum", "parts": parts} if len(parts) > 1 else parts[0]
    raw = {
        "target_modules": list(sizes),
        "experts": {**experts, "num_experts": E},
        "router": router or {"kind": "none"},
    }
    config = molora.AdapterConfig.from_dict(raw)
    return molora.wrap(Chain(sizes).to(dtype), config).to(dtype).train()


def sparse_of(site: Any) -> Any:
    """The sparse part of a site; there is one."""
    (found,) = (
        m for m in site.experts.modules() if type(m).__name__ == "SparseExperts"
    )
    return found


def dense(site: Any, expert: int = 0) -> Tensor:
    part = sparse_of(site)
    found: Tensor = part.delta_weight(expert, site.base.weight)
    return found


@pytest.mark.parametrize("swapped", [False, True])
def test_every_step_is_that_of_the_authors(swapped: bool) -> None:
    t, h = load("rosa_trace"), hyper("rosa_trace")
    assert h["schedule"] == "wl2"
    low = {"kind": "lora", "r": h["r"], "lora_alpha": h["alpha"]}
    few = {"kind": "sparse", "density": h["density"], "exact": True}
    parts = [few, low] if swapped else [low, few]
    model = wrapped_chain(parts, sizes=h["layers"])
    for path, site in sites(model).items():
        site.base.weight.data.copy_(t[f"{path}/base.weight"])
        site.base.bias.data.copy_(t[f"{path}/base.bias"])
        mine: Any = site.experts.parts[int(swapped)]
        mine.A.data.copy_(t[f"{path}/init.A"][None])
        mine.Bt.data.copy_(t[f"{path}/init.B"].t()[None])
    recipe = recipe_of(
        model,
        warmup_steps=2,
        grad_steps=h["spa_num_grads"],
        statistic=h["grad_acc_mode"],
    )
    recipe.begin(h["steps"])
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=h["lr"]
    )
    collected: dict[str, Tensor] = {}
    choose = recipe._choose

    def spied() -> None:
        for path, scores in recipe.scores().items():
            collected[path.partition(".")[0]] = scores[0]
        choose()

    recipe._choose = spied
    for at in range(h["steps"]):
        recipe.start_step(at + 1)
        loss = (model(t["x"][at]) - t["target"][at]).square().mean()
        assert near(loss.detach(), t["loss"][at], "loss")
        loss.backward()
        assert recipe.after_backward() is None
        recipe.before_step(at + 1)
        trained = [sparse_of(site).values.grad is not None for site in all_of(model)]
        assert trained == [bool(t["agenda"][at][2])] * 2
        optimizer.step()
        recipe.after_step(at + 1, optimizer)
        optimizer.zero_grad()
        lora, collects, sparse = t["agenda"][at].tolist()
        assert recipe.log() == {"sparse_phase": 2 * sparse + collects} and lora
        for path, site in sites(model).items():
            mine = site.experts.parts[int(swapped)]
            assert near(mine.A.detach()[0], t[f"{path}/A"][at], "A")
            assert near(mine.Bt.detach()[0].t(), t[f"{path}/B"][at], "B")
            assert near(dense(site), t[f"{path}/S"][at], "S")
        assert len(collected) == (2 if at >= 2 else 0)
    for path, site in sites(model).items():
        assert near(collected[path], t[f"{path}/collected"], "collected")
        mask = torch.zeros_like(t[f"{path}/mask"]).flatten()
        mask[sparse_of(site).indices[0].long()] = True
        assert torch.equal(mask.view_as(t[f"{path}/mask"]), t[f"{path}/mask"])
    assert recipe._sums == {} and not recipe._hooks


def all_of(model: Any) -> list[Any]:
    return list(sites(model).values())


def mean(model: Any, batches: Any) -> Tensor:
    return torch.stack([model(x).square().mean() for x in batches]).mean()


def taken(model: Any, recipe: Any, step: int, batches: Any, optimizer: Any) -> None:
    """One step of a loop of one's own."""
    recipe.start_step(step)
    for x in batches:
        (mean(model, [x]) / len(batches)).backward()
    recipe.after_backward()
    recipe.before_step(step)
    optimizer.step()
    recipe.after_step(step, optimizer)
    optimizer.zero_grad()


def dense_gradient(model: Any, path: str, loss: Any) -> Tensor:
    """[E, O, I] by autograd, with a dense update of zero beside every expert's own."""
    site: Any = sites(model)[path]
    shape = site.experts.num_experts, site.out_features, site.in_features
    S = torch.zeros(*shape, dtype=torch.float64, requires_grad=True)

    def add(_: Any, given: Any, y: Tensor) -> Tensor:
        x, gates = given[:2]
        if gates is None:
            gates = x.new_ones(len(x), 1)
        return y + torch.einsum("te,eoi,ti->to", gates, S, x)

    hook = sparse_of(site).register_forward_hook(add)
    (found,) = torch.autograd.grad(loss(), S)
    hook.remove()
    return found


@pytest.mark.parametrize("statistic", ["mean_squared", "mean"])
@pytest.mark.parametrize("top_k", [2, None])
def test_a_mixture_collects_the_gradient_of_every_expert(
    statistic: str, top_k: int | None
) -> None:
    soft = {"kind": "soft", "init_range": 1.0}
    router = soft if top_k is None else {"kind": "topk", "top_k": 2, "init_range": 1.0}
    model = wrapped_chain([LOW, FEW], E=4, router=router)
    for site in all_of(model):
        site.experts.parts[0].Bt.data.normal_()
    recipe = recipe_of(model, warmup_steps=1, grad_steps=3, statistic=statistic)
    recipe.begin(9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 2, 7, 12, generator=generator, dtype=torch.float64)
    # cut into batches of unlike sizes
    cuts = [[b] for b in x]
    cuts[2] = [x[2][:1], x[2][1:]]
    taken(model, recipe, 1, cuts[0], optimizer)
    assert recipe.scores() == {}
    totals: dict[str, Tensor] = {}
    for step in (2, 3, 4):
        batches = cuts[step - 1]
        for path in sites(model):
            grad = dense_gradient(model, path, functools.partial(mean, model, batches))
            value = grad.square() if statistic == "mean_squared" else grad
            totals[path] = totals.get(path, 0) + value
        before = {
            path: sparse_of(s).indices.clone() for path, s in sites(model).items()
        }
        taken(model, recipe, step, batches, optimizer)
        if step < 4:
            for path, scores in recipe.scores().items():
                want = totals[path.partition(".")[0]] / (step - 1)
                assert near(torch.stack(scores), want, path)
            for path, site in sites(model).items():
                assert torch.equal(before[path], sparse_of(site).indices)
    for path, site in sites(model).items():
        part = sparse_of(site)
        assert part.values.abs().sum() == 0
        n = part.indices.shape[1]
        for e in range(4):
            want = totals[path][e].abs().flatten().topk(n).indices.sort().values
            assert torch.equal(part.indices[e].long(), want)
    assert len({tuple(i.tolist()) for i in part.indices}) > 1
    taken(model, recipe, 5, cuts[4], optimizer)
    assert all(sparse_of(site).values.abs().sum() > 0 for site in all_of(model))


def test_an_expert_that_is_not_used_keeps_its_places(
    caplog: pytest.LogCaptureFixture,
) -> None:
    router = {"kind": "topk", "top_k": 1, "renormalize": False}
    model = wrapped_chain([LOW, FEW], E=3, router=router)
    for site in all_of(model):
        # out of reach of positive inputs
        site.router.gate.weight.data[2] = -100.0
    first = all_of(model)[0]
    had = sparse_of(first).indices.clone()
    recipe = recipe_of(model, warmup_steps=0)
    recipe.begin(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x = torch.rand(2, 5, 12, dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        taken(model, recipe, 1, [x], optimizer)
    now = sparse_of(first).indices
    kept = [torch.equal(now[e], had[e]) for e in range(3)]
    assert kept[2] and not all(kept)
    assert re.search("used by no token", caplog.text)


def test_no_gradient_of_the_input_and_half_precision() -> None:
    """bfloat16 collects in float32; autocast and evaluation change nothing of it."""
    model = wrapped_chain([LOW, FEW], dtype=torch.bfloat16)
    recipe = recipe_of(model, warmup_steps=0, grad_steps=2)
    recipe.begin(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(2, 5, 12).bfloat16()
    taken(model, recipe, 1, [x], optimizer)
    once = recipe.scores()
    assert len(once) == 2
    assert all(s.dtype == torch.float32 for (s,) in once.values())
    recipe.start_step(2)
    with torch.no_grad():
        model.eval()(x)
    model.train()(x).square().mean().backward()
    with torch.no_grad():
        model(x)
    recipe.after_backward()
    seen: dict[str, Any] = {}
    recipe._choose = lambda: seen.update(recipe.scores())
    recipe.after_step(2, optimizer)
    for path, (score,) in seen.items():
        assert torch.equal(score, once[path][0]), path
    wide = wrapped_chain([LOW, FEW], dtype=torch.float32)
    for site, other in zip(all_of(wide), all_of(model), strict=True):
        site.experts.load_state_dict(other.experts.state_dict())
    recipe = recipe_of(wide, warmup_steps=0, grad_steps=2)
    recipe.begin(4)
    recipe.start_step(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = wide(x.float()).square().mean()
    loss.backward()
    recipe.after_backward()
    recipe.after_step(1, optimizer)
    for path, (score,) in recipe.scores().items():
        want = once[path][0].flatten().sqrt()
        cosine = F.cosine_similarity(score.flatten().sqrt(), want, dim=0)
        assert cosine > 0.99


def test_a_step_left_out_and_a_loss_scale_leave_no_trace() -> None:
    def collected(spoilt: bool, scales: tuple[float, float]) -> dict[str, Any]:
        model = wrapped_chain([LOW, FEW])
        recipe = recipe_of(model, warmup_steps=1, grad_steps=3)
        recipe.begin(9)
        g = torch.Generator().manual_seed(3)
        x = torch.randn(3, 5, 12, generator=g, dtype=torch.float64)
        step = 2
        for b, scale in zip(x, scales, strict=False):
            if spoilt:
                recipe.start_step(step)
                (model(b) * float("nan")).sum().backward()
                recipe.after_backward(scale)
                step += 1
            recipe.start_step(step)
            (scale * model(b).square().mean()).backward()
            recipe.after_backward(scale)
            recipe.after_step(step, torch.optim.SGD(model.parameters(), lr=0.0))
            step += 1
        found: dict[str, Any] = recipe.scores()
        return found

    want = collected(False, (1.0, 1.0))
    for got in (collected(True, (1.0, 1.0)), collected(False, (1024.0, 512.0))):
        for path, (score,) in want.items():
            assert near(got[path][0], score, path)


def test_gradients_that_are_not_finite_are_not_chosen_by() -> None:
    model = wrapped_chain([LOW, FEW])
    recipe = recipe_of(model, warmup_steps=0)
    recipe.begin(3)
    recipe.start_step(1)
    (model(torch.randn(2, 12).double()) * float("nan")).sum().backward()
    recipe.after_backward()
    with pytest.raises(TrainingError, match=r"lin\.experts.*not finite"):
        recipe.after_step(1, torch.optim.SGD(model.parameters(), lr=0.0))


def test_a_compiled_model_does_the_same() -> None:
    """Hooks that come and go after it was compiled."""

    def places(is_compiled: bool) -> list[Tensor]:
        model = wrapped_chain([LOW, FEW])
        run: Any = torch.compile(model, backend="eager") if is_compiled else model
        recipe = recipe_of(model, warmup_steps=1, grad_steps=2)
        recipe.begin(6)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        g = torch.Generator().manual_seed(3)
        for step in range(1, 6):
            x = torch.randn(2, 12, generator=g, dtype=torch.float64)
            taken(run, recipe, step, [x], optimizer)
            assert not recipe._step_sums
        found = [sparse_of(site) for site in all_of(model)]
        return [t.detach() for part in found for t in (part.indices, part.values)]

    for got, want in zip(places(True), places(False), strict=True):
        torch.testing.assert_close(got, want)


def test_a_layer_that_is_never_run_is_refused() -> None:
    model = wrapped_chain([LOW, FEW], sizes={"lin": [12, 10], "out": [10, 6]})
    recipe = recipe_of(model, warmup_steps=0)
    recipe.begin(3)
    recipe.start_step(1)
    model.lin(torch.randn(2, 12).double()).square().mean().backward()
    recipe.after_backward()
    with pytest.raises(TrainingError, match=r"out\.experts.*no gradient came"):
        recipe.after_step(1, torch.optim.SGD(model.parameters(), lr=0.0))


@pytest.mark.parametrize("mode", [None, False, True])
def test_checkpointing_counts_each_batch_once(
    mode: bool | None, tiny_llama: Any
) -> None:
    raw = {
        "target_modules": "all-linear",
        "experts": {"kind": "sum", "num_experts": 3, "parts": [LOW, FEW]},
        "router": {"kind": "topk", "init_range": 0.3},
    }
    ids = torch.randint(3, 128, (2, 7), generator=torch.Generator().manual_seed(0))

    def collected(mode: bool | None) -> dict[str, Any]:
        model: Any = molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(raw))
        if mode is not None:
            model.activation_checkpointing_enable({"use_reentrant": mode})
        g = torch.Generator().manual_seed(1)
        for name, p in adapter_parameters(model).items():
            if "values" not in name:
                p.data.normal_(0, 1.0 if "router" in name else 0.2, generator=g)
        recipe = recipe_of(model.train(), warmup_steps=0, grad_steps=2)
        recipe.begin(3)
        recipe.start_step(1)
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
        recipe.after_backward()
        recipe.after_step(1, torch.optim.SGD(model.parameters(), lr=0.0))
        found: dict[str, Any] = recipe.scores()
        return found

    want, got = collected(None), collected(mode)
    assert len(want) == len(got) == 14
    for path, scores in want.items():
        for mine, score in zip(got[path], scores, strict=True):
            assert (mine is None) == (score is None)
            if score is not None:
                torch.testing.assert_close(mine, score, atol=1e-7, rtol=1e-3)


def mixture() -> TaskMixture:
    generator = torch.Generator().manual_seed(1)
    part = TaskRows("sql")
    for _ in range(10):
        length = int(torch.randint(4, 9, (1,), generator=generator))
        ids = torch.randint(3, 128, (length,), generator=generator).tolist()
        part.add({"input_ids": ids, "labels": ids, "task_id": 0})
    return TaskMixture([part], [1.0], 10)


class Poison(TrainerCallback):
    """Makes one gradient NaN in the given steps (0-based)."""

    def __init__(self, model: Any, steps: set[int]):
        self.bad, self.steps = False, steps
        name, parameter = next(iter(adapter_parameters(model).items()))
        assert "parts.0" in name
        parameter.register_hook(lambda g: g * float("nan") if self.bad else g)

    def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        self.bad = state.global_step in self.steps


def trainer_for(
    folder: Path, make: Any, poison: Any = (), recipe: Any = (), **settings: Any
) -> MoloraTrainer:
    raw = {
        "target_modules": ["q_proj", "up_proj"],
        "experts": {
            "kind": "sum",
            "num_experts": 3,
            "parts": [LOW | {"lora_dropout": 0.1}, FEW],
        },
        "router": {"kind": "topk", "noise": 0.5, "init_range": 0.3},
    }
    model = molora.wrap(make(), molora.AdapterConfig.from_dict(raw))
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 7,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    block = {"kind": "rosa", "warmup_steps": 2, "grad_steps": 2, **dict(recipe)}
    return MoloraTrainer(
        model=model,
        args=TrainingArguments(**defaults | settings),
        train_dataset=mixture(),
        data_collator=Collator(0),
        callbacks=[Poison(model, set(poison))],
        settings=MoloraTrainingSettings(recipe=RoSA.Config.from_dict(block)),
    )


def outcome(trainer: MoloraTrainer) -> dict[str, Any]:
    found = {n: p.data.clone() for n, p in adapter_parameters(trainer.model).items()}
    for path, site in sites(trainer.model).items():
        found[f"{path}.places"] = sparse_of(site).indices.clone()
    for n, s in enumerate(trainer.optimizer.state_dict()["state"].values()):
        found |= {f"{n}.{name}": v for name, v in s.items()}
    found["losses"] = torch.tensor(
        [log["loss"] for log in trainer.state.log_history if "loss" in log]
    )
    return found


def phases(trainer: MoloraTrainer) -> list[float]:
    return [log["sparse_phase"] for log in trainer.state.log_history if "loss" in log]


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any
) -> tuple[Path, dict[str, Any]]:
    """Seven steps, the third of which is left out; a checkpoint after each."""
    folder = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trainer = trainer_for(folder, tiny_llama, poison={2})
    drawn = {p: sparse_of(s).indices.clone() for p, s in sites(trainer.model).items()}
    trainer.train()
    torch.set_num_threads(threads)
    assert trainer.guard.total == 1
    assert phases(trainer) == [0, 0, 1, 1, 1, 2, 2]
    for path, site in sites(trainer.model).items():
        part = sparse_of(site)
        assert not torch.equal(part.indices, drawn[path])
        assert part.values.abs().sum() > 0
    return folder, outcome(trainer)


# in the warm-up, after a step that was left out, between two collected ones, just
# chosen, and with all in training
@pytest.mark.parametrize("step", [1, 3, 4, 5, 6])
def test_a_resumed_run_equals_the_whole_one(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, step: int, tiny_llama: Any
) -> None:
    folder, wanted = whole
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    shutil.copy(folder / "routing_log.jsonl", tmp_path)
    torch.manual_seed(99)
    trainer = trainer_for(tmp_path, tiny_llama, poison={2})
    trainer.train(resume_from_checkpoint=True)
    got = outcome(trainer)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0, equal_nan=True)
    assert phases(trainer) == [0, 0, 1, 1, 1, 2, 2]


def test_the_warm_up_is_that_of_a_run_without_sparse_values(
    tmp_path: Path, tiny_llama: Any
) -> None:
    """Their gradient has no part in clipping, and decay and moments none in them."""

    class Seen(TrainerCallback):
        def __init__(self) -> None:
            self.norms: list[float] = []

        def on_log(self, *args: Any, logs: Any, **kwargs: Any) -> None:
            if "grad_norm" in logs:
                self.norms.append(logs["grad_norm"])

    def norms(trainer: MoloraTrainer) -> list[float]:
        seen = Seen()
        trainer.add_callback(seen)
        torch.manual_seed(5)
        trainer.train()
        return seen.norms

    limits = {"max_grad_norm": 0.01, "max_steps": 5}
    rest = {"warmup_steps": 3, "grad_steps": 1}
    first = trainer_for(tmp_path / "a", tiny_llama, recipe=rest, **limits)
    other = trainer_for(tmp_path / "b", tiny_llama, recipe=rest, **limits)
    other.recipe = None
    for site in sites(other.model).values():
        sparse_of(site).values.requires_grad_(False)
    assert norms(first)[:4] == norms(other)[:4]
    values = [sparse_of(s).values for s in all_of(first.model)]
    steps = {float(first.optimizer.state[v]["step"]) for v in values}
    assert steps == {1.0}


def test_what_means_nothing_is_refused(
    tmp_path: Path, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrapped_chain([LOW, FEW])
    recipe = recipe_of(model, warmup_steps=2, grad_steps=2)
    with pytest.raises(TrainingError, match=r"warmup_steps=2 and .*grad_steps=2 leave"):
        recipe.begin(4)
    recipe = recipe_of(model, warmup_steps=2, grad_steps=2)
    recipe.begin(5)
    with pytest.raises(TrainingError, match="chooses places once"):
        recipe.begin(5)
    sparse_of(all_of(model)[0]).values.data += 1
    with pytest.raises(TrainingError, match="trained already"):
        recipe.start_step(1)
    sparse_of(all_of(model)[0]).values.requires_grad_(False)
    with pytest.raises(TrainingError, match=r"lin\.experts\.parts\.1: .*train: all"):
        recipe_of(model)
    alone = wrapped_chain([FEW])
    with pytest.raises(TrainingError, match="nothing to warm up"):
        recipe_of(alone, warmup_steps=1)
    with pytest.raises(TrainingError, match="this model has none"):
        recipe_of(wrapped_chain([LOW]))
    trainer = trainer_for(tmp_path, tiny_llama, max_steps=5, save_strategy="no")
    trainer.train()
    with pytest.raises(TrainingError, match="make a new trainer"):
        trainer.train()
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda _: 2))
    with pytest.raises(TrainingError, match="trains in one process"):
        trainer.set_up_recipe(trainer.settings.recipe)


def test_sparse_experts_alone_collect_at_once() -> None:
    """The authors' spa_only."""
    model = wrapped_chain([FEW])
    recipe = recipe_of(model, warmup_steps=0)
    recipe.begin(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    x = torch.randn(4, 12).double()
    want = [
        dense_gradient(model, path, functools.partial(mean, model, [x]))[0]
        for path in sites(model)
    ]
    taken(model, recipe, 1, [x], optimizer)
    for site, grad in zip(all_of(model), want, strict=True):
        part = sparse_of(site)
        assert not part.values.any()
        places = grad.abs().flatten().topk(part.indices.shape[1]).indices
        assert torch.equal(part.indices[0].long(), places.sort().values)
    taken(model, recipe, 2, [x], optimizer)
    assert all(sparse_of(site).values.abs().sum() > 0 for site in all_of(model))


@pytest.mark.parametrize(
    ("adapter", "match"),
    [
        ({"experts": LOW}, "rosa trains experts of kind sparse"),
        ({"experts": FEW}, "nothing to warm up"),
        (
            {
                "experts": {"kind": "sum", "num_experts": 2, "parts": [LOW, FEW]},
                "router": {"kind": "topk"},
                "train": "router",
            },
            "adapter.train is router",
        ),
    ],
)
def test_a_config_is_refused(adapter: dict[str, Any], match: str) -> None:
    config = molora.AdapterConfig.from_dict({"target_modules": ["q_proj"], **adapter})
    reason = RoSA.check(RoSA.Config(), config)
    assert reason is not None and re.search(match, reason), reason
    if match == "nothing to warm up":
        assert RoSA.check(RoSA.Config(warmup_steps=0), config) is None
