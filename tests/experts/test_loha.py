"""LoHa banks: numbers of PEFT and LyCORIS, mixtures by definition, PEFT's format."""

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import molora
from molora.errors import WrapError
from tests.families import (
    disturb,
    gates_of,
    layer_of,
    run,
    site_of,
    vector,
    worst_of_sum,
    worst_of_vector,
)

NAMES = ("w1_a", "w1_b", "w2_a", "w2_b")


def filled(name: str) -> tuple[Any, dict[str, Tensor]]:
    t, hyper = vector(name)
    settings = {"kind": "loha", "r": hyper["r"], "alpha": float(hyper["alpha"])}
    settings["use_rslora"] = name.endswith("_rs")
    site = site_of(settings, t["base.weight"], t["base.bias"])
    with torch.no_grad():
        for own in NAMES:
            getattr(site.experts, own).copy_(t["param." + own.replace("_", "")])
    return site, t


@pytest.mark.parametrize("name", ["loha", "lycoris_loha", "lycoris_loha_rs"])
def test_one_expert_is_what_others_compute(name: str) -> None:
    site, t = filled(name)
    parameters = {n.replace("_", ""): getattr(site.experts, n) for n in NAMES}
    grads = {n: lambda p=p: p.grad[0] for n, p in parameters.items()}
    found = worst_of_vector(site, t, grads)
    assert max(found.values()) < 1e-12, found
    assert torch.allclose(site.delta_weight(), t["delta.weight"], rtol=0, atol=1e-12)
    a_RI, b_RO = site.experts.expert_factors(0)
    assert torch.allclose((b_RO.t() @ a_RI).double(), t["delta.weight"], atol=1e-5)


@pytest.mark.parametrize(("out", "wide", "r"), [(50, 30, 3), (7, 31, 1), (24, 24, 4)])
@pytest.mark.parametrize("top_k", [None, 2])
def test_a_mixture_by_its_definition(
    out: int, wide: int, r: int, top_k: int | None
) -> None:
    settings = {"kind": "loha", "r": r, "alpha": 3.0}
    site = site_of(settings, *layer_of(out, wide), E=4)
    disturb(site)
    own = site.experts

    def delta(e: int, x: Tensor) -> Tensor:
        left, right = own.w1_a[e] @ own.w1_b[e], own.w2_a[e] @ own.w2_b[e]
        return x @ (3.0 / r * left * right).t()

    found = worst_of_sum(site, delta, top_k=top_k)
    assert max(found.values()) < 1e-12, found
    assert own.count() == 4 * 2 * r * (out + wide)
    x = torch.randn(3, wide, dtype=torch.float64)
    assert torch.equal(run(site, x, torch.zeros(3, 4).double()), site.base(x))
    assert run(site, x[:0], gates_of(2, 4)[:0]).shape == (0, out)


@pytest.mark.parametrize("init", [True, "lycoris"])
def test_it_starts_at_the_base_with_the_spread_of_the_source(init: Any) -> None:
    settings = {"kind": "loha", "r": 16, "init_weights": init}
    site = site_of(settings, *layer_of(400, 300), E=2)
    x = torch.randn(5, 300, dtype=torch.float64)
    assert torch.equal(run(site, x, gates_of(5, 2)), site.base(x))
    spread = {n: getattr(site.experts, n).std().item() for n in NAMES}
    uniform = {"w1_a": (3 * 16) ** -0.5, "w1_b": 900**-0.5, "w2_a": 48**-0.5, "w2_b": 0}
    normal = {"w1_a": 0.1, "w1_b": 1.0, "w2_a": 0, "w2_b": 1.0}
    assert spread == pytest.approx(uniform if init is True else normal, rel=0.05)
    for name in NAMES:
        values = getattr(site.experts, name)
        assert not values.any() or not torch.equal(values[0], values[1])


def peft_layer(rows: int, wide: int, **settings: Any) -> tuple[Any, Any]:
    model = nn.ModuleDict({"lin": nn.Linear(wide, rows)}).double()
    base = nn.Linear(wide, rows).double()
    base.load_state_dict(model["lin"].state_dict())
    config = peft.LoHaConfig(target_modules=["lin"], init_weights=False, **settings)
    return peft.get_peft_model(model, config).double(), base  # type: ignore[arg-type]


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_computes_the_same_from_what_is_exported(rslora: bool) -> None:
    weight, bias = layer_of(20, 28)
    settings = {"kind": "loha", "r": 3, "alpha": 6.0, "use_rslora": rslora}
    site = site_of(settings, weight, bias, E=2)
    disturb(site)
    form = site.experts.to_peft(1)
    theirs, base = peft_layer(20, 28, **form.settings)
    prefix = "base_model.model.lin."
    loaded = peft.set_peft_model_state_dict(
        theirs, {prefix + n: v for n, v in form.tensors.items()}
    )
    assert not loaded.unexpected_keys
    x = torch.randn(5, 28, dtype=torch.float64)
    gates = torch.tensor([[0.0, 1.0]]).double().expand(5, 2)
    want = theirs.base_model.model["lin"](x) - base(x)
    # PEFT keeps the scale in float32
    tolerance = 1e-6 if rslora else 1e-9
    got = run(site, x, gates) - site.base(x)
    assert (got - want).abs().max() < tolerance < want.abs().max()


def test_what_peft_saved_is_read() -> None:
    theirs, base = peft_layer(20, 28, r=3, alpha=6)
    state = peft.get_peft_model_state_dict(theirs)
    tensors = {n.removeprefix("base_model.model.lin."): v for n, v in state.items()}
    config = theirs.peft_config["default"].to_dict()
    cls = molora.experts.LoHaExperts
    block, ours = cls.from_peft(config, tensors, 28, 20)
    site = site_of(block, base.weight.data, base.bias.data)
    site.experts.load_state_dict(ours)
    x = torch.randn(5, 28, dtype=torch.float64)
    want = theirs.base_model.model["lin"](x)
    assert torch.allclose(run(site, x, None), want, rtol=0, atol=1e-9)
    with pytest.raises(WrapError, match="hada_t1: a LoHa of a linear layer"):
        cls.from_peft(config, {**tensors, "hada_t1": tensors["hada_w1_a"]}, 28, 20)


def test_half_precision_bases() -> None:
    weight, bias = layer_of(20, 28)
    settings = {"kind": "loha", "r": 2}
    site = site_of(settings, weight.bfloat16(), bias.bfloat16(), E=2)
    site.experts.float()
    disturb(site)
    x = torch.randn(5, 28).bfloat16()
    y = run(site, x, gates_of(5, 2).float())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and site.experts.w1_a.grad.dtype == torch.float32
    exact = site_of(settings, weight.bfloat16().double(), bias.bfloat16().double(), E=2)
    exact.experts.load_state_dict(site.experts.state_dict())
    want = run(exact, x.double(), gates_of(5, 2))
    assert (y.double() - want).abs().max() < 0.05 * want.abs().max()
