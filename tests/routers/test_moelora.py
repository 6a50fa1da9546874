"""MOELoRA: against the authors' numbers, collapsed for one task, refused settings."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import molora
from molora.errors import ConfigError, RoutingError
from molora.model import adapter_parameters, sites
from tests.oracle import DTYPES, build, load, near

Factory = Callable[..., PreTrainedModel]
NAMES = [f"t{i}" for i in range(5)]


def made(dtype: torch.dtype) -> tuple[dict[str, Tensor], Any, Any]:
    t = load("moelora")
    router = {"kind": "moelora", "tasks": NAMES, "embedding_size": 6}
    model, site = build(t, dtype, router=router)
    with torch.no_grad():
        site.router.embedding.copy_(t["plain.task_embedding"])
    return t, model, site


def tasks_of(ids: Tensor) -> list[str]:
    return [NAMES[i] for i in ids.tolist()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_authors_numbers(dtype: torch.dtype) -> None:
    """Their layout is [S, B, I], ours [B, S, I]."""
    t, model, site = made(dtype)
    x = t["x"].transpose(0, 1).to(dtype).requires_grad_()
    names = tasks_of(t["task_id"])
    with molora.tasks(model, names), molora.record_routing(model) as trace:
        y = model(x)
        batch_first = model(t["batch_first.x"].to(dtype)).detach()
    (y * t["c"].transpose(0, 1).to(dtype)).sum().backward()
    near(y.detach(), t["y"].transpose(0, 1), "y")
    near(batch_first, t["alt.batch_first.y"], "batch first")
    gates = t["gates"][:, None].expand(-1, x.shape[1], -1)
    near(trace.sites["lin"].gates[0], gates, "gates")
    assert x.grad is not None
    near(x.grad, t["grad.x"].transpose(0, 1), "x")
    near(site.experts.A.grad, t["grad.A"], "A")
    near(site.experts.Bt.grad.transpose(1, 2), t["grad.B"], "B")
    near(site.router.gate.weight.grad, t["grad.router"], "router")
    near(site.router.embedding.grad, t["grad.task_embedding"], "embedding")


def test_one_task_collapses_to_the_authors_merged_weight() -> None:
    t, model, site = made(torch.float64)
    names = tasks_of(t["merge.task_id"])
    x = t["batch_first.x"]
    with torch.no_grad(), molora.tasks(model, names):
        want = model(x)
    batches = [{"inputs_embeds": x, "tasks": names * len(x)}]
    result = molora.collapse(model, method="concat", calibration=batches)
    assert result.report.mean_error < 1e-6
    merged = site.base.weight + sites(model)["lin"].delta_weight()
    assert (merged - t["merge.weight"]).abs().max() < 1e-6
    with torch.no_grad():
        assert (model(x) - want).abs().max() < 1e-5


def tiny(make: Factory, **router: Any) -> Any:
    raw = {
        "target_modules": ["q_proj"],
        "experts": {"kind": "lora", "num_experts": 4, "r": 2},
        "router": {"kind": "moelora", **router},
    }
    return molora.wrap(make(), molora.AdapterConfig.from_dict(raw), seed=0)


def test_it_starts_near_uniform_and_different_per_task(tiny_llama: Factory) -> None:
    model = tiny(tiny_llama, tasks=NAMES)
    shapes = {
        name.rpartition("router.")[2]: tuple(p.shape)
        for name, p in adapter_parameters(model).items()
        if "router" in name
    }
    assert shapes == {"gate.weight": (4, 64), "embedding": (5, 64)}
    with molora.tasks(model, NAMES), molora.record_routing(model) as trace:
        model(torch.full((5, 3), 7))
    for record in trace.sites.values():
        gates = record.gates[0]
        assert (gates - 0.25).abs().max() < 0.15
        assert torch.equal(gates[:, 0], gates[:, 2])
        assert (gates[0, 0] - gates[1, 0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({}, "router.tasks: this field is required"),
        ({"tasks": ["a"], "input": "token"}, "router.input: Input should be 'task'"),
        ({"tasks": ["a", "a"]}, "a name is listed twice"),
        ({"tasks": []}, "router.tasks: List should have at least 1 item"),
        ({"tasks": ["a"], "capacity": 1.5}, "nothing can overflow"),
    ],
)
def test_wrong_settings_are_refused(
    router: Any, message: str, tiny_llama: Factory
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(tiny_llama, **router)


def test_a_row_without_a_known_task_is_refused(tiny_llama: Factory) -> None:
    model = tiny(tiny_llama, tasks=["sql"])
    with pytest.raises(RoutingError, match="needs the task of every row"):
        model(torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(RoutingError, match="chat"), molora.tasks(model, ["chat"]):
        model(torch.ones(1, 3, dtype=torch.long))
