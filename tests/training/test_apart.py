"""Adapters trained in one forward against PEFT LoRAs, each trained by itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainingArguments, default_data_collator
from transformers.optimization import Adafactor

import molora
from molora.errors import RoutingError, TrainingError
from molora.model import adapter_parameters, sites
from molora.training import (
    Collator,
    MoloraTrainer,
    MoloraTrainingSettings,
    TaskMixture,
)
from molora.training.apart import Apart
from molora.training.mixture import TaskRows

Factory = Callable[..., PreTrainedModel]
NAMES = ["sql", "chat", "poem"]
RANKS, ALPHAS = [2, 3, 1], [4.0, 3.0, 5.0]
TARGETS = ["q_proj", "down_proj"]


def wrapped(make: Factory, **changes: Any) -> Any:
    raw: dict[str, Any] = {
        "target_modules": TARGETS,
        "experts": {
            "kind": "lora",
            "num_experts": 3,
            "r": RANKS,
            "lora_alpha": ALPHAS,
        },
        "router": {"kind": "adapter", "adapters": NAMES},
    }
    model: Any = molora.wrap(make(), molora.AdapterConfig.from_dict(raw | changes))
    generator = torch.Generator().manual_seed(3)
    for name, p in adapter_parameters(model).items():
        if name.endswith("Bt"):
            for e, rank in enumerate(RANKS):
                p.data[e, :rank].normal_(0, 0.2, generator=generator)
    return model.double()


def mixture(counts: list[int], names: list[str] = NAMES) -> TaskMixture:
    generator = torch.Generator().manual_seed(0)
    parts = []
    for task, (name, count) in enumerate(zip(names, counts, strict=True)):
        part = TaskRows(name)
        for _ in range(count):
            size = int(torch.randint(4, 9, (1,), generator=generator))
            ids = torch.randint(3, 128, (size,), generator=generator).tolist()
            labels = [-100, -100, *ids[2:]]
            part.add({"input_ids": ids, "labels": labels, "task_id": task})
        parts.append(part)
    total = sum(counts)
    return TaskMixture(parts, [count / total for count in counts], total)


class Recorder(Collator):
    """Keeps every batch that the trainer sees."""

    def __init__(self) -> None:
        super().__init__(0)
        self.batches: list[dict[str, Tensor]] = []

    def __call__(self, rows: Any) -> dict[str, Tensor]:
        batch = super().__call__(rows)
        self.batches.append({name: values.clone() for name, values in batch.items()})
        return batch


def trainer(model: Any, folder: Path, data: Any, **settings: Any) -> MoloraTrainer:
    given = {
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-2,
        "weight_decay": 0.3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    collate = settings.pop("collate", None) or Collator(0)
    loss = settings.pop("compute_loss_func", None)
    return MoloraTrainer(
        model=model,
        args=TrainingArguments(str(folder), **given | settings),
        train_dataset=data,
        data_collator=collate,
        compute_loss_func=loss,
    )


def values(model: Any, path: str, adapter: int) -> list[Tensor]:
    experts: Any = sites(model)[path].experts
    rank = RANKS[adapter]
    return [experts.A.data[adapter, :rank], experts.Bt.data[adapter, :rank].t()]


def peft(model: Any, make: Factory, adapter: int) -> dict[str, list[Tensor]]:
    """A PEFT LoRA that starts from one adapter's factors: A and B by path."""
    settings = {"r": RANKS[adapter], "lora_alpha": ALPHAS[adapter]}
    theirs: Any = get_peft_model(
        make(), LoraConfig(target_modules=TARGETS, **settings)
    ).double()
    found = {}
    for path in sites(model):
        layer = theirs.base_model.model.get_submodule(path)
        pair = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        for own, start in zip(pair, values(model, path, adapter), strict=True):
            own.data.copy_(start)
        found[path] = pair
    return {"model": theirs, **found}


def train_alone(
    theirs: Any,
    adapter: int,
    steps: list[list[dict[str, Tensor]]],
    clip: float,
    optim: str = "adamw_torch",
) -> int:
    """Training on the rows of one adapter; steps that have none are no steps."""
    model = theirs["model"].train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any
    if optim == "adafactor":
        fixed = {"scale_parameter": False, "relative_step": False}
        optimizer = Adafactor(trained, lr=1e-2, weight_decay=0.3, **fixed)
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.3)
    taken = 0
    for batches in steps:
        losses, tokens = [], 0
        for batch in batches:
            for row, mask, labels in zip(
                batch["input_ids"][batch["task_ids"] == adapter],
                batch["attention_mask"][batch["task_ids"] == adapter],
                batch["labels"][batch["task_ids"] == adapter],
                strict=True,
            ):
                real = int(mask.sum())
                logits = model(input_ids=row[None, :real]).logits[0, :-1]
                target = labels[1:real]
                losses.append(F.cross_entropy(logits, target, reduction="sum"))
                tokens += int((target != -100).sum())
        if not tokens:
            continue
        (torch.stack(losses).sum() / tokens).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, clip)
        assert norm > clip
        optimizer.step()
        optimizer.zero_grad()
        taken += 1
    return taken


# Adafactor's steps depend on the size of a tensor: padding must not count
@pytest.mark.parametrize(
    ("accumulation", "optim", "scope"),
    [
        (1, "adamw_torch", "site"),
        (2, "adamw_torch", "block"),
        (1, "adamw_torch", "model"),
        (1, "adafactor", "site"),
    ],
)
def test_one_forward_equals_training_each_by_itself(
    accumulation: int, optim: str, scope: str, tiny_llama: Factory, tmp_path: Path
) -> None:
    router = {"kind": "adapter", "adapters": NAMES, "scope": scope}
    model, collate = wrapped(tiny_llama, router=router), Recorder()
    alone = [peft(model, tiny_llama, e) for e in range(3)]
    before = {n: p.clone() for n, p in adapter_parameters(model).items()}
    trainer(
        model,
        tmp_path,
        mixture([9, 6, 2]),
        collate=collate,
        num_train_epochs=2,
        optim=optim,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.02,
    ).train()
    per_epoch = len(collate.batches) // 2
    steps = [
        collate.batches[start : min(start + accumulation, end)]
        for end in (per_epoch, 2 * per_epoch)
        for start in range(end - per_epoch, end, accumulation)
    ]
    taken = [
        train_alone(theirs, e, steps, 0.02, optim) for e, theirs in enumerate(alone)
    ]
    # the third one is missing from some steps
    assert taken[2] < len(steps) and taken[0] >= taken[1] > taken[2] > 0
    for path in sites(model):
        for e, theirs in enumerate(alone):
            for own, other in zip(values(model, path, e), theirs[path], strict=True):
                assert (own - other).abs().max() < 1e-10, (path, e)
    for name, p in adapter_parameters(model).items():
        assert (p - before[name]).abs().max() > 1e-2
        assert not any(p.data[e, rank:].any() for e, rank in enumerate(RANKS))


def test_an_absent_adapter_is_left_alone_to_the_bit(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    """A first run gives every adapter momentum; then one is trained alone."""
    model = wrapped(tiny_llama)
    made = trainer(model, tmp_path, mixture([6, 6, 6]), max_steps=3)
    made.train()
    before = {n: p.clone() for n, p in adapter_parameters(model).items()}
    made.train_dataset = mixture([0, 5, 0])
    made.train()
    state = made.optimizer.state_dict()["state"]
    assert {float(s["step"]) for s in state.values()} >= {3.0}
    for name, p in adapter_parameters(model).items():
        assert torch.equal(p[0], before[name][0]), name
        assert torch.equal(p[2], before[name][2]), name
        assert (p[1] - before[name][1]).abs().max() > 1e-3, name


def test_a_resumed_run_equals_one_that_never_stopped(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    ends = []
    for folder, stop in (("whole", 6), ("parts", 3)):
        settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
        model = wrapped(tiny_llama)
        made = trainer(model, tmp_path / folder, mixture([9, 6, 2]), **settings)
        if stop == 3:
            made.args.max_steps = 3
            made.train()
            model = wrapped(tiny_llama)
            made = trainer(model, tmp_path / folder, mixture([9, 6, 2]), **settings)
        made.train(resume_from_checkpoint=True if stop == 3 else None)
        assert made.state.global_step == 6
        ends.append({n: p.clone() for n, p in adapter_parameters(model).items()})
    for name, p in ends[0].items():
        assert torch.equal(p, ends[1][name]), name


def test_evaluation_has_the_loss_of_the_model(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    model, data = wrapped(tiny_llama).eval(), mixture([3, 2, 1])
    made = trainer(model, tmp_path, data, per_device_eval_batch_size=6)
    batch = Collator(0)([data[i] for i in range(6)])
    names = [NAMES[i] for i in batch.pop("task_ids").tolist()]
    with torch.no_grad(), molora.tasks(model, names):
        want = float(model(**batch).loss)
    assert made.evaluate(data)["eval_loss"] == pytest.approx(want, rel=1e-5)


def test_each_adapter_goes_to_peft_after_training(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    model = wrapped(tiny_llama)
    trainer(model, tmp_path / "run", mixture([6, 6, 6]), max_steps=2).train()
    model.float().eval()
    folders = molora.export_peft_experts(model, tmp_path / "peft")
    ids = torch.arange(3, 33).view(3, 10)
    with torch.no_grad(), molora.tasks(model.double(), NAMES):
        logits = model(ids).logits
    for e, folder in enumerate(folders):
        theirs = PeftModel.from_pretrained(tiny_llama(), folder).double().eval()
        with torch.no_grad():
            want = theirs(ids[e : e + 1]).logits[0]
        assert (logits[e] - want).abs().max() < 1e-10


def shared(make: Factory) -> Any:
    experts = {"kind": "lora", "num_experts": 3, "r": 3, "shared": ["A"]}
    return wrapped(make, experts=experts)


def two_routers(make: Factory) -> Any:
    other = {"kind": "adapter", "adapters": NAMES[::-1]}
    return wrapped(make, overrides=[{"match": "down", "router": other}])


def with_norm(make: Factory) -> Any:
    model = wrapped(make)
    model.model.norm.weight.requires_grad_(True)
    return model


@pytest.mark.parametrize(
    ("build", "settings", "words"),
    [
        (shared, {}, "all adapters share A"),
        (two_routers, {}, "give both the same router"),
        (with_norm, {}, r"model.norm.weight is trained by the rows of every adapter"),
        (wrapped, {"label_smoothing_factor": 0.1}, "label_smoothing_factor; leave"),
        (wrapped, {"compute_loss_func": sum}, "compute_loss_func; leave"),
    ],
)
def test_what_cannot_be_kept_apart_is_refused(
    build: Any, settings: Any, words: str, tiny_llama: Factory, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=words):
        trainer(build(tiny_llama), tmp_path, mixture([2, 2, 2]), **settings)


def test_an_optimizer_of_the_callers_is_refused(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    model = wrapped(tiny_llama)
    optimizer = torch.optim.SGD(adapter_parameters(model).values(), lr=0.1)
    with pytest.raises(TrainingError, match="an optimizer of your own"):
        MoloraTrainer(
            model=model,
            args=TrainingArguments(str(tmp_path), report_to=[]),
            train_dataset=mixture([2, 2, 2]),
            optimizers=(optimizer, None),
        )


def test_rows_without_a_known_adapter_are_refused(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    plain = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 4
    made = trainer(wrapped(tiny_llama), tmp_path, plain, collate=default_data_collator)
    with pytest.raises(TrainingError, match="needs the adapter of every row"):
        made.train()
    other = mixture([2, 2, 2], ["sql", "chat", "song"])
    with pytest.raises(RoutingError, match=r"no adapter is called \['song'\]"):
        trainer(wrapped(tiny_llama), tmp_path, other, max_steps=2).train()


def test_a_cast_behind_the_optimizers_back_is_refused(tiny_llama: Factory) -> None:
    model = wrapped(tiny_llama)
    apart = Apart(model)
    apart.check()
    model.float()
    with pytest.raises(TrainingError, match="moved or cast after"):
        apart.check()


def test_unequal_tasks_are_no_collapse(
    tiny_llama: Factory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = trainer(
        wrapped(tiny_llama), tmp_path, mixture([20, 1, 1]), max_steps=4, logging_steps=1
    )
    made.settings = MoloraTrainingSettings(collapse_window=2)
    made.train()
    assert "collapsed" not in caplog.text
    assert made.state.log_history[0]["loss"] > 0
