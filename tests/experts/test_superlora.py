"""Folded Tucker banks: LoRA and LoTR as special cases, any order by its definition."""

from typing import Any

import pytest
import torch
from torch import Tensor

from molora.errors import ConfigError, WrapError
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

PLAIN = {"kind": "superlora", "order": 2, "fold": "weight"}


def test_two_axes_with_a_diagonal_core_are_lora() -> None:
    t, hyper = vector("lora")
    settings = {"r": hyper["r"], "alpha": float(hyper["alpha"]), "core": "diagonal"}
    site = site_of({**PLAIN, **settings}, t["base.weight"], t["base.bias"])
    own = site.experts
    with torch.no_grad():
        own.A1.copy_(t["param.B"])
        own.A2.copy_(t["param.A"].t())
    grads = {"A": lambda: own.A2.grad[0, 0].t(), "B": lambda: own.A1.grad[0, 0]}
    found = worst_of_vector(site, t, grads)
    assert max(found.values()) < 1e-12, found
    assert own.count() == t["param.A"].numel() + t["param.B"].numel()


def test_two_axes_with_a_trained_core_are_lotr() -> None:
    shared, hyper = vector("lotr")
    summed = {"U": torch.zeros(20, 3), "V": torch.zeros(3, 28)}
    for layer in range(2):
        t, _ = vector("lotr", f"{layer}/")
        settings = {**PLAIN, "r": hyper["r"], "alpha": hyper["alpha"]}
        site = site_of(settings, t["base.weight"], t["base.bias"])
        own = site.experts
        with torch.no_grad():
            own.A1.copy_(shared["shared.U"])
            own.A2.copy_(shared["shared.V"].t())
            own.core.copy_(t["param.G"])
        found = worst_of_vector(site, t, {"G": lambda own=own: own.core.grad[0, 0]})
        assert max(found.values()) < 1e-12, found
        summed["U"] = summed["U"] + own.A1.grad[0, 0]
        summed["V"] = summed["V"] + own.A2.grad[0, 0].t()
    for name, grad in summed.items():
        assert torch.allclose(grad, shared[f"grad.{name}"], rtol=0, atol=1e-12)


CASES: list[dict[str, Any]] = [
    {"order": 3, "groups": 1, "r": 2},
    {"order": 3, "groups": 4, "r": 2, "core": "diagonal"},
    {"order": 4, "groups": 3, "r": 1},
    {"order": 2, "groups": 2, "r": 3},
]


@pytest.mark.parametrize("more", CASES)
@pytest.mark.parametrize(("out", "wide"), [(20, 28), (7, 31)])
@pytest.mark.parametrize("top_k", [None, 2])
def test_a_mixture_by_its_definition(
    out: int, wide: int, more: dict[str, Any], top_k: int | None
) -> None:
    settings = {"kind": "superlora", "alpha": 3.0, **more}
    site = site_of(settings, *layer_of(out, wide), E=3)
    disturb(site)
    own, (G, M, r) = site.experts, (more["groups"], more["order"], more["r"])
    size = -(-out * wide // G)
    n = own.A1.shape[2]
    assert n**M >= size > (n - 1) ** M
    core = 0 if "core" in more else r**M
    assert own.count() == 3 * G * (M * n * r + core)

    def dense(e: int) -> Tensor:
        rows = []
        for g in range(G):
            axes = "abcd"[:M]
            sides = "wxyz"[:M]
            factors = [getattr(own, f"A{m + 1}")[e, g] for m in range(M)]
            if core:
                parts = ",".join(s + a for s, a in zip(sides, axes, strict=True))
                rule = f"{axes},{parts}->{sides}"
                whole = torch.einsum(rule, own.core[e, g], *factors)
            else:
                rule = ",".join(s + "a" for s in sides) + "->" + sides
                whole = torch.einsum(rule, *factors)
            rows.append(whole.flatten()[:size])
        return 3.0 / r * torch.cat(rows)[: out * wide].view(out, wide)

    found = worst_of_sum(site, lambda e, x: x @ dense(e).t(), top_k=top_k)
    assert max(found.values()) < 1e-12, found
    assert torch.allclose(own.delta_weight(1, site.base.weight), dense(1), atol=1e-12)
    x = torch.randn(3, wide, dtype=torch.float64)
    assert torch.equal(run(site, x, torch.zeros(3, 3).double(), top_k), site.base(x))
    none = run(site, x[:0], gates_of(2, 3)[:0], top_k)
    none.sum().backward()
    assert none.shape == (0, out) and not own.A1.grad.any()


@pytest.mark.parametrize("more", [*CASES, {"order": 2, "fold": "weight"}])
def test_it_starts_at_the_base(more: dict[str, Any]) -> None:
    site = site_of({"kind": "superlora", **more}, *layer_of(20, 28), E=3)
    x = torch.randn(5, 28, dtype=torch.float64)
    assert torch.equal(run(site, x, gates_of(5, 3)), site.base(x))
    zero = {n for n, p in site.experts.named_parameters() if not p.any()}
    assert zero == {f"A{more['order']}"}
    assert not torch.equal(site.experts.A1[0], site.experts.A1[1])


def test_no_weight_is_kept() -> None:
    site = site_of({"kind": "superlora"}, *layer_of(60, 50), E=4)
    x = torch.randn(16, 50, dtype=torch.float64, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(t.numel()), t)[1], lambda t: t
    ):
        zero = torch.zeros(16, 60, dtype=torch.float64)
        site.experts(x, gates_of(16, 4).requires_grad_(), zero)
    # x, gates and the parameters
    assert sum(kept) == 16 * 50 + 16 * 4 + site.experts.count()


def test_what_does_not_fit_is_refused() -> None:
    layer = layer_of(4, 5)
    with pytest.raises(ConfigError, match="fold: weight needs groups 1 in scope site"):
        site_of({"kind": "superlora", "fold": "weight", "groups": 2}, *layer)
    with pytest.raises(WrapError, match=r"experts\.groups=21: .*groups up to 20 work"):
        site_of({"kind": "superlora", "groups": 21}, *layer)


def test_half_precision_bases() -> None:
    weight, bias = layer_of(20, 28)
    settings = {"kind": "superlora", "r": 2}
    site = site_of(settings, weight.bfloat16(), bias.bfloat16(), E=2)
    site.experts.float()
    disturb(site)
    x = torch.randn(5, 28).bfloat16()
    y = run(site, x, gates_of(5, 2).float())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and site.experts.A1.grad.dtype == torch.float32
    exact = site_of(settings, weight.bfloat16().double(), bias.bfloat16().double(), E=2)
    exact.experts.load_state_dict(site.experts.state_dict())
    want = run(exact, x.double(), gates_of(5, 2))
    assert (y.double() - want).abs().max() < 0.05 * want.abs().max()
