"""A resumed run equals one that never stopped; broken checkpoints are passed over.

Run as a script, this file trains until it is killed (see the kill -9 test).
"""

import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
)

import molora
from molora.errors import CheckpointError, TrainingError
from molora.model import adapter_parameters
from molora.training import Collator, MoloraTrainer, MoloraTrainingSettings, TaskMixture
from molora.training.checkpointing import rotate
from molora.training.mixture import TaskRows
from molora.training.state import read_state, rng_state, set_rng_state, write_state

SPEEDS = re.compile("runtime|per_second|train_loss")
"""What is of one call of train, not of the run."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def wrapped() -> Any:
    shape = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = LlamaForCausalLM(LlamaConfig(**shape))
    experts = {"kind": "lora", "num_experts": 4, "r": 2, "lora_dropout": 0.2}
    router = {"kind": "topk", "top_k": 2, "noise": 0.5, "init_range": 0.3}
    config = molora.AdapterConfig.from_dict(
        {
            "target_modules": ["q_proj", "up_proj"],
            "experts": experts,
            "router": router,
            "balance": [{"kind": "switch", "weight": 0.1}],
        }
    )
    return molora.wrap(base, config)


def mixture() -> TaskMixture:
    """Epochs of 10 rows: 5 micro-batches of 2, 3 steps of 2, 2 and 1 of these."""
    generator = torch.Generator().manual_seed(1)
    parts = []
    for task, name in enumerate(["sql", "chat"]):
        part = TaskRows(name)
        for _ in range(9):
            length = int(torch.randint(4, 9, (1,), generator=generator))
            ids = torch.randint(3, 128, (length,), generator=generator).tolist()
            labels = [-100, -100, *ids[2:]]
            part.add({"input_ids": ids, "labels": labels, "task_id": task})
        parts.append(part)
    return TaskMixture(parts, [0.7, 0.3], 10)


class Poison(TrainerCallback):
    """Makes one gradient NaN in the given steps (0-based)."""

    def __init__(self, model: Any, steps: set[int]):
        self.bad = False
        self.steps = steps
        parameter = next(iter(adapter_parameters(model).values()))
        parameter.register_hook(lambda g: g * float("nan") if self.bad else g)

    def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        self.bad = state.global_step in self.steps


def trainer_for(folder: Path, poison: Any = (), **settings: Any) -> MoloraTrainer:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "logging_steps": 3,
        "save_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    model = wrapped()
    return MoloraTrainer(
        model=model,
        args=TrainingArguments(**defaults | settings),
        train_dataset=mixture(),
        data_collator=Collator(0),
        callbacks=[Poison(model, set(poison))],
        settings=MoloraTrainingSettings(collapse_window=4),
    )


def outcome(trainer: MoloraTrainer) -> dict[str, Any]:
    """Everything that must not depend on whether the run was stopped."""
    state = trainer.optimizer.state_dict()
    logs = [
        {k: v for k, v in log.items() if not SPEEDS.search(k)}
        for log in trainer.state.log_history
    ]
    return {
        "adapter": {n: p.data for n, p in adapter_parameters(trainer.model).items()},
        "optimizer": state,
        "scheduler": trainer.lr_scheduler.state_dict(),
        "logs": logs,
        "generators": rng_state(),
        "guard": trainer.guard.state(),
        "window": list(trainer.monitor.window) if trainer.monitor else None,
        "file": (Path(trainer.args.output_dir) / "routing_log.jsonl").read_text(),
    }


def assert_equal(got: Any, wanted: Any, place: str = "") -> None:
    """Equal bit for bit; NaN equals NaN."""
    if isinstance(wanted, Tensor):
        assert got.dtype == wanted.dtype, place
        torch.testing.assert_close(
            got, wanted, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{place}: {m}"
        )
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run that was never stopped, with a checkpoint after each of its 8 steps."""
    folder = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trainer = trainer_for(folder, poison={1, 4})
    trainer.train()
    torch.set_num_threads(threads)
    return folder, outcome(trainer)


# after a skipped step and inside a log window; at the end of an epoch; mid-epoch
@pytest.mark.parametrize("step", [2, 3, 5])
def test_resumed_run_equals_the_whole_one(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, step: int
) -> None:
    folder, wanted = whole
    for name in (f"checkpoint-{step}", "routing_log.jsonl"):
        source = folder / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    trainer = trainer_for(tmp_path, poison={1, 4})
    trainer.train(resume_from_checkpoint=True)
    assert trainer.guard.total == 2
    assert_equal(outcome(trainer), wanted)


def test_resuming_twice_in_one_folder(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """A callback stops the run, as a user would; it is resumed by path and by True."""

    class Stop(TrainerCallback):
        def __init__(self, step: int):
            self.step = step

        def on_step_end(self, a: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= state.global_step == self.step

    for last, resume in ((4, None), (7, str(tmp_path / "checkpoint-4")), (9, True)):
        trainer = trainer_for(tmp_path, poison={1, 4})
        trainer.add_callback(Stop(last))
        trainer.train(resume_from_checkpoint=resume)
    got = outcome(trainer)
    # each call ends with a summary
    got["logs"] = [log for log in got["logs"] if "loss" in log]
    wanted = [log for log in whole[1]["logs"] if "loss" in log]
    assert_equal(got, {**whole[1], "logs": wanted})


def test_killed_run_equals_the_whole_one(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        limit = time.monotonic() + 120
        while not (tmp_path / "checkpoint-3").exists() and child.poll() is None:
            assert time.monotonic() < limit
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == -signal.SIGKILL
    assert not (tmp_path / "checkpoint-8").exists()
    trainer = trainer_for(tmp_path, poison={1, 4})
    trainer.train(resume_from_checkpoint=True)
    assert_equal(outcome(trainer), whole[1])


def test_checkpoint_holds_everything_and_no_pickle(
    whole: tuple[Path, dict[str, Any]],
) -> None:
    folder = whole[0] / "checkpoint-5"
    manifest = molora.checkpoint.verify(folder)
    names = {path.name for path in folder.iterdir()}
    assert set(manifest["files"]) == names - {"manifest.json", "README.md"}
    assert {Path(name).suffix for name in names} <= {".json", ".safetensors", ".md"}
    assert manifest["extra"] == {"step": 5}
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == 5
    assert not list(whole[0].glob(".*"))


@pytest.fixture
def three(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    for step in (3, 4, 5):
        name = f"checkpoint-{step}"
        shutil.copytree(whole[0] / name, tmp_path / name)
    return tmp_path


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_broken_checkpoints_are_named_and_passed_over(
    three: Path, whole: tuple[Path, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    flip_bit(three / "checkpoint-5" / "optimizer.safetensors")
    (three / "checkpoint-4" / "progress.json").unlink()
    shutil.copy(whole[0] / "routing_log.jsonl", three)
    trainer = trainer_for(three, poison={1, 4})
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    warning = next(r.getMessage() for r in caplog.records if "resuming" in r.message)
    assert "checkpoint-3," in warning
    assert "checkpoint-5: " in warning and "optimizer.safetensors" in warning
    assert "checkpoint-4: " in warning and "progress.json" in warning
    assert_equal(outcome(trainer), whole[1])


def test_nothing_to_resume_from(three: Path) -> None:
    flip_bit(three / "checkpoint-5" / "adapter_model.safetensors")
    trainer = trainer_for(three)
    with pytest.raises(CheckpointError, match=r"adapter_model.*checkpoint-4$"):
        trainer.train(resume_from_checkpoint=str(three / "checkpoint-5"))
    for step in (3, 4):
        (three / f"checkpoint-{step}" / "manifest.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"no valid checkpoint[\s\S]*checkpoint-3"
    ):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="elsewhere: does not exist"):
        trainer.train(resume_from_checkpoint=str(three / "elsewhere"))


def test_adapter_without_training_state_is_not_resumed_from(tmp_path: Path) -> None:
    trainer_for(tmp_path, max_steps=1, save_only_model=True).train()
    with pytest.raises(CheckpointError, match=r"lacks optimizer\.json.*molora\.load"):
        trainer_for(tmp_path).train(resume_from_checkpoint=True)


def test_changed_settings_are_told(
    three: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_for(three, gradient_accumulation_steps=1, max_steps=6)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=str(three / "checkpoint-5"))
    assert "gradient_accumulation_steps, max_steps changed" in caplog.text


def test_nan_streak_counts_on_across_a_stop(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, poison=range(1, 5), max_steps=4)
    trainer.train()
    assert trainer.guard.state() == {"in_row": 3, "total": 3}
    trainer = trainer_for(tmp_path, poison=range(1, 50), max_steps=20)
    with pytest.raises(TrainingError, match="step 11.*10 steps in a row"):
        trainer.train(resume_from_checkpoint=True)


def test_best_model_is_loaded_and_kept(tmp_path: Path) -> None:
    losses = iter([3.0, 1.0, 2.0, 4.0])

    class Scored(MoloraTrainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            metrics = {"eval_loss": next(losses)}
            self.log(dict(metrics))
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, metrics
            )
            return metrics

    model = wrapped()
    seen: dict[int, dict[str, Tensor]] = {}

    class Keep(TrainerCallback):
        def on_step_end(self, a: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            seen[state.global_step] = {
                n: p.detach().clone() for n, p in adapter_parameters(model).items()
            }

    trainer = Scored(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            eval_strategy="steps",
            eval_steps=1,
            save_steps=1,
            save_total_limit=2,
            load_best_model_at_end=True,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=mixture(),
        eval_dataset=mixture(),
        data_collator=Collator(0),
        callbacks=[Keep()],
    )
    trainer.train()
    best = tmp_path / "checkpoint-2"
    assert trainer.state.best_model_checkpoint == str(best)
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-4"]
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == str(best)
    saved = json.loads((best / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == str(best)
    for name, parameter in adapter_parameters(model).items():
        assert torch.equal(parameter, seen[2][name])
        assert not torch.equal(parameter, seen[4][name])


def test_saved_model_is_an_adapter_without_pickle(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    trainer = trainer_for(tmp_path, max_steps=1)
    trainer.processing_class = tokenizer
    trainer.train()
    for folder in (tmp_path / "out", tmp_path):
        trainer.save_model(str(folder))
        trainer.save_model(str(folder))
        manifest = molora.checkpoint.verify(folder)
        assert set(manifest["files"]) == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        assert (folder / "tokenizer.json").exists()
        assert not list(folder.glob("*.bin"))
    assert (
        "tokenizer.json" in molora.checkpoint.verify(tmp_path / "checkpoint-1")["files"]
    )


def names(folder: Path) -> set[int]:
    return {int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")}


@pytest.mark.parametrize(
    ("limit", "step", "best", "left"),
    [
        (None, 5, None, {1, 2, 5, 9}),
        (2, 5, None, {2, 5}),
        (1, 5, None, {5}),
        (1, 5, 1, {1, 5}),
        (2, 5, 9, {5, 9}),
        (3, 5, None, {1, 2, 5}),
    ],
)
def test_rotation(
    tmp_path: Path, limit: int | None, step: int, best: int | None, left: set[int]
) -> None:
    """9 is left from beyond step 5, where the run was resumed earlier."""
    for number in (1, 2, 5, 9):
        (tmp_path / f"checkpoint-{number}").mkdir()
    (tmp_path / "checkpoint-notes").mkdir()
    keep = [tmp_path / f"checkpoint-{n}" for n in (step, best) if n]
    rotate(tmp_path, limit, keep, step)
    (tmp_path / "checkpoint-notes").rmdir()
    assert names(tmp_path) == left


def test_state_keeps_every_bit(tmp_path: Path) -> None:
    state = {
        "floats": [0.1, float("inf"), -0.0, 1e-310],
        "nan": float("nan"),
        3: (True, None, "text", -(2**70)),
        "nested": {"tensor": torch.tensor([0.1, float("nan")]), "empty": []},
        "bits": torch.tensor([[1, 2]], dtype=torch.uint8)[:, ::2],
        "half": torch.tensor(1.7, dtype=torch.bfloat16),
        "tensor": ["tensor", "0"],
    }
    write_state(tmp_path, "some", state)
    back = read_state(tmp_path, "some")
    assert_equal(back, state)
    assert [type(v) for v in back[3]] == [bool, type(None), str, int]
    assert str(back["floats"]) == str(state["floats"])
    with pytest.raises(CheckpointError, match=r"some\.a\.b: a set cannot be stored"):
        write_state(tmp_path, "some", {"a": {"b": set()}})
    (tmp_path / "some.json").write_text("[")
    with pytest.raises(CheckpointError, match="not a saved state"):
        read_state(tmp_path, "some")


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    draws: list[Callable[[], Any]] = [
        random.random,
        lambda: random.gauss(0, 1),
        np.random.rand,
        np.random.randn,
        lambda: torch.rand(3).tolist(),
        lambda: torch.randn(1).tolist(),
    ]
    for draw in draws:
        draw()
    write_state(tmp_path, "rng", rng_state())
    wanted = [draw() for draw in draws]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    set_rng_state(read_state(tmp_path, "rng"))
    assert [draw() for draw in draws] == wanted


if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer_for(Path(sys.argv[1]), poison={1, 4}).train()
