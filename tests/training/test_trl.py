"""The mixin before TRL's SFTTrainer, with the loss that TRL computes by itself."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

import molora
from molora.errors import WrapError
from molora.model import adapter_parameters
from molora.training import MoloraTrainer, MoloraTrainerMixin

Factory = Callable[..., PreTrainedModel]


class MoloraSFTTrainer(MoloraTrainerMixin, SFTTrainer):  # type: ignore[misc]
    pass


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def wrapped(tiny_llama: Factory, targets: Any = ("q_proj", "up_proj")) -> Any:
    config = {
        "target_modules": list(targets),
        "experts": {"kind": "lora", "num_experts": 4, "r": 2, "lora_dropout": 0.2},
        "router": {"kind": "topk", "top_k": 2, "noise": 0.2},
        "balance": [{"kind": "switch", "weight": 0.5}],
    }
    model = tiny_llama(vocab_size=259)
    return molora.wrap(model, molora.AdapterConfig.from_dict(config))


def dataset() -> Dataset:
    words = ["one", "two", "three", "four", "five", "six"]
    pairs = [{"prompt": f"say {w}", "completion": f" {w}, {w}!"} for w in words]
    return Dataset.from_list(pairs)


class Spy(TrainerCallback):
    def __init__(self) -> None:
        self.grads: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(
        self, *args: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.grads.append(
            {n: p.grad.clone() for n, p in adapter_parameters(model).items()}
        )


def arguments(folder: Path, **settings: Any) -> SFTConfig:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": False,
        "bf16": False,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return SFTConfig(**defaults | settings)


def sft(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    callbacks: Any = None,
    **settings: Any,
) -> MoloraSFTTrainer:
    return MoloraSFTTrainer(
        model=model,
        args=arguments(folder, **settings),
        train_dataset=dataset(),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_equal_those_of_the_plain_trainer(
    tiny_llama: Factory,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    reentrant: bool | None,
) -> None:
    """TRL's fused loss against the model's own, balance objective included.

    In float64 but for the loss itself, which both compute in float32.
    """
    spy, other = Spy(), Spy()
    settings: dict[str, Any] = {}
    if reentrant is not None:
        settings["activation_checkpointing"] = True
        settings["activation_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    trainer = sft(wrapped(tiny_llama).double(), tokenizer, tmp_path, [spy], **settings)
    trainer.train()
    # the rows and the collator that TRL made, under transformers' trainer
    plain = MoloraTrainer(
        model=wrapped(tiny_llama).double(),
        args=arguments(tmp_path),
        train_dataset=trainer.train_dataset,
        data_collator=trainer.data_collator,
        callbacks=[other],
    )
    plain.train()
    assert len(spy.grads) == len(other.grads) == 4
    for got, wanted in zip(spy.grads, other.grads, strict=True):
        for name, value in wanted.items():
            error = (got[name] - value).abs().max()
            assert error <= 1e-5 * value.abs().max().clamp(min=1e-6), name
    logs = [log for log in trainer.state.log_history if "loss" in log]
    wanted_logs = [log for log in plain.state.log_history if "loss" in log]
    for log, wanted_log in zip(logs, wanted_logs, strict=True):
        assert log["loss"] == pytest.approx(wanted_log["loss"], rel=1e-4)
        for key in ("entropy_mean", "balance_switch", "live_experts_min"):
            key = f"routing/{key}"
            assert log[key] == pytest.approx(wanted_log[key], rel=1e-3)
        assert "mean_token_accuracy" in log


def test_adapter_on_the_head_is_refused(
    tiny_llama: Factory, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = wrapped(tiny_llama, ["q_proj", "lm_head"])
    with pytest.raises(WrapError, match=r"'lm_head' carries an adapter.*exclude"):
        sft(model, tokenizer, tmp_path)
    # nothing was changed: the plain trainer takes it
    assert "forward" not in vars(model)
    rows = sft(wrapped(tiny_llama), tokenizer, tmp_path)
    MoloraTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=1),
        train_dataset=rows.train_dataset,
        data_collator=rows.data_collator,
    ).train()
    with pytest.raises(WrapError, match=r"molora\.wrap first"):
        sft(tiny_llama(vocab_size=259), tokenizer, tmp_path)


def test_resumed_run_equals_the_whole_one(
    tiny_llama: Factory, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    whole = sft(
        wrapped(tiny_llama), tokenizer, tmp_path, save_strategy="steps", save_steps=3
    )
    whole.train()
    parts = sft(
        wrapped(tiny_llama), tokenizer, tmp_path, save_strategy="steps", save_steps=3
    )
    parts.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    wanted = adapter_parameters(whole.model)
    for name, parameter in adapter_parameters(parts.model).items():
        assert torch.equal(parameter, wanted[name]), name
    first, second = (
        next(log for log in trainer.state.log_history if log["step"] == 4)
        for trainer in (whole, parts)
    )
    assert first["loss"] == second["loss"]
    molora.checkpoint.verify(tmp_path / "checkpoint-4")
    assert (tmp_path / "checkpoint-4" / "tokenizer.json").exists()
