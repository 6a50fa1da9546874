"""A wrapped model under torch.compile: one graph, the numbers and errors of eager."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import molora
from molora.errors import RoutingError
from molora.model import adapter_parameters, sites
from tests.registered import ROUTED, router_settings

Factory = Callable[..., PreTrainedModel]
IDS = torch.randint(3, 128, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])


def wrapped(
    make: Factory, kind: str = "topk", dropout: float = 0.0, **more: Any
) -> Any:
    raw = {
        "target_modules": ["up_proj", "down_proj"],
        "experts": {"kind": "lora", "num_experts": 4, "r": 2, "lora_dropout": dropout},
        "router": router_settings(kind),
    }
    model: Any = make(num_hidden_layers=1)
    molora.wrap(model, molora.AdapterConfig.from_dict(raw | more))
    generator = torch.Generator().manual_seed(3)
    for name, p in adapter_parameters(model).items():
        p.data.normal_(0, 0.7 if "router" in name else 0.2, generator=generator)
    return model


def compiled(function: Any, backend: str = "aot_eager", **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, **{"fullgraph": True} | options)


def step(model: Any, function: Any) -> list[Tensor]:
    """Loss and gradients of one step, from one state of the global generator."""
    model.zero_grad()
    given = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        loss = function(**given, use_cache=False).loss
        loss.backward()
    grads = [p.grad for p in adapter_parameters(model).values()]
    assert all(grad is not None for grad in grads)
    return [loss.detach(), *grads]  # type: ignore[list-item]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_one_graph_and_equals_eager(
    checkpointing: bool, tiny_llama: Factory
) -> None:
    balance = [{"kind": "switch", "weight": 0.5}]
    model = wrapped(tiny_llama, dropout=0.3, balance=balance).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        # transformers' hook for reentrant checkpointing, which torch cannot compile
        model.disable_input_require_grads()
    want = step(model, model)
    torch.testing.assert_close(step(model, compiled(model)), want)


def test_inference_is_one_graph_and_equals_eager(tiny_llama: Factory) -> None:
    model = wrapped(tiny_llama)
    given = {"input_ids": IDS, "attention_mask": MASK, "use_cache": False}
    with torch.inference_mode():
        want, got = (f(**given).logits for f in (model, compiled(model)))
    torch.testing.assert_close(got, want)


ELSEWHERE: dict[str, tuple[str, dict[str, Any]]] = {
    "block": ("topk", {"scope": "block"}),
    "model": ("topk", {"scope": "model"}),
    "whole FFNs": ("topk", {"scope": "block", "mix": "block"}),
    "task": ("topk", {"input": "task", "tasks": ["scan", "sentiment"]}),
    "adapter": ("adapter", {}),
    "moelora": ("moelora", {}),
}


@pytest.mark.parametrize("name", list(ELSEWHERE))
def test_other_scopes_and_inputs_are_one_graph(name: str, tiny_llama: Factory) -> None:
    kind, settings = ELSEWHERE[name]
    model = wrapped(
        tiny_llama,
        target_modules=["gate_proj", "up_proj", "down_proj"],
        **{"router": router_settings(kind, **settings)},
    )
    with molora.tasks(model, ["scan", "sentiment"]):
        given = {"input_ids": IDS, "attention_mask": MASK, "use_cache": False}
        with torch.inference_mode():
            want, got = (f(**given).logits for f in (model, compiled(model)))
        torch.testing.assert_close(got, want)
        model.train()
        expected = step(model, model)
        torch.testing.assert_close(step(model, compiled(model)), expected)


BY_TOKEN = [
    name
    for name in ROUTED
    # these ask the forward of the model for tasks, a prompt or a first pass
    if name not in ("adapter", "moelora", "hmora", "xlora")
]


@pytest.mark.parametrize("router", BY_TOKEN)
def test_a_layer_with_each_router(router: str, tiny_llama: Factory) -> None:
    site = next(iter(sites(wrapped(tiny_llama, router)).values())).train()
    # arrow keeps what it took from the experts, and looks at them outside the graph
    results, whole = [], router != "arrow"
    for function in (site, compiled(site, fullgraph=whole)):
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        site.zero_grad()
        y = function(x)
        y.square().sum().backward()
        grads = [p.grad for p in site.parameters() if p.requires_grad]
        results.append([y.detach(), x.grad, *grads])
    torch.testing.assert_close(*results)


def test_a_logit_that_is_not_finite_raises_from_the_graph(tiny_llama: Factory) -> None:
    path, site = next(iter(sites(wrapped(tiny_llama)).items()))
    function = compiled(site.train())
    x = torch.randn(1, 5, 32, requires_grad=True)
    assert function(x).isfinite().all()
    with pytest.raises(RoutingError, match=f"{path}.*not finite"):
        function((x * 1e30).detach().mul(1e30).requires_grad_())


def test_a_graph_draws_another_mask_each_time(tiny_llama: Factory) -> None:
    site = next(iter(sites(wrapped(tiny_llama, dropout=0.5)).values())).train()
    function, x = compiled(site), torch.randn(1, 5, 32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        first, second = function(x), function(x)
        torch.manual_seed(7)
        again = function(x)
    assert torch.equal(first, again) and not torch.equal(first, second)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_counted_is_counted_once(reentrant: bool, tiny_llama: Factory) -> None:
    """Records are kept outside the graph, which breaks there."""
    balance = [{"kind": "bias", "weight": 0.1}, {"kind": "switch", "weight": 0.5}]
    more: dict[str, Any] = {"balance": balance, "target_modules": ["down_proj"]}
    model = wrapped(tiny_llama, **more).train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    seen = []
    for function in (model, compiled(model, fullgraph=False)):
        model.molora_runtime.stats = {}
        for site in sites(model).values():
            site.router.load_E = None
        grads = step(model, function)
        stats = model.molora_runtime.stats
        assert all(stat.forwards == 1 for stat in stats.values())
        sums = [stat.gate_sum_E for stat in stats.values()]
        loads = [site.router.load_E for site in sites(model).values()]
        seen.append([*grads, *sums, *loads])
    torch.testing.assert_close(*seen)


def test_inductor_runs_a_layer(tiny_llama: Factory) -> None:
    site = next(iter(sites(wrapped(tiny_llama)).values()))
    x = torch.randn(2, 5, 32)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(site, "inductor")(x), site(x))
