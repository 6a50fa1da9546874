"""Routers that choose a varying number of experts, against numbers of their authors."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import molora
from molora.context import ForwardContext
from molora.model import adapter_parameters
from molora.routers import OBJECTIVES, ROUTERS
from tests.oracle import DTYPES, Layer, build, check, load, near

each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def switch_value(model: Any) -> Tensor:
    value: Tensor = model.molora_runtime.stats["lin"].balance["switch"]
    return value


def switch_gradient(t: dict[str, Tensor], hot: Tensor, name: str) -> Tensor:
    """Gradient of the Switch loss whose f is a share of all selections."""
    leaf = t[name].double().clone().requires_grad_()
    leaves = {**t, name: leaf}
    p = torch.softmax(leaves["x"] @ leaves["plain.router"].T, -1).reshape(-1, 5)
    f = hot.reshape(-1, 5).double().sum(0) / hot.sum()
    (grad,) = torch.autograd.grad(5 * (f * p.mean(0)).sum(), leaf)
    return grad


def check_balance(t: dict[str, Tensor], model: Any, site: Any) -> None:
    """The documented correction of the balance loss, and its gradient alone."""
    model.molora_runtime.stats = {}
    x = t["x"].detach().to(site.experts.A.dtype).requires_grad_()
    (model(x) * 0).sum().backward()
    assert near(switch_value(model), t["alt.aux_switch_normalised"], "aux")
    hot = t["gates"] > 0
    assert near(x.grad, switch_gradient(t, hot, "x"), "x")
    want = switch_gradient(t, hot, "plain.router")
    assert near(site.router.gate.weight.grad, want, "router")


@each_dtype
def test_mole_threshold(dtype: torch.dtype) -> None:
    t = load("mole_threshold")
    router = {"kind": "threshold", "threshold": float(t["threshold"])}
    # the official f counts tokens: the gradients of its loss are K times as large
    mean_chosen = float((t["gates"] > 0).sum(-1).double().mean())
    check(t, *build(t, dtype, router=router, balance=mean_chosen))
    check_balance(t, *build(t, dtype, router=router, balance=1.0))


def adamole(t: dict[str, Tensor], dtype: torch.dtype, **kw: Any) -> tuple[Any, Any]:
    router = {"kind": "adamole", "max_threshold": float(t["max_threshold"])}
    model, site = build(t, dtype, router=router, **kw)
    with torch.no_grad():
        site.router.threshold.weight.copy_(t["plain.threshold_weight"])
        site.router.threshold.bias.copy_(t["plain.threshold_bias"])
    return model, site


def without_aux(t: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of a file without those of its auxiliary loss, by its formula."""
    leaves = {
        name: t[key].detach().double().clone().requires_grad_()
        for name, key in (
            ("x", "x"),
            ("router", "plain.router"),
            ("threshold_weight", "plain.threshold_weight"),
            ("threshold_bias", "plain.threshold_bias"),
        )
    }
    p = torch.softmax(leaves["x"] @ leaves["router"].T, -1)
    raw = leaves["x"] @ leaves["threshold_weight"] + leaves["threshold_bias"]
    above = p - (torch.sigmoid(raw) * t["max_threshold"]).unsqueeze(-1)
    f = (above >= 0).double().reshape(-1, 5).mean(0)
    aux = 5 * (f * above.reshape(-1, 5).mean(0)).sum()
    assert near(aux.detach(), t["aux"], "official aux")
    grads = torch.autograd.grad(aux, list(leaves.values()))
    taken = {f"grad.{n}": g for n, g in zip(leaves, grads, strict=True)}
    return t | {name: t[name] - grad for name, grad in taken.items()}


@each_dtype
def test_adamole(dtype: torch.dtype) -> None:
    t = load("adamole")
    plain = without_aux(t)
    model, site = adamole(t, dtype)
    check(plain, model, site)
    threshold = site.router.threshold
    assert near(threshold.weight.grad[0], plain["grad.threshold_weight"], "weight")
    assert near(threshold.bias.grad[0], plain["grad.threshold_bias"], "bias")
    # raising the threshold does not lower the loss here: it has no gradient to it
    model, site = adamole(t, dtype, balance=1.0)
    check_balance(t, model, site)
    assert float(site.router.threshold.weight.grad.abs().sum()) == 0


def ldmole(t: dict[str, Tensor], j: int, dtype: torch.dtype, **kw: Any) -> Any:
    t = {**t, f"m{j}.scale": t["scale"]}
    router = {"kind": "ldmole", "hidden": 6}
    model, site = build(t, dtype, router=router, pre=f"m{j}.", **kw)
    network = f"plain.lambda_mlp.{t[f'm{j}.x'].shape[-1]}."
    made = site.router
    with torch.no_grad():
        for layer, i in ((made.hidden, 1), (made.out, 2)):
            layer.weight.copy_(t[f"{network}w{i}"])
            layer.bias.copy_(t[f"{network}b{i}"])
    return model, site


@each_dtype
@pytest.mark.parametrize("j", [0, 1])
def test_ldmole_sparsegen_and_its_balance(j: int, dtype: torch.dtype) -> None:
    t, pre = load("ldmole_sparsegen"), f"m{j}."
    # gates, output and the balance loss, which is the mean over two modules
    model, site = ldmole(t, j, dtype, balance=0.5)
    x = t[pre + "x"].to(dtype).requires_grad_()
    y = model(inputs_embeds=x, attention_mask=t["mask"])
    (y * t[pre + "c"].to(dtype)).sum().backward()
    assert near(y.detach(), t[pre + "y"], "y")
    assert near(x.grad, t[pre + "grad.x"], "x")
    assert near(site.experts.A.grad, t[pre + "grad.A"], "A")
    assert near(site.experts.Bt.grad.transpose(1, 2), t[pre + "grad.B"], "B")
    assert near(site.router.gate.weight.grad, t[pre + "grad.router"], "router")
    made, wide = site.router, x.shape[-1]
    for layer, i in ((made.hidden, 1), (made.out, 2)):
        assert near(layer.weight.grad, t[f"grad.lambda_mlp.{wide}.w{i}"], f"w{i}")
        assert near(layer.bias.grad, t[f"grad.lambda_mlp.{wide}.b{i}"], f"b{i}")
    flat = x.detach().flatten(0, 1)
    routing = made(flat, ForwardContext())
    assert near(
        routing.gates.detach().view_as(t[pre + "gates"]), t[pre + "gates"], "gates"
    )
    assert near(
        routing.logits.detach().view_as(t[pre + "gates"]), t[pre + "router_logits"]
    )
    assert near(
        made.sparsity(flat).detach().view_as(t[pre + "lambda"]), t[pre + "lambda"]
    )


@each_dtype
def test_ldmole_losses_are_the_mean_over_modules(dtype: torch.dtype) -> None:
    t = load("ldmole_sparsegen")
    values: dict[str, list[Tensor]] = {"switch": [], "z": [], "unmasked": []}
    for j in (0, 1):
        for kind in ("switch", "z"):
            model, site = ldmole(t, j, dtype, balance=1.0, kind=kind)
            model.molora_runtime.stats = {}
            x = t[f"m{j}.x"].to(dtype)
            model(x, attention_mask=t["mask"])
            values[kind].append(model.molora_runtime.stats["lin"].balance[kind])
        # the official z-loss counts padding, and is the mean over two modules
        model, site = ldmole(t, j, dtype, balance=0.5, kind="z")
        model.molora_runtime.stats = {}
        (model(x) * 0).sum().backward()
        values["unmasked"].append(model.molora_runtime.stats["lin"].balance["z"])
        assert near(
            site.router.gate.weight.grad, t[f"m{j}.grad_zloss.router"], "z router"
        )
    assert near(torch.stack(values["switch"]).mean(), t["aux"], "aux")
    assert near(torch.stack(values["z"]).mean(), t["alt.z_loss_masked"], "z")
    assert near(torch.stack(values["unmasked"]).mean(), t["z_loss"], "official z")


def test_the_network_for_lambda_is_trained() -> None:
    """It is left out of the optimizer in the authors' script."""
    raw = {
        "target_modules": ["lin"],
        "experts": {"kind": "lora", "num_experts": 3, "r": 2},
        "router": {"kind": "ldmole"},
    }
    config = molora.AdapterConfig.from_dict(raw)
    model = molora.wrap(Layer(torch.eye(4), None), config).train()
    trained = [n for n, p in adapter_parameters(model).items() if p.requires_grad]
    parts = ["hidden.weight", "hidden.bias", "out.weight", "out.bias"]
    assert {f"lin.router.{part}" for part in parts} <= set(trained)


def logit_router(kind: str, E: int, dtype: torch.dtype, **settings: Any) -> Any:
    """A router whose logits are its input."""
    cls: Any = ROUTERS[kind]
    made = cls(
        cls.Config.from_dict({"kind": kind, **settings}),
        in_features=E,
        num_experts=E,
        site="m",
        generator=torch.Generator(),
    )
    nn.init.eye_(made.gate.weight)
    return made.to(dtype)


def route(made: Any, logits: Tensor) -> Any:
    return made(logits.reshape(-1, logits.shape[-1]), ForwardContext())


@each_dtype
def test_mixlora_top_p_gates(dtype: torch.dtype) -> None:
    t = load("mixlora_aux")
    z, p, T = t["logits"].to(dtype), float(t["top_p"]), float(t["temperature"])
    E = z.shape[-1]
    made = logit_router("topp", E, dtype, top_p=p, temperature=T)
    want = t["alt.dynamic.gates_logit_temperature_renormalised"]
    assert near(route(made, z).gates.detach().view_as(want), want, "renormalised")
    made = logit_router("topp", E, dtype, top_p=p, renormalize=False)
    gates = route(made, z).gates.detach().view_as(want)
    assert near(gates, t["dynamic.gates_T0"], "no temperature")
    # dividing probabilities by T is choosing up to p * T, with gates 1 / T as large
    made = logit_router("topp", E, dtype, top_p=p * T, renormalize=False)
    gates = route(made, z).gates.detach().view_as(want)
    assert near(gates / T, t["dynamic.gates"], "divided probabilities")


@each_dtype
def test_mixlora_top_p_balance(dtype: torch.dtype) -> None:
    t = load("mixlora_aux")
    z = t["logits"].to(dtype).requires_grad_()
    top_p = float(t["top_p"] * t["temperature"])
    routing = route(logit_router("topp", z.shape[-1], dtype, top_p=top_p), z)
    objective = OBJECTIVES["switch"](OBJECTIVES["switch"].Config(kind="s", weight=1))
    # its f counts tokens, ours assignments
    per_token = float(routing.assigned().sum() / routing.gates[:, 0].numel())
    value = per_token * objective(routing, None)
    assert near(value.detach(), t["dynamic.aux"], "aux")
    assert near(torch.autograd.grad(value, z)[0], t["dynamic.grad.logits"], "gradient")


@each_dtype
def test_mixlora_balance_by_layer(dtype: torch.dtype) -> None:
    t = load("mixlora_aux")
    objective = OBJECTIVES["switch"](OBJECTIVES["switch"].Config(kind="s", weight=1))
    made = logit_router("topk", t["logits"].shape[-1], dtype, top_k=int(t["top_k"]))
    mask = t["mask"].reshape(-1)
    layers = [objective(route(made, z.to(dtype)), mask) for z in t["logits"]]
    assert near(
        torch.stack(layers).detach(), t["alt.aux_per_layer_divided_by_k"], "layers"
    )
    assert near(torch.stack(layers).mean().detach(), t["alt.aux_mean"], "mean")
    # all layers as one batch, as the authors have it; f sums to k there
    z = t["logits"].to(dtype).requires_grad_()
    for m, name in ((mask.repeat(len(z)), "aux"), (None, "aux_unmasked")):
        value = int(t["top_k"]) * objective(route(made, z), m)
        assert near(value.detach(), t[name], name)
        if name == "aux":
            assert near(torch.autograd.grad(value, z)[0], t["grad.logits"], "gradient")
