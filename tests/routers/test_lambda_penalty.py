"""LD-MoLE's penalties on lambda: the authors' numbers, gradients, bad input."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid

import molora
from molora.context import ForwardContext
from molora.errors import ConfigError
from molora.routers import OBJECTIVES
from tests.oracle import DTYPES, build, load, near

NAMES = {"experts": "lambda_reg", "sparse": "lambda_sparse"}


def site_of(t: dict[str, Tensor], j: int, dtype: torch.dtype, form: str) -> Any:
    """Module j of the file, with the penalty at half weight: the mean over two."""
    t = {**t, f"m{j}.scale": t["scale"]}
    model, site = build(
        t,
        dtype,
        router={"kind": "ldmole", "hidden": 6},
        balance=0.5,
        kind="lambda",
        settings={"form": form},
        pre=f"m{j}.",
    )
    network = f"plain.lambda_mlp.{t[f'm{j}.x'].shape[-1]}."
    with torch.no_grad():
        for layer, i in ((site.router.hidden, 1), (site.router.out, 2)):
            layer.weight.copy_(t[f"{network}w{i}"])
            layer.bias.copy_(t[f"{network}b{i}"])
    model.molora_runtime.stats = {}
    return model, site


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", NAMES)
def test_values_are_those_of_the_authors(form: str, dtype: torch.dtype) -> None:
    t, values = load("ldmole_sparsegen"), []
    for j in (0, 1):
        model, _ = site_of(t, j, dtype, form)
        model(t[f"m{j}.x"].to(dtype))
        values.append(model.molora_runtime.stats["lin"].balance["lambda"])
    assert near(torch.stack(values).mean(), t[NAMES[form]], form)


def defined(
    x: Tensor, R: Tensor, network: list[Tensor], form: str, m: Tensor
) -> Tensor:
    """The penalty of one module by its formula, at half weight."""
    w1, b1, w2, b2 = network
    lam = logsigmoid(linear(torch.relu(linear(x, w1, b1)), w2, b2))[..., 0] + 0.99
    u = (x @ R.T).detach().sort(-1, descending=True).values
    low = 1 - u[..., 0] - u[..., 1] + 2 * u[..., 2]
    cost = torch.relu(low - lam) if form == "experts" else 1 - lam
    return 0.5 * (cost * m).sum() / m.sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(form: str, masked: bool, dtype: torch.dtype) -> None:
    t = load("ldmole_sparsegen")
    for j in (0, 1):
        model, site = site_of(t, j, dtype, form)
        x = t[f"m{j}.x"].to(dtype).requires_grad_()
        y = model(x, attention_mask=t["mask"] if masked else None)
        (y * 0).sum().backward()
        names = [
            f"plain.lambda_mlp.{x.shape[-1]}.{n}" for n in ("w1", "b1", "w2", "b2")
        ]
        network = [t[n].double().requires_grad_() for n in names]
        x64 = t[f"m{j}.x"].clone().requires_grad_()
        m = (t["mask"] if masked else torch.ones_like(t["mask"])).double()
        value = defined(x64, t[f"m{j}.plain.router"], network, form, m)
        got = model.molora_runtime.stats["lin"].balance["lambda"]
        assert near(0.5 * got, value.detach(), "value")
        dx, *want = torch.autograd.grad(value, [x64, *network])
        assert near(x.grad, dx, "x")
        made = site.router
        layers = [made.hidden.weight, made.hidden.bias, made.out.weight, made.out.bias]
        for parameter, grad in zip(layers, want, strict=True):
            assert near(parameter.grad, grad)
        # the logits count as constants
        assert float(made.gate.weight.grad.abs().sum()) == 0


def test_lambda_at_the_bound_leaves_k_experts() -> None:
    from molora.routers.ldmole import sparsegen

    z = torch.tensor([[0.5, 0.4, 0.3, 0.2]]).double()
    for k in (1, 2, 3):
        top = z[0, :k].sum()
        low = 1 - top + k * z[0, k]
        for shift, count in ((1e-6, k), (-1e-6, k + 1)):
            gates = sparsegen(z, (low + shift).view(1, 1))
            assert int((gates > 0).sum()) == count


def config(router: str, **settings: Any) -> dict[str, Any]:
    return {
        "target_modules": ["lin"],
        "experts": {"kind": "lora", "num_experts": 3, "r": 2},
        "router": {"kind": router},
        "balance": [{"kind": "lambda", "weight": 0.1, **settings}],
    }


def test_bad_settings() -> None:
    made = molora.AdapterConfig.from_dict(config("ldmole"))
    assert made.balance[0].kind == "lambda"
    for raw, match in (
        (config("soft"), "router.kind ldmole .* this one has none"),
        (config("topk"), "this one has none"),
        (config("ldmole", max_experts=3), "not below num_experts=3"),
        (config("ldmole", max_experts=0), "max_experts"),
        (config("ldmole", form="sparse", max_experts=2), "form: experts only"),
    ):
        with pytest.raises(ConfigError, match=match):
            molora.AdapterConfig.from_dict(raw)


def test_other_routers_carry_no_lambda() -> None:
    t = load("loramoe")
    _, site = build(t, torch.float64, router={"kind": "soft"})
    assert site.router(t["x"].flatten(0, 1), ForwardContext()).sparsity is None
    assert "lambda" in OBJECTIVES.names()
