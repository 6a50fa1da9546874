"""HMoRA: against the authors' numbers, the prompt mean, the schedule, refused settings.

In the authors' vectors the task representation is given; here it comes as the mean that
a cache kept of the prompt.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import molora
from molora.context import ForwardContext
from molora.errors import ConfigError, RoutingError, WrapError
from molora.model import adapter_parameters, sites
from molora.prompt import Prompt
from tests.oracle import DTYPES, Layer, build, load, near

Factory = Callable[..., PreTrainedModel]
TOKENS_ALONE = -1e4
"""Alpha whose sigmoid is zero: the task router has no part."""


def made(
    t: dict[str, Tensor], dtype: torch.dtype, router: dict[str, Any], balance: str
) -> tuple[Any, Any]:
    router = {"kind": "hmora", "epsilon": 0.0, **router}
    model, site = build(t, dtype, router=router, balance=1.0, kind=balance)
    own = site.router
    with torch.no_grad():
        own.gate.bias.copy_(t["plain.router_bias"])
        own.alpha.copy_(t.get("alpha", torch.tensor(TOKENS_ALONE)))
        for name, values in (("weight", "router"), ("bias", "router_bias")):
            if f"plain.task_{values}" in t:
                getattr(own.task_gate, name).copy_(t[f"plain.task_{values}"])
    model.molora_runtime.stats = {}
    return model, site


def run(t: dict[str, Tensor], model: Any, site: Any, mean: Tensor) -> Any:
    """Output, recorded gates and gradient of x, with the prompt mean given."""
    dtype = site.experts.A.dtype
    x = t["x"].to(dtype).requires_grad_()
    context = ForwardContext(
        t["mask"].bool(), rows=2, prompt=Prompt(None, {"lin": mean.to(dtype)}, "given")
    )
    runtime = model.molora_runtime
    with molora.record_routing(model) as trace, runtime.use(context, 0):
        y = site(x)
    (y * t["c"].to(dtype)).sum().backward()
    return y.detach(), trace.sites["lin"].gates[0], x.grad


def check_gradients(t: dict[str, Tensor], site: Any, dx: Tensor) -> None:
    experts, router = site.experts, site.router
    dA = experts.A.grad
    got = {
        "x": dx,
        "A": dA if t["grad.A"].dim() == 3 else dA[0],
        "B": experts.Bt.grad.transpose(1, 2),
        "router": router.gate.weight.grad,
        "router_bias": router.gate.bias.grad,
        "task_router": router.task_gate.weight.grad,
        "task_router_bias": router.task_gate.bias.grad,
        "alpha": router.alpha.grad,
    }
    names = {name.removeprefix("grad.") for name in t if name.startswith("grad.")}
    assert names <= got.keys()
    for name, value in got.items():
        if name in names:
            assert near(value, t[f"grad.{name}"], f"grad.{name}")
        else:
            assert not value.any(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_token_router_with_the_second_softmax(dtype: torch.dtype) -> None:
    t = load("hmora_topk")
    router = {"top_k": int(t["top_k"]), "second_softmax": True}
    model, site = made(t, dtype, router, "switch")
    y, gates, dx = run(t, model, site, torch.ones(2, 24))
    assert near(y, t["y"], "y")
    assert near(gates, t["gates"], "gates")
    assert near(model.molora_runtime.stats["lin"].balance["switch"], t["aux"], "aux")
    check_gradients(t, site, dx)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_are_divided_by_their_sum_unless_told_otherwise(
    dtype: torch.dtype,
) -> None:
    t = load("hmora_topk")
    model, site = made(t, dtype, {"top_k": int(t["top_k"])}, "switch")
    y, gates, _ = run(t, model, site, torch.ones(2, 24))
    assert near(y, t["alt.y_renormalised"], "y")
    assert near(gates, t["alt.gates_renormalised"], "gates")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_hybrid_with_its_divergence(dtype: torch.dtype) -> None:
    t = load("hmora_hybrid")
    model, site = made(t, dtype, {"top_k": None}, "gjs")
    y, gates, dx = run(t, model, site, t["task_representation"])
    assert near(y, t["y"], "y")
    assert near(gates, t["gates"], "gates")
    assert near(model.molora_runtime.stats["lin"].balance["gjs"], t["aux"], "aux")
    check_gradients(t, site, dx)


def test_the_parts_of_the_divergence() -> None:
    t = load("hmora_hybrid")
    _, site = made(t, torch.float64, {"top_k": None}, "gjs")
    prompt = Prompt(None, {"lin": t["task_representation"]}, "given")
    context = ForwardContext(rows=2, prompt=prompt)
    routing = site.router(t["x"].flatten(0, 1), context)
    assert near(routing.rows.detach(), t["task_gates"])
    assert near(
        torch.softmax(routing.logits, -1).view(2, 11, 5).detach(), t["token_probs"]
    )
    assert near(routing.probs.view(2, 11, 5).detach(), t["gates"])
    objective, _ = site.objectives[0]
    tokens = torch.softmax(routing.logits, -1)
    assert near(
        objective.divergence(tokens, t["mask"].flatten()).detach(), t["aux_token_gjs"]
    )
    assert near(objective.divergence(routing.rows, None).detach(), t["aux_task_gjs"])


def tiny(make: Factory, layers: int = 2, **router: Any) -> Any:
    raw = {
        "target_modules": ["q_proj"],
        "experts": {"kind": "lora", "num_experts": 4, "r": 2},
        "router": {"kind": "hmora", **router},
    }
    config = molora.AdapterConfig.from_dict(raw)
    return molora.wrap(make(num_hidden_layers=layers), config)


def alphas(model: Any) -> list[float]:
    return [round(s.router.alpha.item(), 6) for s in sites(model).values()]


def test_alpha_starts_by_depth(tiny_llama: Factory) -> None:
    """The authors' -e + 2 e l / L + shift with l from 0 to L."""
    assert alphas(tiny(tiny_llama, 5)) == [-2.0, -1.0, 0.0, 1.0, 2.0]
    shifted = tiny(tiny_llama, 3, epsilon=0.5, alpha_shift=0.25)
    assert alphas(shifted) == [-0.25, 0.25, 0.75]
    assert alphas(tiny(tiny_llama, 1)) == [0.0]


def test_depth_counts_layers_that_are_no_targets(tiny_llama: Factory) -> None:
    raw = {
        "target_modules": r"model\.layers\.1\..*q_proj",
        "experts": {"kind": "lora", "num_experts": 4, "r": 2},
        "router": {"kind": "hmora"},
    }
    config = molora.AdapterConfig.from_dict(raw)
    assert alphas(molora.wrap(tiny_llama(num_hidden_layers=3), config)) == [0.0]


def test_a_trained_alpha_is_loaded(tiny_llama: Factory, tmp_path: Any) -> None:
    model = tiny(tiny_llama)
    for site in sites(model).values():
        nn.init.constant_(site.router.alpha, 0.3)  # type: ignore
    model.save_pretrained(tmp_path / "a")
    assert alphas(molora.load(tiny_llama(), tmp_path / "a")) == [0.3, 0.3]


def test_a_layer_without_a_number_is_refused() -> None:
    raw = {
        "target_modules": ["lin"],
        "experts": {"kind": "lora", "num_experts": 4, "r": 2},
        "router": {"kind": "hmora"},
    }
    model = Layer(torch.ones(4, 4), None)
    with pytest.raises(WrapError, match=r"'lin'.*router\.epsilon=2\.0.*epsilon: 0"):
        molora.wrap(model, molora.AdapterConfig.from_dict(raw))
    assert isinstance(model.lin, nn.Linear)


@pytest.mark.parametrize("top_k", [None, 2])
def test_gradient_through_the_prompt_is_that_of_the_definition(
    top_k: int | None, tiny_llama: Factory
) -> None:
    model = tiny(tiny_llama, top_k=top_k, second_softmax=top_k is not None).double()
    g = torch.Generator().manual_seed(3)
    for name, p in adapter_parameters(model).items():
        p.data.normal_(0, 1.0 if "router" in name else 0.3, generator=g)
    site: Any = next(iter(sites(model).values()))
    x, c = torch.randn(2, 2, 5, 32, generator=g).double()
    prompt = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()

    def ours(x: Tensor) -> Tensor:
        context = ForwardContext(rows=2, prompt=Prompt(prompt, None, "given"))
        with model.molora_runtime.use(context, 0):
            y: Tensor = site(x)
        return y

    def wanted(x: Tensor) -> Tensor:
        mean = (x * prompt[..., None]).sum(1) / prompt.sum(1, keepdim=True)
        a = torch.sigmoid(site.router.alpha)
        q = (1 - a) * torch.softmax(site.router.gate(x), -1)
        q = q + a * torch.softmax(site.router.task_gate(mean), -1)[:, None]
        if top_k is not None:
            hot = torch.zeros_like(q).scatter(-1, q.topk(top_k).indices, 1.0)
            q = torch.softmax(q.masked_fill(hot == 0, -torch.inf), -1)
        A, Bt, scale = site.experts.factors()
        z = torch.einsum("bsi,eri->bser", x, A) * q[..., None]
        return site.base(x) + scale * torch.einsum("bser,ero->bso", z, Bt)

    found = []
    for function in (ours, wanted):
        leaf = x.clone().requires_grad_()
        model.zero_grad()
        y = function(leaf)
        (y * c).sum().backward()
        grads = [p.grad.clone() for p in site.router.parameters()]
        found.append([y.detach(), leaf.grad, *grads])
    for got, want in zip(*found, strict=True):
        assert near(got, want)
        assert want.abs().max() > 1e-3


def test_rows_in_another_order_are_refused(tiny_llama: Factory) -> None:
    model = tiny(tiny_llama)
    site = next(iter(sites(model).values()))
    context = ForwardContext(rows=2, prompt=Prompt(None, None, "given"))
    with (
        model.molora_runtime.use(context, 0),
        pytest.raises(RoutingError, match="does not line up with the 2 rows"),
    ):
        site(torch.zeros(6, 2, 32))


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"input": "sequence"}, "router.input: Input should be 'token'"),
        ({"top_k": 1}, "router.top_k: .* greater than or equal to 2"),
        ({"top_k": 5}, "router.top_k=5 exceeds num_experts=4"),
        ({"top_k": None, "second_softmax": True}, "has no effect with top_k: null"),
        ({"epsilon": -1.0}, "router.epsilon: .* greater than or equal to 0"),
    ],
)
def test_wrong_settings_are_refused(
    router: Any, message: str, tiny_llama: Factory
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(tiny_llama, **router)
