"""The trainer against plain loops: gradients, data, what is refused and left out."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

import molora
from molora.checkpoint import load_adapter_state
from molora.errors import TrainingError, WrapError
from molora.model import adapter_parameters, sites
from molora.training import (
    Collator,
    MixtureSampler,
    MoloraTrainer,
    MoloraTrainingSettings,
    TaskMixture,
)
from molora.training.mixture import TaskRows
from molora.training.state import read_state

Factory = Callable[..., PreTrainedModel]
WEIGHT = 0.5
SWITCH = [{"kind": "switch", "weight": WEIGHT}]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(balance: Any = (), noise: float = 0.0, dropout: float = 0.0) -> Any:
    return molora.AdapterConfig.from_dict(
        {
            "target_modules": ["q_proj", "up_proj"],
            "experts": {
                "kind": "lora",
                "num_experts": 4,
                "r": 2,
                "lora_dropout": dropout,
            },
            "router": {"kind": "topk", "top_k": 2, "noise": noise, "init_range": 0.3},
            "balance": list(balance),
        }
    )


def wrapped(tiny_llama: Factory, *args: Any, **settings: Any) -> Any:
    """Wrapped model whose experts differ: B is drawn, not zero."""
    model = molora.wrap(tiny_llama(), config(*args, **settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if name.endswith("Bt"):
                parameter.normal_(0, 0.2, generator=generator)
    return model


def rows(count: int, seed: int = 0, task: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(4, 9, (1,), generator=generator))
        ids = torch.randint(3, 128, (length,), generator=generator).tolist()
        made.append(
            {"input_ids": ids, "labels": [-100, -100, *ids[2:]], "task_id": task}
        )
    return made


def mixture(epoch_size: int = 12) -> TaskMixture:
    parts = []
    for task, name in enumerate(["sql", "chat"]):
        part = TaskRows(name)
        for row in rows(9, seed=task, task=task):
            part.add(row)  # type: ignore[arg-type]
        parts.append(part)
    return TaskMixture(parts, [0.75, 0.25], epoch_size)


class Spy(TrainerCallback):
    """Keeps the gradients that each step is about to use."""

    def __init__(self) -> None:
        self.grads: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(
        self, *args: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.grads.append(
            {n: p.grad.clone() for n, p in adapter_parameters(model).items()}
        )


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return TrainingArguments(**defaults | settings)


def trainer_for(
    model: Any, folder: Path, data: Any, spy: Any = None, **settings: Any
) -> MoloraTrainer:
    return MoloraTrainer(
        model=model,
        args=arguments(folder, **settings),
        train_dataset=data,
        data_collator=Collator(0),
        callbacks=[spy] if spy else None,
    )


def grads_of(model: Any, folder: Path, data: Any, **settings: Any) -> dict[str, Tensor]:
    spy = Spy()
    trainer_for(model, folder, data, spy, **settings).train()
    return spy.grads[0]


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], tol: float) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        error = (got[name] - value).abs().max() / value.abs().max().clamp(min=1e-12)
        assert error <= tol, (name, float(error))


def by_definition(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of loss + weight * mean over sites of the Switch formula, by autograd.

    The model has no balance objective; the formula is written out here from the inputs
    of its sites.
    """
    seen: dict[str, Tensor] = {}
    handles = [
        site.register_forward_pre_hook(
            lambda module, args: seen.__setitem__(module.path, args[0])
        )
        for site in sites(model).values()
    ]
    batch = {k: v for k, v in batch.items() if k != "task_ids"}
    model.train()
    loss = model(**batch).loss
    for handle in handles:
        handle.remove()
    real = batch["attention_mask"].bool()
    for path, site in sites(model).items():
        logits = seen[path][real] @ site.router.gate.weight.t()
        probs = logits.softmax(-1)
        chosen = torch.zeros_like(probs).scatter(-1, probs.topk(2).indices, 1.0)
        share = chosen.sum(0) / chosen.sum()
        loss = loss + WEIGHT / len(seen) * 4 * (share * probs.mean(0)).sum()
    loss.backward()
    return {n: p.grad.clone() for n, p in adapter_parameters(model).items()}


@pytest.mark.parametrize(("batch_size", "steps"), [(4, 1), (2, 2), (1, 4)])
def test_accumulation_keeps_the_balance_coefficient(
    tiny_llama: Factory, tmp_path: Path, batch_size: int, steps: int
) -> None:
    # four times the same row, so that every micro-batch has the same statistics
    data = rows(1) * 4
    wanted = by_definition(wrapped(tiny_llama), Collator(0)(data))
    got = grads_of(
        wrapped(tiny_llama, SWITCH),
        tmp_path,
        data,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=steps,
        max_grad_norm=0.0,
    )
    assert_close(got, wanted, 2e-5)
    # the balance part is not a rounding of the whole
    plain = grads_of(wrapped(tiny_llama), tmp_path, data)
    router = next(name for name in got if name.endswith("gate.weight"))
    assert (got[router] - plain[router]).abs().max() > 1e-3


def scaled(trainer: MoloraTrainer) -> torch.amp.GradScaler:
    """Give a trainer on the CPU the loss scaler that fp16 has on a GPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.accelerator.scaler = scaler
    return scaler


def test_loss_scale_multiplies_balance_gradients_too(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    data = rows(1) * 4
    wanted = by_definition(wrapped(tiny_llama), Collator(0)(data))
    spy = Spy()
    trainer = trainer_for(
        wrapped(tiny_llama, SWITCH),
        tmp_path,
        data,
        spy,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
    )
    scaled(trainer)
    trainer.train()
    assert_close(spy.grads[0], {n: 1024 * g for n, g in wanted.items()}, 2e-5)


def test_loss_scaler_leaves_its_own_steps_out(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    model = wrapped(tiny_llama)
    snapshots = Snapshots()
    trainer = trainer_for(
        model, tmp_path, mixture(), snapshots, max_steps=3, save_strategy="steps"
    )
    trainer.add_callback(Poison(model, {1}))
    scaler = scaled(trainer)
    trainer.train()
    assert scaler.get_scale() == 512
    assert trainer.guard.state() == {"in_row": 0, "total": 1}
    after = [snapshot[0] for snapshot in snapshots.taken]
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])
    saved = read_state(tmp_path / "checkpoint-3", "scaler")
    assert saved == scaler.state_dict()


def test_clipping_is_over_the_whole_gradient(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    data = rows(2)
    wanted = by_definition(wrapped(tiny_llama), Collator(0)(data))
    norm = torch.stack([g.double().norm() for g in wanted.values()]).norm()
    assert norm > 0.05
    got = grads_of(
        wrapped(tiny_llama, SWITCH),
        tmp_path,
        data,
        max_grad_norm=0.01,
    )
    assert_close(got, {n: g * (0.01 / norm) for n, g in wanted.items()}, 1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(
    tiny_llama: Factory, tmp_path: Path, reentrant: bool
) -> None:
    # dropout and noise: the recomputation must draw what the forward drew
    def grads(**settings: Any) -> list[dict[str, Tensor]]:
        spy = Spy()
        model = wrapped(tiny_llama, SWITCH, noise=0.3, dropout=0.2)
        trainer_for(
            model,
            tmp_path,
            mixture(),
            spy,
            max_steps=3,
            gradient_accumulation_steps=2,
            **settings,
        ).train()
        return spy.grads

    plain = grads()
    with pytest.warns(FutureWarning):
        checkpointed = grads(
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )
    assert len(plain) == len(checkpointed) == 3
    for got, wanted in zip(checkpointed, plain, strict=True):
        assert_close(got, wanted, 1e-5)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_two_forwards_before_one_backward(
    tiny_llama: Factory, reentrant: bool | None
) -> None:
    """As in preference training: each forward keeps its own mask, also recomputed."""
    short, long = (Collator(0)(rows(2, seed)) for seed in (5, 6))
    alone = []
    for batch in (short, long):
        alone.append(by_definition(wrapped(tiny_llama), batch))
    wanted = {name: alone[0][name] + alone[1][name] for name in alone[0]}
    model = wrapped(tiny_llama, SWITCH)
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    model.train()
    first, second = (
        model(**{k: v for k, v in batch.items() if k != "task_ids"}).loss
        for batch in (short, long)
    )
    assert not torch.equal(short["attention_mask"], long["attention_mask"])
    (first + second).backward()
    got = {n: p.grad for n, p in adapter_parameters(model).items()}
    assert_close(got, wanted, 2e-5)


def test_bf16_autocast(tiny_llama: Factory, tmp_path: Path) -> None:
    data = rows(2)
    batch = {k: v for k, v in Collator(0)(data).items() if k != "task_ids"}
    model = wrapped(tiny_llama, SWITCH).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    wanted = {n: p.grad for n, p in adapter_parameters(model).items()}
    trained = wrapped(tiny_llama, SWITCH)
    got = grads_of(trained, tmp_path, data, bf16=True, max_grad_norm=0.0)
    assert_close(got, wanted, 1e-5)
    assert all(p.dtype == torch.float32 for p in adapter_parameters(trained).values())
    fp32 = grads_of(wrapped(tiny_llama, SWITCH), tmp_path, data, max_grad_norm=0.0)
    error = max(float((got[n] - fp32[n]).norm() / fp32[n].norm()) for n in fp32)
    assert 1e-4 < error < 0.1


def test_training_drops_the_report_of_a_collapse(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    model = wrapped(tiny_llama)
    molora.collapse(model, "concat", show_progress=False)
    assert model.molora_report["method"] == "concat"
    trainer_for(model, tmp_path, rows(2)).train()
    assert "molora_report" not in model.__dict__


def seen_batches(model: Any) -> list[dict[str, Any]]:
    """Ids and tasks of every forward from now on."""
    seen: list[dict[str, Any]] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(
            {"ids": kwargs["input_ids"], "tasks": model.molora_runtime.current.tasks}
        )

    model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


@pytest.mark.parametrize("remove", [False, True])
def test_mixture_is_drawn_anew_and_forwards_know_their_tasks(
    tiny_llama: Factory, tmp_path: Path, remove: bool
) -> None:
    model, data = wrapped(tiny_llama), mixture()
    seen = seen_batches(model)
    trainer_for(
        model, tmp_path, data, max_steps=12, remove_unused_columns=remove, data_seed=7
    ).train()
    sampler = MixtureSampler(data, seed=7)
    drawn = sampler.draw(0) + sampler.draw(1)
    assert sampler.draw(0) != sampler.draw(1)
    assert len(seen) == 12
    for batch, first in zip(seen, range(0, 24, 2), strict=True):
        expected = [data[i] for i in drawn[first : first + 2]]
        assert torch.equal(batch["ids"], Collator(0)(expected)["input_ids"])
        names = tuple(data.task_names[row["task_id"]] for row in expected)
        assert batch["tasks"] == names
    assert {name for batch in seen for name in batch["tasks"]} == {"sql", "chat"}


def test_sampler_follows_the_epoch_of_the_run(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    """accelerate tells it too, but not under several processes after a resume."""
    trainer = trainer_for(wrapped(tiny_llama), tmp_path, mixture())
    sampler = trainer._get_train_sampler()
    trainer.state.epoch = 2.6
    trainer.callback_handler.on_epoch_begin(
        trainer.args, trainer.state, trainer.control
    )
    assert list(sampler) == MixtureSampler(mixture(), seed=42).draw(2)


def test_evaluation_by_task(tiny_llama: Factory, tmp_path: Path) -> None:
    model = wrapped(tiny_llama)
    trainer = MoloraTrainer(
        model=model,
        args=arguments(tmp_path, per_device_eval_batch_size=3),
        eval_dataset={"sql": rows(3, 1), "chat": rows(3, 2)},
        data_collator=Collator(0),
    )
    scores = trainer.evaluate()
    for name, seed in (("sql", 1), ("chat", 2)):
        batch = Collator(0)(rows(3, seed))
        batch.pop("task_ids")
        with torch.no_grad():
            wanted = float(model.eval()(**batch).loss)
        assert scores[f"eval_{name}_loss"] == pytest.approx(wanted, rel=1e-5)


def adapter(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in adapter_parameters(model).items()}


@pytest.mark.parametrize("counts_tokens", [True, False])
@pytest.mark.parametrize("padding", [False, True])
def test_batch_without_labels_costs_nothing(
    tiny_llama: Factory, tmp_path: Path, counts_tokens: bool, padding: bool
) -> None:
    model = wrapped(tiny_llama)
    model.accepts_loss_kwargs = counts_tokens
    empty = [{**row, "labels": [-100] * len(row["labels"])} for row in rows(2)]

    def collate(batch: Any) -> Any:
        made = Collator(0)(batch)
        if padding:
            made["attention_mask"] *= 0
        return made

    before = adapter(model)
    trainer = trainer_for(
        model, tmp_path, empty, weight_decay=0.0, remove_unused_columns=False
    )
    trainer.data_collator = collate
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == 0
    assert log["batches_without_labels"] == 1
    assert log["grad_norm"] == 0
    assert log["skipped_steps"] == 0
    assert ("routing/entropy_mean" in log) is not padding
    for name, value in adapter(model).items():
        assert torch.equal(value, before[name]), name


class Poison(TrainerCallback):
    """Makes one gradient NaN in the given steps (0-based)."""

    def __init__(self, model: Any, steps: set[int]):
        self.steps = steps
        self.step = 0
        parameter = next(iter(adapter_parameters(model).values()))
        parameter.register_hook(self.spoil)

    def spoil(self, grad: Tensor) -> Tensor:
        return grad * float("nan") if self.step in self.steps else grad

    def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        self.step = state.global_step


class Snapshots(TrainerCallback):
    """Copies of adapter, optimizer state and learning rate after every step."""

    def __init__(self) -> None:
        self.taken: list[tuple[dict[str, Tensor], Any, float]] = []

    def on_step_end(
        self, *args: Any, model: Any, optimizer: Any, lr_scheduler: Any, **kwargs: Any
    ) -> None:
        state = [
            value.clone()
            for entry in optimizer.state_dict()["state"].values()
            for value in entry.values()
        ]
        self.taken.append((adapter(model), state, lr_scheduler.get_last_lr()[0]))


def test_step_with_a_nan_gradient_is_left_out(
    tiny_llama: Factory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = wrapped(tiny_llama)
    snapshots = Snapshots()
    trainer = trainer_for(model, tmp_path, mixture(), snapshots, max_steps=4)
    trainer.add_callback(Poison(model, {1, 2}))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    after = [snapshot[0] for snapshot in snapshots.taken]
    states = [snapshot[1] for snapshot in snapshots.taken]
    for name in after[0]:
        assert torch.equal(after[0][name], after[1][name])
        assert torch.equal(after[0][name], after[2][name])
    assert any(not torch.equal(after[2][name], after[3][name]) for name in after[0])
    assert len(states[0]) > 0
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[2], strict=True))
    # linear decay from 0.01 over 4 steps follows the step count
    rates = [snapshot[2] for snapshot in snapshots.taken]
    assert rates == pytest.approx([0.0075, 0.005, 0.0025, 0.0])
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["skipped_steps"] for log in logs] == [0, 1, 2, 2]
    assert "2 in a row" in caplog.text


def test_nan_steps_in_a_row_stop_the_run_and_lose_nothing(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    model = wrapped(tiny_llama)
    trainer = MoloraTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=9, save_strategy="steps", save_steps=100),
        train_dataset=mixture(),
        data_collator=Collator(0),
        settings=MoloraTrainingSettings(max_skipped_steps=3),
    )
    trainer.add_callback(Poison(model, {1, 3, 4, 5, 6}))
    with pytest.raises(TrainingError, match="3 steps in a row.*checkpoint-6"):
        trainer.train()
    assert trainer.state.global_step == 6
    again = molora.wrap(tiny_llama(), config())
    load_adapter_state(again, tmp_path / "checkpoint-6")
    for name, value in adapter(again).items():
        assert value.isfinite().all()
        assert torch.equal(value, adapter_parameters(model)[name])


def test_nan_loss_shows_in_the_log_and_only_there(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    class Spoilt(MoloraTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step == 1 else loss

    trainer = Spoilt(
        model=wrapped(tiny_llama),
        args=arguments(tmp_path, max_steps=3, logging_nan_inf_filter=True),
        train_dataset=mixture(),
        data_collator=Collator(0),
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert [loss == loss for loss in losses] == [True, False, True]


def test_statistics_of_every_site_reach_the_files(
    tiny_llama: Factory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = wrapped(tiny_llama, SWITCH)
    trainer_for(model, tmp_path, mixture(), max_steps=4, logging_steps=2).train()
    printed = capsys.readouterr().out
    assert "routing/entropy_mean" in printed
    assert "layers.0" not in printed
    lines = (tmp_path / "routing_log.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [(e["step"], e["site"]) for e in entries] == [
        (step, path) for step in (2, 4) for path in sites(model)
    ]
    assert all(sum(e["share"]) == pytest.approx(1, abs=1e-4) for e in entries)
    assert model.molora_runtime.stats is None

    trainer_for(
        wrapped(tiny_llama, SWITCH), tmp_path, mixture(), report_to="tensorboard"
    ).train()
    events = EventAccumulator(str(next((tmp_path / "runs").iterdir())))
    events.Reload()
    tags = events.Tags()["scalars"]
    for path in sites(model):
        for kind in ("entropy", "live_experts", "max_share", "balance_switch"):
            assert f"train/routing_sites/{path}/{kind}" in tags
    assert "train/routing/balance_switch" in tags


def test_models_that_cannot_be_trained_are_refused(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    with pytest.raises(WrapError, match=r"molora\.wrap first"):
        trainer_for(tiny_llama(), tmp_path, mixture())
    frozen = wrapped(tiny_llama)
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(TrainingError, match="no trainable parameter"):
        trainer_for(frozen, tmp_path, mixture())
    single = {"kind": "lora", "num_experts": 1, "r": 2}
    model = molora.wrap(
        tiny_llama(),
        molora.AdapterConfig.from_dict(
            {"target_modules": ["q_proj"], "experts": single}
        ),
    )
    trainer = trainer_for(model, tmp_path, mixture())
    molora.merge(model)
    with pytest.raises(TrainingError, match=r"merged; call molora\.unmerge"):
        trainer.train()
    with pytest.raises(TrainingError, match=r"merged; call molora\.unmerge"):
        trainer_for(model, tmp_path, mixture())


def test_settings_that_fit_no_mixture_are_refused(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    model = wrapped(tiny_llama)
    with pytest.raises(TrainingError, match="train_sampling_strategy"):
        trainer_for(model, tmp_path, mixture(), train_sampling_strategy="sequential")
    other = mixture()
    other.task_names = ["chat", "sql"]
    with pytest.raises(TrainingError, match="number their tasks differently"):
        MoloraTrainer(
            model=model,
            args=arguments(tmp_path),
            train_dataset=mixture(),
            eval_dataset={"all": other},
            data_collator=Collator(0),
        )
    with pytest.raises(TrainingError, match="enable_jit_checkpoint"):
        trainer_for(model, tmp_path, mixture(), enable_jit_checkpoint=True)
