"""Bottleneck banks: numbers of the adapters package, definitions, refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor

from molora.errors import ConfigError, WrapError
from tests.families import (
    disturb,
    layer_of,
    off,
    run,
    site_of,
    vector,
    worst_of_sum,
)

FUNCTIONS = {
    "relu": lambda z: z.clamp(min=0),
    "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "identity": lambda z: z,
}
FORMS: dict[str, dict[str, Any]] = {
    "parallel": {"bottleneck": 5, "scale": 4.0},
    "serial": {"position": "serial", "reduction_factor": 2, "activation": "gelu"},
    "silu": {"bottleneck": 3, "activation": "silu", "bias": False},
    "linear": {"bottleneck": 3, "activation": "identity", "scale": 0.5},
}
each_form = pytest.mark.parametrize("form", FORMS)


def bank(form: str, E: int) -> Any:
    site = site_of({"kind": "bottleneck", **FORMS[form]}, *layer_of(7, 12), E=E)
    disturb(site)
    return site


def delta(site: Any, form: str) -> Any:
    """One expert as it is defined."""
    settings, bank = FORMS[form], site.experts
    phi = FUNCTIONS[settings.get("activation", "relu")]

    def of(e: int, x: Tensor) -> Tensor:
        read = site.base(x) if settings.get("position") == "serial" else x
        z = read @ bank.down[e].T
        if settings.get("bias", True):
            y = phi(z + bank.down_bias[e]) @ bank.up[e] + bank.up_bias[e]
        else:
            y = phi(z) @ bank.up[e]
        result: Tensor = settings.get("scale", 1.0) * y
        return result

    return of


@pytest.mark.parametrize("kind", ["parallel", "houlsby"])
def test_one_expert_is_what_adapters_computes(kind: str) -> None:
    t, hyper = vector("adapters_bottleneck", f"{kind}/")
    settings = {"kind": "bottleneck", "bottleneck": hyper["bottleneck"]}
    if kind == "parallel":
        settings |= {"scale": hyper["parallel_scaling"]}
    else:
        settings |= {"position": "serial", "activation": "silu"}
    # a layer that hands on what it reads
    site = site_of(settings, torch.eye(hyper["dim"], dtype=torch.float64))
    state = {
        "down": t["param.W_down"],
        "down_bias": t["param.b_down"],
        "up": t["param.W_up"].T,
        "up_bias": t["param.b_up"],
    }
    site.experts.load_state_dict({n: v.unsqueeze(0) for n, v in state.items()})
    x = t["x"].clone().requires_grad_()
    update = site(x) - x
    # their serial adapter is given what it is added to
    assert off(update, t["y"] - t.get("residual", torch.zeros(()))) < 1e-9
    (update * t["c"]).sum().backward()
    assert off(x.grad, t["grad.x"]) < 1e-9
    names = {"down": "W_down", "down_bias": "b_down", "up_bias": "b_up"}
    for own, name in names.items():
        assert off(getattr(site.experts, own).grad[0], t[f"grad.{name}"]) < 1e-9
    assert off(site.experts.up.grad[0].T, t["grad.W_up"]) < 1e-9
    dim, k = hyper["dim"], hyper["bottleneck"]
    assert site.experts.count() == 2 * dim * k + k + dim


@each_form
@pytest.mark.parametrize("E", [1, 4])
@pytest.mark.parametrize("top_k", [None, 2])
def test_a_mixture_is_the_sum_of_its_experts(
    form: str, E: int, top_k: int | None
) -> None:
    site = bank(form, E)
    found = worst_of_sum(site, delta(site, form), top_k=top_k if E > 1 else None)
    assert max(found.values()) < 1e-12, found


def test_hand_worked_numbers() -> None:
    weight = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    site = site_of({"kind": "bottleneck", "bottleneck": 1, "scale": 4.0}, weight)
    values = {
        "down": [[[1.0, -1.0]]],
        "down_bias": [[0.5]],
        "up": [[[3.0]]],
        "up_bias": [[0.25]],
    }
    site.experts.load_state_dict({n: torch.tensor(v) for n, v in values.items()})
    x = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    # 4 + 4 (3 * 1.5 + 0.25), and 2 + 4 * 0.25 where the ReLU is shut
    assert torch.equal(site(x), torch.tensor([[23.0], [3.0]], dtype=torch.float64))


def test_without_a_nonlinearity_it_is_lora() -> None:
    weight, bias = layer_of(7, 12)
    settings = {"kind": "bottleneck", "bottleneck": 3, "bias": False, "scale": 2.0}
    site = site_of({**settings, "activation": "identity"}, weight, bias, E=4)
    lora = site_of({"kind": "lora", "r": 3, "lora_alpha": 6.0}, weight, bias, E=4)
    disturb(site)
    state = {"A": site.experts.down.data, "Bt": site.experts.up.data}
    lora.experts.load_state_dict(state)
    x = torch.randn(5, 12, dtype=torch.float64)
    gates = torch.rand(5, 4, dtype=torch.float64)
    assert off(run(site, x, gates), run(lora, x, gates)) < 1e-12


@each_form
def test_no_or_one_token_and_the_start(form: str) -> None:
    site = site_of({"kind": "bottleneck", **FORMS[form]}, *layer_of(7, 12), E=3)
    for T in (0, 1):
        x = torch.randn(T, 12, dtype=torch.float64, requires_grad=True)
        y = run(site, x, torch.rand(T, 3, dtype=torch.float64))
        assert y.shape == (T, 7) and torch.equal(y, site.base(x))
        y.sum().backward()
        assert site.experts.up.grad is not None
    assert (site.experts.up.grad != 0).any()


def test_initial_values_of_every_expert() -> None:
    weight, bias = layer_of(400, 100)
    wide = {"kind": "bottleneck", "bottleneck": 50}
    parallel = site_of(wide, weight, bias, E=2).experts.down
    serial = site_of({**wide, "position": "serial"}, weight, bias, E=2).experts.down
    assert parallel.shape == (2, 50, 100) and serial.shape == (2, 50, 400)
    # a uniform within 1/sqrt(I) = 0.1 deviates by 0.1/sqrt(3)
    assert 0.099 < parallel.abs().max() <= 0.1
    assert abs(parallel.std() - 0.1 / 3**0.5) < 1e-3
    # a normal cut at two deviations has 0.88 of the deviation left
    assert 0.0199 < serial.abs().max() <= 0.02
    assert abs(serial.std() - 0.0088) < 1e-4
    assert not torch.equal(parallel[0], parallel[1])


def test_half_precision_base() -> None:
    weight, bias = (t.bfloat16() for t in layer_of(7, 12))
    for form in FORMS:
        settings = {"kind": "bottleneck", **FORMS[form]}
        site = site_of(settings, weight, bias, E=3)
        site.experts.float()
        disturb(site)
        x = torch.randn(6, 12).bfloat16().requires_grad_()
        gates = torch.rand(6, 3)
        y = run(site, x, gates)
        y.sum().backward()
        assert x.grad is not None and y.dtype == x.grad.dtype == torch.bfloat16
        assert site.experts.down.grad.dtype == torch.float32
        exact = site_of(settings, weight.double(), bias.double(), E=3)
        exact.experts.load_state_dict(site.experts.state_dict())
        assert off(y, run(exact, x.double(), gates.double())) < 0.03


def test_it_cannot_be_merged() -> None:
    site = bank("parallel", 1)
    before = site.base.weight.clone()
    with pytest.raises(WrapError, match="nothing can be merged"):
        site.merge()
    with pytest.raises(WrapError, match="have a nonlinearity"):
        site.experts.delta_weight(0, site.base.weight)
    with pytest.raises(WrapError, match="PEFT has no format"):
        site.experts.to_peft(0)
    assert torch.equal(site.base.weight, before)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "thin": ({"reduction_factor": 20}, WrapError, "of the 12 .* at most 12"),
    "serial": (
        {"reduction_factor": 8.5, "position": "serial"},
        WrapError,
        "reduction_factor=8.5: .* of the 7",
    ),
    "both": ({"bottleneck": 4, "reduction_factor": 2}, ConfigError, "give one of them"),
    "none": ({"bottleneck": 0}, ConfigError, "bottleneck"),
    "function": ({"activation": "tanh"}, ConfigError, "activation"),
}


@pytest.mark.parametrize("case", BAD)
def test_settings_that_do_not_fit_say_what_would(case: str) -> None:
    settings, error, match = BAD[case]
    with pytest.raises(error, match=match):
        site_of({"kind": "bottleneck", **settings}, *layer_of(7, 12))
    assert site_of({"kind": "bottleneck"}, *layer_of(7, 12)).experts.up.shape[1] == 64
