"""LoftQ: PEFT's iterates on stored weights, and banks that start at what is missing."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import molora
from molora.errors import WrapError
from molora.model import sites
from tests.oracle import load, near


@pytest.mark.parametrize("t", [1, 2, 3, 4, 5])
def test_every_iterate_is_pefts(t: int) -> None:
    o = load("loftq")
    found = molora.loftq_factors(o["w"], 4, iterations=t)
    # a code at a threshold may flip with the rounding of the SVD
    assert (found.Q - o[f"Q/{t}"]).abs().max() < 1e-4
    assert (found.B @ found.A - o[f"B/{t}"] @ o[f"A/{t}"]).abs().max() < 1e-4
    rest = o["w"] - found.Q
    left = (rest - found.B @ found.A).norm()
    assert left.item() == pytest.approx(o[f"residual/{t}"].item(), rel=1e-4)
    # Eckart and Young: what the best part of rank 4 leaves
    tail = torch.linalg.svdvals(rest)[4:].norm()
    assert left.item() == pytest.approx(tail.item(), rel=1e-4)
    assert left < rest.norm()


def test_the_scale_is_divided_out() -> None:
    w = load("loftq")["w"]
    plain, scaled = molora.loftq_factors(w, 3), molora.loftq_factors(w, 3, scale=2.5)
    assert (2.5 * scaled.B @ scaled.A - plain.B @ plain.A).abs().max() < 1e-6
    assert torch.equal(plain.Q, scaled.Q)


def test_nf4_of_stored_weights() -> None:
    o = load("nf4")
    for width in (40, 24):
        # the flattened values are in the same blocks, however wide a row is
        w = o["small/w"].reshape(-1, width)
        assert near(molora.nf4(w), o["small/dequant"].reshape(-1, width)) is True
    doubled = molora.nf4(o["big/w"], double=True)
    assert near(doubled, o["big/dequant"])
    assert (doubled - molora.nf4(o["big/w"])).abs().max() > 1e-4


def rounded() -> tuple[nn.Module, dict[str, Tensor]]:
    """Two layers of NF4 values, and the weights before."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 17), nn.Tanh(), nn.Linear(17, 11))
    original = {}
    for name, values in model.named_parameters():
        values.data.normal_(generator=generator)
        original[name] = values.detach().clone()
        if name.endswith("weight"):
            values.data.copy_(molora.nf4(values.data))
    return model, original


def wrapped(model: nn.Module, E: int, **more: Any) -> Any:
    raw = {
        "target_modules": ["0", "2"],
        "experts": {"kind": "lora", "num_experts": E, "r": 4, "lora_alpha": 6} | more,
        "router": {"kind": "soft" if E > 1 else "none"},
    }
    return molora.wrap(model, molora.AdapterConfig.from_dict(raw))


@pytest.mark.parametrize("E", [1, 3])
def test_experts_start_at_what_the_base_lacks(E: int) -> None:
    plain, original = rounded()
    model = wrapped(plain, E)
    quantised = {path: site.base.weight.clone() for path, site in sites(model).items()}
    molora.loftq(model, original)
    for path, site in sites(model).items():
        weight, Q = original[f"{path}.weight"], quantised[path]
        tail = torch.linalg.svdvals(weight - Q)[4:].norm()
        for e in range(E):
            left = weight - Q - site.experts.delta_weight(e, Q)
            assert left.norm().item() == pytest.approx(tail.item(), rel=1e-4)
        # gates of a softmax sum to one, and the experts are alike
        x = torch.randn(5, site.in_features)
        effective = Q + site.experts.delta_weight(0, Q)
        want = nn.functional.linear(x, effective, site.base.bias)
        assert (site(x) - want).abs().max() < 1e-5
        assert torch.equal(site.base.weight, Q)


def test_mistakes_change_nothing() -> None:
    model, original = rounded()
    wrapped(model, 1)
    before = {n: p.clone() for n, p in model.named_parameters()}
    part = {n: v for n, v in original.items() if n != "2.weight"}
    with pytest.raises(WrapError, match=r"lacks '2\.weight'"):
        molora.loftq(model, part)
    other = original | {"0.weight": torch.zeros(3, 24)}
    with pytest.raises(WrapError, match=r"\(3, 24\), and the layer is \(17, 24\)"):
        molora.loftq(model, other)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    for settings, message in (
        ({"kind": "goat", "rho": 1.0}, "GOATExperts; it needs kind lora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights true"),
        ({"r": 12}, "11 directions, fewer than r=12"),
    ):
        fresh = wrapped(rounded()[0], 1, **settings)
        with pytest.raises(WrapError, match=message):
            molora.loftq(fresh, original)
