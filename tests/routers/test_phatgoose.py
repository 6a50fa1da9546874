"""PHATGOOSE: its router against the authors' numbers, and how vectors are learned."""

from pathlib import Path
from typing import Any

import pytest
import torch

import molora
from molora.checkpoint import load_adapter_state
from molora.context import ForwardContext
from molora.errors import ConfigError, RoutingError
from molora.model import adapter_parameters, sites
from tests.oracle import DTYPES, Layer, build, check, load, near

WIDE = 6


@pytest.mark.parametrize("dtype", DTYPES)
def test_inference_router(dtype: torch.dtype) -> None:
    t = load("phatgoose")
    router = {"kind": "phatgoose", "top_k": int(t["top_k"])}
    model, site = build(t, dtype, router=router)
    check(t, model, site)
    x = t["x"].to(dtype).flatten(0, 1)
    probs = site.router(x, ForwardContext()).probs.detach()
    assert near(probs.view_as(t["router_probs"]), t["router_probs"], "probabilities")


@pytest.mark.parametrize("dtype", DTYPES)
def test_second_stage(dtype: torch.dtype) -> None:
    t = load("phatgoose_stage2")
    # a second expert, which rows of this task do not use
    two = {
        "plain.A": torch.cat([t["plain.A"], t["plain.A"] + 1]),
        "plain.B": torch.cat([t["plain.B"], t["plain.B"] - 1]),
        "plain.router": torch.stack([t["plain.gate_vector"], t["plain.gate_vector"]]),
    }
    router = {"kind": "sigmoid", "task_experts": {"sql": 0, "chat": 1}}
    model, site = build(t | two, dtype, router=router)
    x = t["x"].to(dtype).requires_grad_()
    with (
        molora.tasks(model, ["sql"] * len(x)),
        molora.record_routing(model) as trace,
    ):
        y = model(x)
    (y * t["c"].to(dtype)).sum().backward()
    assert near(y.detach(), t["y"], "y")
    assert near(trace.sites["lin"].gates[0][..., 0], t["input_gate"], "gate")
    assert near(x.grad, t["grad.x"], "x")
    assert near(site.experts.A.grad[:1], t["grad.A"], "A")
    assert near(site.experts.Bt.grad[:1].transpose(1, 2), t["grad.B"], "B")
    assert near(site.router.gate.weight.grad[0], t["grad.gate_vector"], "vector")
    # the other expert and its vector learn nothing from these rows
    for grad in (site.experts.A, site.experts.Bt, site.router.gate.weight):
        assert float(grad.grad[1].abs().sum()) == 0


def config(router: dict[str, Any]) -> molora.AdapterConfig:
    return molora.AdapterConfig.from_dict(
        {
            "target_modules": ["lin"],
            "experts": {"kind": "lora", "num_experts": 3, "r": 2},
            "router": router,
        }
    )


TASKS = {"kind": "sigmoid", "task_experts": {"sql": 0, "chat": 1, "code": 2}}


def test_each_row_uses_the_expert_of_its_task() -> None:
    model = molora.wrap(Layer(torch.eye(WIDE), None), config(TASKS))
    x = torch.randn(4, 5, WIDE, generator=torch.Generator().manual_seed(0))
    with (
        molora.tasks(model, ["chat", "sql", "code", "sql"]),
        molora.record_routing(model) as trace,
    ):
        model(x)
    gates = trace.sites["lin"].gates[0]
    assert (gates > 0).int().sum(1).tolist() == [
        [0, 5, 0],
        [5, 0, 0],
        [0, 0, 5],
        [5, 0, 0],
    ]


def test_vectors_go_from_one_router_to_the_other(tmp_path: Path) -> None:
    first: Any = molora.wrap(Layer(torch.eye(WIDE), None), config(TASKS))
    site: Any = sites(first)["lin"]
    torch.nn.init.normal_(site.router.gate.weight)
    second: Any = molora.wrap(
        Layer(torch.eye(WIDE), None), config({"kind": "phatgoose"})
    )
    names = list(adapter_parameters(first))
    assert names == list(adapter_parameters(second))
    second.load_state_dict(first.state_dict())
    gate: Any = sites(second)["lin"].router
    assert torch.equal(gate.gate.weight, site.router.gate.weight)
    # the strict loader refuses another config, as ever
    first.save_pretrained(tmp_path / "a")
    with pytest.raises(molora.errors.CheckpointError, match="another adapter config"):
        load_adapter_state(second, tmp_path / "a")


def test_missing_and_unknown_tasks_are_named() -> None:
    model = molora.wrap(Layer(torch.eye(WIDE), None), config(TASKS))
    x = torch.zeros(2, 5, WIDE)
    with pytest.raises(RoutingError, match="'lin': router.task_experts needs the task"):
        model(x)
    with (
        molora.tasks(model, ["sql", "poem"]),
        pytest.raises(RoutingError, match=r"knows .*'sql'\], not \['poem'\]"),
    ):
        model(x)


@pytest.mark.parametrize(
    ("router", "balance", "words"),
    [
        (TASKS | {"task_experts": {"a": 3}}, [], r"names \[3\], but .* from 0 to 2"),
        ({"kind": "sigmoid", "expert_dropout": 0.1}, [], "would take the gate over"),
        ({"kind": "sigmoid", "capacity": 2.0}, [], "nothing can overflow"),
        (
            {"kind": "sigmoid"},
            ["switch"],
            r"balance\[0\]: the gates of this router.kind",
        ),
        ({"kind": "sigmoid"}, ["cv2"], "are no probabilities"),
    ],
)
def test_bad_settings(router: Any, balance: list[str], words: str) -> None:
    raw = {
        "target_modules": ["lin"],
        "experts": {"kind": "lora", "num_experts": 3},
        "router": router,
        "balance": [{"kind": kind, "weight": 1.0} for kind in balance],
    }
    with pytest.raises(ConfigError, match=words):
        molora.AdapterConfig.from_dict(raw)
