"""LoDA banks: the stated formula, LoRA as a special case, refusals.

No numbers of the authors exist; see molora/experts/loda.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from molora.errors import ConfigError, WrapError
from tests.families import disturb, layer_of, off, run, site_of, worst_of_sum

FORMS: dict[str, dict[str, Any]] = {
    "LoDA": {"r": 3},
    "LoDA+": {"r": 3, "mixers": 2},
    "weighted": {
        "r": 2,
        "mixers": 1,
        "linear_weight": 0.5,
        "nonlinear_weight": 2.0,
        "negative_slope": 0.1,
        "scale": 0.7,
    },
    "LoRA": {"r": 3, "nonlinear_weight": 0.0},
}
each_form = pytest.mark.parametrize("form", FORMS)


def bank(form: str, E: int) -> Any:
    site = site_of({"kind": "loda", **FORMS[form]}, *layer_of(7, 12), E=E)
    disturb(site)
    return site


def delta(site: Any, form: str) -> Any:
    """One expert as it is stated."""
    settings, bank = FORMS[form], site.experts
    slope = settings.get("negative_slope", 0.8)

    def phi(z: Tensor) -> Tensor:
        return torch.where(z > 0, z, slope * z)

    def of(e: int, x: Tensor) -> Tensor:
        z = x @ bank.A[e].T
        h = phi(z)
        for i in range(settings.get("mixers", 0)):
            h = phi(h @ bank.M[e, i].T)
        y = settings.get("linear_weight", 1.0) * z @ bank.Bt[e]
        y = y + settings.get("nonlinear_weight", 1.0) * phi(h @ bank.Bt[e])
        result: Tensor = settings.get("scale", 7**-0.5) * y
        return result

    return of


@each_form
@pytest.mark.parametrize("E", [1, 3])
@pytest.mark.parametrize("top_k", [None, 2])
def test_a_mixture_is_the_sum_of_its_experts(
    form: str, E: int, top_k: int | None
) -> None:
    site = bank(form, E)
    found = worst_of_sum(site, delta(site, form), top_k=top_k if E > 1 else None)
    assert max(found.values()) < 1e-12, found


def test_hand_worked_numbers() -> None:
    weight = torch.zeros(1, 1, dtype=torch.float64)
    site = site_of({"kind": "loda", "r": 1, "mixers": 1}, weight)
    values = {"A": [[[2.0]]], "Bt": [[[-1.0]]], "M": [[[[-3.0]]]]}
    site.experts.load_state_dict({n: torch.tensor(v) for n, v in values.items()})
    x = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    # z = 2: -2 + phi(-phi(-6)) = -2 + 4.8;  z = -2: 2 + phi(-phi(4.8)) = 2 - 3.84
    assert off(site(x), torch.tensor([[2.8], [-1.84]], dtype=torch.float64)) < 1e-12


@pytest.mark.parametrize(
    "settings",
    [
        {"nonlinear_weight": 0.0},
        {"negative_slope": 1.0, "linear_weight": 0.25, "nonlinear_weight": 0.75},
    ],
)
def test_lora_is_a_special_case(settings: dict[str, Any]) -> None:
    weight, bias = layer_of(7, 12)
    raw = {"kind": "loda", "r": 3, "scale": 2.0, **settings}
    site = site_of(raw, weight, bias, E=3)
    lora = site_of({"kind": "lora", "r": 3, "lora_alpha": 6.0}, weight, bias, E=3)
    disturb(site)
    lora.experts.load_state_dict(site.experts.state_dict())
    x = torch.randn(5, 12, dtype=torch.float64)
    gates = torch.rand(5, 3, dtype=torch.float64)
    assert off(run(site, x, gates), run(lora, x, gates)) < 1e-12


@each_form
def test_no_or_one_token_the_start_and_the_count(form: str) -> None:
    site = site_of({"kind": "loda", **FORMS[form]}, *layer_of(7, 12), E=3)
    for T in (0, 1):
        x = torch.randn(T, 12, dtype=torch.float64, requires_grad=True)
        y = run(site, x, torch.rand(T, 3, dtype=torch.float64), 2)
        assert y.shape == (T, 7) and torch.equal(y, site.base(x))
        y.sum().backward()
    assert (site.experts.Bt.grad != 0).any()
    r, m = FORMS[form]["r"], FORMS[form].get("mixers", 0)
    assert site.experts.count() == 3 * r * (12 + 7 + m * r)


def test_half_precision_base() -> None:
    weight, bias = (t.bfloat16() for t in layer_of(7, 12))
    for form in FORMS:
        settings = {"kind": "loda", **FORMS[form]}
        site = site_of(settings, weight, bias, E=3)
        site.experts.float()
        disturb(site)
        x = torch.randn(6, 12).bfloat16().requires_grad_()
        gates = torch.rand(6, 3)
        y = run(site, x, gates)
        y.sum().backward()
        assert x.grad is not None and y.dtype == x.grad.dtype == torch.bfloat16
        assert site.experts.A.grad.dtype == torch.float32
        exact = site_of(settings, weight.double(), bias.double(), E=3)
        exact.experts.load_state_dict(site.experts.state_dict())
        assert off(y, run(exact, x.double(), gates.double())) < 0.03


def test_it_cannot_be_merged() -> None:
    site = bank("LoDA", 1)
    with pytest.raises(WrapError, match="nothing can be merged"):
        site.merge()
    with pytest.raises(WrapError, match="have a nonlinearity"):
        site.experts.delta_weight(0, site.base.weight)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"linear_weight": 0.0, "nonlinear_weight": 0.0}, "both 0"),
    "mixers": ({"mixers": 2, "nonlinear_weight": 0.0}, "the nonlinear path"),
    "slope": ({"negative_slope": 1.5}, "negative_slope"),
    "rank": ({"r": 0}, "experts.r"),
}


@pytest.mark.parametrize("case", BAD)
def test_settings_that_mean_nothing_are_refused(case: str) -> None:
    settings, match = BAD[case]
    with pytest.raises(ConfigError, match=match):
        site_of({"kind": "loda", **settings}, *layer_of(7, 12))
