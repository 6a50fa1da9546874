"""MoRA banks: the authors' numbers, mixtures by definition, sizes that do not fit."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

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

TYPES = [1, 2, 3, 4, 6]


def build(out: int, wide: int, kind: int, E: int, r: int = 2) -> Any:
    site = site_of(
        {"kind": "mora", "r": r, "mora_type": kind}, *layer_of(out, wide), E=E
    )
    disturb(site)
    return site


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("case", ["wide", "tall"])
def test_one_expert_is_what_the_authors_compute(case: str, kind: int) -> None:
    t, hyper = vector(f"mora_t{kind}", f"{case}/")
    settings = {"kind": "mora", "r": hyper["cases"][case]["r"], "mora_type": kind}
    site = site_of(settings, t["base.weight"], t["base.bias"])
    assert site.experts.side == hyper["cases"][case]["r_hat"]
    with torch.no_grad():
        site.experts.M.copy_(t["param.M"])
    found = worst_of_vector(site, t, {"M": lambda: site.experts.M.grad[0]})
    assert max(found.values()) < 1e-12, found
    assert torch.allclose(site.delta_weight(), t["delta.weight"], rtol=0, atol=1e-12)


def by_loops(x_TI: Tensor, M: Tensor, wide: int, kind: int) -> Tensor:
    """D(M C(x)) written down value by value, types 1 to 4."""
    n, features = len(M), x_TI.shape[1]
    z = []
    for i in range(n):
        if kind in (1, 4):
            blocks = math.ceil(features / n)
            z.append(sum(x_TI[:, (b * n + i) % features] for b in range(blocks)))
        else:
            cuts = torch.tensor_split(x_TI, n, 1)
            z.append(cuts[i].sum(1))
    out = torch.stack(z, 1) @ M.t()  # type: ignore[arg-type]
    if kind in (1, 3):
        return torch.stack([out[:, o % n] for o in range(wide)], 1)
    owner = torch.tensor_split(torch.arange(wide), n)
    return torch.cat([out[:, i : i + 1].expand(-1, len(owner[i])) for i in range(n)], 1)


@pytest.mark.parametrize("kind", [1, 2, 3, 4])
@pytest.mark.parametrize(("out", "wide"), [(50, 30), (20, 28), (7, 31), (24, 24)])
@pytest.mark.parametrize("top_k", [None, 2])
def test_a_mixture_by_its_definition(
    out: int, wide: int, kind: int, top_k: int | None
) -> None:
    site = build(out, wide, kind, 3)

    def delta(e: int, x: Tensor) -> Tensor:
        return by_loops(x, site.experts.M[e], out, kind)

    found = worst_of_sum(site, delta, top_k=top_k)
    assert max(found.values()) < 1e-12, found
    x = torch.randn(1, wide, dtype=torch.float64)
    one = run(site, x, torch.tensor([[0.0, 2.0, 0.0]]).double(), top_k)
    assert torch.allclose(one, site.base(x) + 2 * delta(1, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("out", "wide"), [(50, 30), (20, 28), (7, 31)])
@pytest.mark.parametrize("top_k", [None, 2])
def test_rotary_blocks_by_their_definition(
    out: int, wide: int, top_k: int | None
) -> None:
    site = build(out, wide, 6, 3)
    n = site.experts.side
    count = math.ceil(wide / n)
    half = 1 / 10000 ** (torch.arange(0, n, 2).float() / n)

    def delta(e: int, x: Tensor) -> Tensor:
        parts = []
        for b in range(count):
            block = x[:, [(b * n + i) % wide for i in range(n)]]
            pairs = torch.complex(*block.chunk(2, 1))
            angle = b * half
            turn = torch.complex(angle.cos(), angle.sin()).to(torch.complex128)
            turned = pairs * turn
            parts.append(torch.cat([turned.real, turned.imag], 1))
        M = site.experts.M[e]
        flat = torch.cat([F.linear(part, M) for part in parts], 1)
        return flat[:, [o % flat.shape[1] for o in range(out)]]

    found = worst_of_sum(site, delta, top_k=top_k)
    assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize("kind", TYPES)
def test_it_starts_at_the_base_and_takes_no_tokens(kind: int) -> None:
    weight, bias = layer_of(20, 28)
    site = site_of({"kind": "mora", "r": 2, "mora_type": kind}, weight, bias, E=3)
    x = torch.randn(5, 28, dtype=torch.float64)
    assert torch.equal(run(site, x, gates_of(5, 3)), site.base(x))
    assert site.experts.count() == 3 * 10 * 10
    none = run(site, x[:0], gates_of(2, 3)[:0])
    assert none.shape == (0, 20)
    none.sum().backward()
    assert torch.equal(site.experts.M.grad, torch.zeros(3, 10, 10).double())
    zero = build(20, 28, kind, 3)
    assert torch.equal(run(zero, x, torch.zeros(5, 3).double()), zero.base(x))


def test_memory_does_not_grow_with_the_experts() -> None:
    kept: dict[int, int] = {}
    for E in (2, 8):
        site = build(40, 40, 6, E)
        x = torch.randn(16, 40, dtype=torch.float64, requires_grad=True)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (sizes.append(t.numel()), t)[1],  # noqa: B023
            lambda t: t,
        ):
            run(site, x, gates_of(16, E).requires_grad_())
        kept[E] = sum(sizes) - 6 * 16 - site.experts.M.numel() - 16 * E
    assert kept[8] == kept[2] < 16 * 8 * 40


def test_half_precision_bases() -> None:
    weight, bias = layer_of(20, 28)
    settings = {"kind": "mora", "r": 2}
    site = site_of(settings, weight.bfloat16(), bias.bfloat16(), E=2)
    site.experts.float()
    disturb(site)
    x = torch.randn(5, 28).bfloat16()
    y = run(site, x, gates_of(5, 2).float())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and site.experts.M.grad.dtype == torch.float32
    exact = site_of(settings, weight.bfloat16().double(), bias.bfloat16().double(), E=2)
    exact.experts.load_state_dict(site.experts.state_dict())
    want = run(exact, x.double(), gates_of(5, 2))
    assert (y.double() - want).abs().max() < 0.05 * want.abs().max()


def test_a_matrix_wider_than_the_input_is_refused() -> None:
    with pytest.raises(WrapError, match=r"experts\.r=8.*4 to 60.*side 23.*no r works"):
        build(60, 4, 1, 1, r=8)
    with pytest.raises(WrapError, match="side 32, more than its 28 inputs; r up to 18"):
        build(20, 28, 6, 1, r=21)
    assert build(20, 28, 6, 1, r=18).experts.side == 28
