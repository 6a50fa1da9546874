"""Short runs of MoloraTrainer with a recipe, stopped and resumed or not."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

import molora
from molora.model import adapter_parameters
from molora.run_config import RunConfig
from molora.training import Collator, MoloraTrainer, MoloraTrainingSettings, TaskMixture
from molora.training.mixture import TaskRows

SPEEDS = re.compile("runtime|per_second|train_loss")
"""What is of one call of train, not of the run."""


def mixture(rows: int = 18) -> TaskMixture:
    """One task of random rows."""
    generator = torch.Generator().manual_seed(1)
    part = TaskRows("sql")
    for _ in range(rows):
        length = int(torch.randint(4, 9, (1,), generator=generator))
        ids = torch.randint(3, 128, (length,), generator=generator).tolist()
        labels = [-100, -100, *ids[2:]]
        part.add({"input_ids": ids, "labels": labels, "task_id": 0})
    return TaskMixture([part], [1.0], rows)


class Poison(TrainerCallback):
    """Makes one gradient NaN in the given steps (0-based)."""

    def __init__(self, model: Any, steps: set[int]):
        self.bad = False
        self.steps = steps
        parameter = next(
            p for p in adapter_parameters(model).values() if p.requires_grad
        )
        parameter.register_hook(lambda g: g * float("nan") if self.bad else g)

    def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        self.bad = state.global_step in self.steps


def trainer_for(
    model: Any,
    folder: Path,
    recipe: dict[str, Any] | None,
    poison: set[int] | None = None,
    **settings: Any,
) -> MoloraTrainer:
    """A trainer of 12 steps of two micro-batches, which saves every step."""
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 12,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return MoloraTrainer(
        model=model,
        args=TrainingArguments(**defaults | settings),
        train_dataset=mixture(),
        data_collator=Collator(0),
        callbacks=[Poison(model, poison)] if poison else [],
        settings=MoloraTrainingSettings.from_dict({"recipe": recipe}),
    )


def wrapped(base: Any, experts: dict[str, Any], router: Any = None) -> Any:
    """A model with these experts in two linears of every layer."""
    raw = {"target_modules": ["q_proj", "up_proj"], "experts": experts}
    if router is not None:
        raw["router"] = router
    return molora.wrap(base, molora.AdapterConfig.from_dict(raw))


def run_config(
    recipe: Any, experts: Any, training: Any = None, **more: Any
) -> RunConfig:
    """A run with this recipe and these experts."""
    training = {**(training or {"output_dir": "out"}), "recipe": recipe}
    task = {"name": "sql", "train": "a.jsonl", "eval": "b.jsonl"}
    return RunConfig.from_dict(
        {
            "adapter": {"target_modules": ["q_proj"], "experts": experts, **more},
            "data": {"tasks": [task]},
            "training": training,
        }
    )


def outcome(trainer: MoloraTrainer) -> dict[str, Any]:
    """What must not depend on whether the run was stopped."""
    logs = [
        {k: v for k, v in log.items() if not SPEEDS.search(k)}
        for log in trainer.state.log_history
    ]
    names = {n: p for n, p in trainer.model.named_parameters() if "molora" not in n}
    return {
        "adapter": {n: p.data for n, p in adapter_parameters(trainer.model).items()},
        "trains": [n for n, p in names.items() if p.requires_grad],
        "buffers": dict(trainer.model.named_buffers()),
        "optimizer": trainer.optimizer.state_dict(),
        "recipe": trainer.recipe_progress(),
        "logs": logs,
    }


def assert_equal(got: Any, wanted: Any, place: str = "") -> None:
    """Equal bit for bit."""
    if isinstance(wanted, Tensor):
        assert torch.equal(got, wanted), place
    elif isinstance(wanted, dict):
        assert got.keys() == wanted.keys(), place
        for key, value in wanted.items():
            assert_equal(got[key], value, f"{place}.{key}")
    elif isinstance(wanted, list | tuple):
        assert len(got) == len(wanted), place
        for i, (one, other) in enumerate(zip(got, wanted, strict=True)):
            assert_equal(one, other, f"{place}[{i}]")
    else:
        assert got == wanted or (got != got and wanted != wanted), place


def check_resume(
    make: Callable[[Path], MoloraTrainer], folder: Path, steps: list[int]
) -> dict[str, Any]:
    """A run resumed from any of these steps equals one that never stopped.

    Returns:
        What came of that one.
    """
    whole = make(folder / "whole")
    whole.train()
    wanted = outcome(whole)
    for step in steps:
        part = folder / f"from-{step}"
        name = f"checkpoint-{step}"
        shutil.copytree(folder / "whole" / name, part / name)
        trainer = make(part)
        trainer.train(resume_from_checkpoint=True)
        assert_equal(outcome(trainer), wanted, f"from {step}")
    return wanted
