"""Arrow: PEFT's numbers where its power iteration converged, exact ones where not."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import molora
from molora.context import ForwardContext
from molora.errors import ConfigError
from molora.model import adapter_parameters, sites
from molora.routers.arrow import top_directions
from tests.oracle import DTYPES, Layer, load, near


def built(t: dict[str, Tensor], dtype: torch.dtype) -> tuple[Any, Any]:
    """A model with the experts of a file, and its site."""
    A = t.get("after_gks.A", t["plain.A"])
    B = t.get("after_gks.B", t["plain.B"])
    raw = {
        "target_modules": ["lin"],
        "experts": {
            "kind": "lora",
            "num_experts": len(A),
            "r": A.shape[1],
            "lora_alpha": (t["scales"] * A.shape[1]).tolist(),
        },
        "router": {
            "kind": "arrow",
            "top_k": int(t["top_k"]),
            "temperature": float(t["temperature"]),
        },
    }
    layer = Layer(t["base.weight"].clone(), t["base.bias"])
    model = molora.wrap(layer, molora.AdapterConfig.from_dict(raw)).to(dtype).train()
    site: Any = sites(model)["lin"]
    with torch.no_grad():
        site.experts.A.copy_(A)
        site.experts.Bt.copy_(B.transpose(1, 2))
    return model, site


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["arrow", "arrow_gks"])
def test_converged(name: str, dtype: torch.dtype) -> None:
    t = load(name)
    model, site = built(t, dtype)
    x = t["x"].to(dtype).requires_grad_()
    y = model(x)
    (y * t["c"].to(dtype)).sum().backward()
    assert near(y.detach(), t["y"], "y")
    routing = site.router(x.detach().flatten(0, 1), ForwardContext())
    assert near(routing.gates.view_as(t["gates"]), t["gates"], "gates")
    scores = routing.logits * float(t["temperature"])
    assert near(scores.view_as(t["scores"]), t["scores"], "scores")
    assert near(x.grad, t["grad.x"], "x")
    assert near(site.experts.A.grad, t["grad.A"], "A")
    assert near(site.experts.Bt.grad.transpose(1, 2), t["grad.B"], "B")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["arrow", "arrow_slow"])
def test_exact_directions(name: str, dtype: torch.dtype) -> None:
    t = load(name)
    model, site = built(t, dtype)
    x = t["x"].to(dtype)
    assert near(model(x).detach(), t["alt.y_exact_prototypes"], "y")
    gates = site.router(x.flatten(0, 1), ForwardContext()).gates
    want = t["alt.gates_exact_prototypes"]
    assert near(gates.view_as(want), want, "gates")
    v, exact = site.router.directions(), t["alt.prototypes_exact"]
    sign = (v * exact).sum(-1, keepdim=True).sign().to(dtype)
    assert near(v * sign, exact, "directions")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(site.router.directions(), v)


@pytest.mark.parametrize(
    ("E", "r", "wide", "out", "shared"),
    [
        (3, 2, 7, 5, ""),
        (2, 4, 3, 9, ""),
        (2, 4, 9, 3, ""),
        (3, 2, 6, 6, "A"),
        (3, 2, 6, 6, "B"),
    ],
)
def test_against_a_dense_decomposition(
    E: int, r: int, wide: int, out: int, shared: str
) -> None:
    generator = torch.Generator().manual_seed(E + wide)
    A, Bt = (
        torch.randn(1 if s == shared else E, r, n, generator=generator).double()
        for s, n in (("A", wide), ("B", out))
    )
    v = top_directions(A, Bt)
    exact = torch.linalg.svd(Bt.mT @ A).Vh[:, 0]
    assert torch.allclose((v * exact).sum(-1).abs(), torch.ones(E).double())
    assert torch.allclose(v.norm(dim=-1), torch.ones(E).double())


def test_directions_follow_the_experts() -> None:
    t = load("arrow")
    model, site = built(t, torch.float64)
    assert not list(site.router.parameters()) and not site.router.state_dict()
    assert sorted(adapter_parameters(model)) == ["lin.experts.A", "lin.experts.Bt"]
    model.eval()
    first = site.router.directions()
    assert site.router.directions() is first
    twin = copy.deepcopy(model)
    with torch.no_grad():
        site.experts.A.copy_(site.experts.A.flip(0))
        site.experts.Bt.copy_(site.experts.Bt.flip(0))
    assert torch.allclose(site.router.directions().abs(), first.flip(0).abs())
    # a copy of the model reads its own experts
    other: Any = sites(twin)["lin"]
    assert torch.equal(other.router.directions(), first)
    # written past autograd, as some optimizers do: seen in training
    model.train()
    assert torch.allclose(site.router.directions().abs(), first.flip(0).abs())
    site.experts.A.data.copy_(site.experts.A.data.flip(0))
    site.experts.Bt.data.copy_(site.experts.Bt.data.flip(0))
    assert torch.allclose(site.router.directions().abs(), first.abs())
    assert site.router.directions().dtype == torch.float64
    assert model.float() and site.router.directions().dtype == torch.float32


def test_experts_that_are_zero_score_zero() -> None:
    t = load("arrow")
    model, site = built(t, torch.float64)
    with torch.no_grad():
        site.experts.Bt[1:] = 0
    x = t["x"][0]
    routing = site.router(x, ForwardContext())
    assert float(routing.logits[:, 1:].abs().sum()) == 0
    assert (routing.gates[:, 0] > 0).all()


class NoFactors(nn.Module):
    num_experts = 4


def test_bad_settings() -> None:
    raw = {
        "target_modules": ["lin"],
        "experts": {"kind": "lora", "num_experts": 2},
        "router": {"kind": "arrow"},
    }
    with pytest.raises(ConfigError, match="top_k=3 exceeds num_experts=2"):
        molora.AdapterConfig.from_dict(raw)
    raw["experts"] = {"kind": "lora", "num_experts": 4}
    balance = [{"kind": "switch", "weight": 1.0}]
    with pytest.raises(ConfigError, match="nothing to balance"):
        molora.AdapterConfig.from_dict(raw | {"balance": balance})
    model = molora.wrap(Layer(torch.eye(4), None), molora.AdapterConfig.from_dict(raw))
    router: Any = sites(model)["lin"].router
    with pytest.raises(ConfigError, match="'lin': router.kind 'arrow' reads the two"):
        router.bind(NoFactors())
