"""Runs that would train nothing, or some experts never, are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TrainingArguments

import molora
from molora.errors import ConfigError, TrainingError
from molora.model import sites
from molora.run_config import load_run_config
from molora.training import MoloraTrainer
from molora.training.apart import is_apart
from molora.training.checks import check_model

Factory = Callable[..., PreTrainedModel]
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def model_with(make: Factory, **settings: Any) -> Any:
    raw = {
        "target_modules": ["q_proj"],
        "experts": {"kind": "lora", "num_experts": 4, "r": 2},
        **settings,
    }
    return molora.wrap(make(), molora.AdapterConfig.from_dict(raw))


def check(model: Any, tmp_path: Path) -> None:
    check_model(model, MoloraTrainer, TrainingArguments(str(tmp_path), report_to=[]))


def fill(model: Any, experts: int) -> None:
    with torch.no_grad():
        for site in sites(model).values():
            site.experts.Bt[:experts].fill_(0.1)


def test_arrow_needs_experts_that_were_trained(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    model = model_with(tiny_llama, router={"kind": "arrow", "top_k": 2})
    fill(model, 3)
    with pytest.raises(TrainingError, match="some of these are still zero"):
        check(model, tmp_path)
    fill(model, 4)
    check(model, tmp_path)


def test_a_router_alone_needs_experts_that_are_not_zero(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    router = {"kind": "topk", "top_k": 2}
    model = model_with(tiny_llama, router=router, train="router")
    with pytest.raises(TrainingError, match="frozen and still zero"):
        check(model, tmp_path)
    fill(model, 4)
    check(model, tmp_path)


def test_adapters_of_rows_have_no_router_to_train(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    router = {"kind": "adapter", "adapters": ["a", "b", "c", "d"]}
    model = model_with(tiny_llama, router=router, train="router")
    with pytest.raises(TrainingError, match="nothing is left to train; set train: all"):
        check(model, tmp_path)
    check(model_with(tiny_llama, router=router), tmp_path)


def test_a_layer_with_one_expert_beside_adapters_of_rows(
    tiny_llama: Factory,
) -> None:
    router = {"kind": "adapter", "adapters": ["a", "b", "c", "d"]}
    one = {"match": "layers.0", "experts": {"num_experts": 1}}
    with pytest.raises(ConfigError, match=r"set num_experts to 4.*exclude_modules"):
        model_with(tiny_llama, router=router, overrides=[one])
    plain = one | {"router": {"kind": "none"}}
    model = model_with(tiny_llama, router=router, overrides=[plain])
    with pytest.raises(TrainingError, match="num_experts: 4 as .*exclude_modules"):
        is_apart(model)


def test_tasks_that_sigmoid_gates_do_not_know() -> None:
    wrong = "adapter.router.task_experts={nope: 0, other: 1}"
    with pytest.raises(ConfigError, match="sigmoid knows no expert for the tasks"):
        load_run_config(CONFIGS / "sigmoid.yaml", [wrong])


def test_sigmoid_gates_by_task_collapse(tiny_llama: Factory) -> None:
    tasks = {"a": 0, "b": 1, "c": 2, "d": 3}
    model = model_with(tiny_llama, router={"kind": "sigmoid", "task_experts": tasks})
    fill(model, 4)
    molora.collapse(model, method="linear")
    # in place: one expert per layer, and no router
    assert all(site.router is None for site in sites(model).values())
