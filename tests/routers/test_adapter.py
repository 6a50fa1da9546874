"""A given adapter per row: other implementations' numbers, PEFT alone, what is refused.

What holds for every router at inference is in test_inference.py; training is in
training/test_apart.py, the import of adapters in interop/test_adapters_per_row.py.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import molora
from molora.errors import ConfigError, RoutingError
from molora.kernels import choice, dispatch
from molora.kernels.cost_model import Machine
from molora.model import adapter_parameters, sites
from tests.oracle import DTYPES, Layer, load, near

Factory = Callable[..., PreTrainedModel]
NAMES = ["ad0", "ad1", "ad2", "ad3"]


def config(**changes: Any) -> molora.AdapterConfig:
    raw: dict[str, Any] = {
        "target_modules": ["lin"],
        "experts": {"kind": "lora", "num_experts": 4, "r": 2},
        "router": {"kind": "adapter", "adapters": NAMES},
    }
    return molora.AdapterConfig.from_dict(raw | changes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_have_the_outputs_and_gradients_of_peft(dtype: torch.dtype) -> None:
    t = load("batched_adapters")
    ranks = t["plain.rank"].tolist()
    alphas = [float(s) * r for s, r in zip(t["scales"], ranks, strict=True)]
    experts = {"kind": "lora", "num_experts": 4, "r": ranks, "lora_alpha": alphas}
    model: Any = molora.wrap(
        Layer(t["base.weight"].clone(), t["base.bias"]), config(experts=experts)
    ).to(dtype)
    site: Any = sites(model)["lin"]
    with torch.no_grad():
        site.experts.A.copy_(t["plain.A"])
        site.experts.Bt.copy_(t["plain.B"].transpose(1, 2))
    x = t["x"].to(dtype).requires_grad_()
    ids = t["adapter_ids"].tolist()
    assert -1 in ids and len(set(ids)) == 5
    with molora.tasks(model, [NAMES[i] if i >= 0 else "base" for i in ids]):
        y = model(x)
    objective = (y * t["c"].to(dtype)).sum()
    objective.backward()
    near(y.detach(), t["y"], "y")
    near(objective.detach(), t["objective"], "objective")
    near(x.grad, t["grad.x"], "grad.x")
    near(site.experts.A.grad, t["grad.A"], "grad.A")
    near(site.experts.Bt.grad.transpose(1, 2), t["grad.B"], "grad.B")


@pytest.mark.parametrize("case", ["bgmv", "sgmv"])
def test_punicas_reference_functions(case: str) -> None:
    t = load("batched_adapters")
    model: Any = molora.wrap(
        Layer(torch.zeros(40, 24).double(), None),
        config(experts={"kind": "lora", "num_experts": 4, "r": 5, "lora_alpha": 5}),
    ).double()
    site: Any = sites(model)["lin"]
    with torch.no_grad():
        site.experts.A.copy_(t["plain.A"])
        site.experts.Bt.copy_(t["plain.B"].transpose(1, 2))
    if case == "bgmv":
        index, x, scale = t["punica.indices"], t["punica.x"], float(t["punica.scale"])
    else:
        counts = t["punica.sgmv_segments"].diff().long()
        index = torch.repeat_interleave(torch.arange(4), counts)
        x, scale = t["punica.sgmv_x"], 1.0
    with molora.tasks(model, [NAMES[i] for i in index.tolist()]):
        y = model(x.double()[:, None])[:, 0] * scale
    want = t[f"punica.{case}_delta"]
    # float32 numbers
    assert (y - want).abs().max() < 1e-6 * (1 + want.abs().max())


def test_base_rows_are_the_base_to_the_bit(tiny_llama: Factory) -> None:
    model: Any = molora.wrap(tiny_llama(), config(target_modules="all-linear"))
    generator = torch.Generator().manual_seed(3)
    for p in adapter_parameters(model).values():
        p.data.normal_(0, 0.3, generator=generator)
    ids = torch.arange(3, 43).view(4, 10)
    with torch.no_grad(), molora.disabled(model):
        plain = model(ids).logits
    with torch.no_grad(), molora.tasks(model, ["base", "ad1", "base", "ad3"]):
        logits = model(ids).logits
    assert torch.equal(logits[0], plain[0]) and torch.equal(logits[2], plain[2])
    assert (logits[1] - plain[1]).abs().max() > 0.1
    assert (logits[3] - plain[3]).abs().max() > 0.1


def test_the_cost_follows_the_adapters_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 64 adapters a row uses one: the kernels are told, and skip the others."""
    model: Any = molora.wrap(
        Layer(torch.zeros(64, 64), None),
        config(
            experts={"kind": "lora", "num_experts": 64, "r": 64},
            router={"kind": "adapter", "adapters": [f"ad{i}" for i in range(64)]},
        ),
    )
    # a machine on which only multiplications take time
    rates = Machine(gemm=1e9, grouped=1e9, bandwidth=1e15, launch=0.0)
    monkeypatch.setattr(choice.machine, "cpu", lambda *args: rates)
    taken: list[tuple[str, int]] = []
    choose = dispatch.choose

    def watch(*args: Any) -> str:
        taken.append((choose(*args), args[-2]))
        return taken[-1][0]

    monkeypatch.setattr(dispatch, "choose", watch)
    choice._known_on_cpu.cache_clear()
    x = torch.randn(8, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), molora.tasks(model, [f"ad{i}" for i in range(8)]):
        model(x)
    choice._known_on_cpu.cache_clear()
    assert taken == [("sorted", 1)]


def test_missing_and_unknown_names_are_told() -> None:
    model: Any = molora.wrap(Layer(torch.eye(8), None), config())
    x = torch.zeros(2, 5, 8)
    known = r"\['ad0', 'ad1', 'ad2', 'ad3', 'base'\]"
    with pytest.raises(RoutingError, match=f"'lin': .*none is named.*{known}"):
        model(x)
    unknown = rf"no adapter is called \['poem'\]; run inside .*{known}"
    with (
        molora.tasks(model, ["ad0", "poem"]),
        pytest.raises(RoutingError, match=unknown),
    ):
        model(x)
    with (
        molora.tasks(model, ["ad0", "ad1", "base"]),
        pytest.raises(RoutingError, match="3 tasks for a batch of 2 rows"),
    ):
        model(x)
    # the names of one forward are not those of the next
    gates = []
    for names in (["ad0", "ad1"], ["ad1", "base"]):
        with molora.tasks(model, names), molora.record_routing(model) as trace:
            model(x)
        gates.append(trace.sites["lin"].gates[0][:, 0].tolist())
    assert gates == [[[1, 0, 0, 0], [0, 1, 0, 0]], [[0, 1, 0, 0], [0, 0, 0, 0]]]


def test_gates_made_in_inference_mode_are_not_kept_for_training() -> None:
    model: Any = molora.wrap(Layer(torch.eye(8), None), config())
    x = torch.ones(2, 5, 8)
    with molora.tasks(model, ["ad2", "base"]):
        with torch.inference_mode():
            model(x)
        model(x).sum().backward()
    grad = sites(model)["lin"].experts.Bt.grad
    assert grad is not None and grad[2].abs().sum() > 0
    assert not grad[[0, 1, 3]].any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapters": ["a", "b", "b", "c"]}, r"used twice: \['b'\]"),
        ({"adapters": ["a", "b", "c", "base"]}, "'base', which means no adapter"),
        ({"adapters": ["a", "b"]}, "names 2 adapters for num_experts=4"),
        ({}, "adapters: this field is required"),
    ],
)
def test_bad_settings(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(router={"kind": "adapter", **changes})


def test_there_is_nothing_to_balance_and_no_single_adapter() -> None:
    with pytest.raises(ConfigError, match="are no probabilities"):
        config(balance=[{"kind": "switch", "weight": 0.1}])
    with pytest.raises(ConfigError, match="one expert needs no router"):
        config(
            experts={"kind": "lora", "num_experts": 1},
            router={"kind": "adapter", "adapters": ["ad0"]},
        )


def test_selecting_one_adapter_is_exact(tiny_llama: Factory) -> None:
    ids = torch.arange(3, 43).view(4, 10)
    for number, name in enumerate(NAMES):
        model: Any = molora.wrap(tiny_llama(), config(target_modules="all-linear"))
        generator = torch.Generator().manual_seed(3)
        for p in adapter_parameters(model).values():
            p.data.normal_(0, 0.3, generator=generator)
        model.double()
        with torch.no_grad(), molora.tasks(model, [name]):
            want = model(ids).logits
        result = molora.collapse(
            model,
            "select",
            expert=number,
            tasks=[name],
            calibration=[{"input_ids": ids, "tasks": [NAMES[0], name, name, "base"]}],
            show_progress=False,
        )
        # the root of a difference of sums, which rounds to 1e-16 of them
        assert result.report.mean_error < 1e-7
        with torch.no_grad():
            got = model.double()(ids).logits
        assert all(site.router is None for site in sites(model).values())
        assert (got - want).abs().max() < 1e-10, name
