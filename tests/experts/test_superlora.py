"""Folded Tucker banks: LoRA and LoTR as special cases, any order by its definition."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import molora
from molora.errors import ConfigError, WrapError
from molora.experts.projection import FixedProjection
from molora.experts.projection import hadamard as fast_hadamard
from molora.model import adapter_parameters, sites
from molora.wrapped import adapter_tensors
from tests.families import (
    disturb,
    gates_of,
    layer_of,
    off,
    run,
    site_of,
    vector,
    worst_of_sum,
    worst_of_vector,
)

Factory = Callable[..., PreTrainedModel]
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


def pair(shapes: list[tuple[int, int]], E: int = 1, **experts: Any) -> Any:
    """Linear layers [O, I] in float64 whose weights stand in the same groups."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(ins, outs) for outs, ins in shapes]
    raw = {
        "target_modules": [str(i) for i in range(len(shapes))],
        "experts": {"kind": "superlora", "num_experts": E, **experts},
        "router": {"kind": "soft"} if E > 1 else {"kind": "none"},
    }
    model = torch.nn.ModuleList(layers)
    molora.wrap(model, molora.AdapterConfig.from_dict(raw)).double()
    return model


def whole(own: Any, e: int, sides: list[int], size: int) -> Tensor:
    """All groups of one expert, written out: [S]."""
    M, found = len(sides), []
    for g in range(own.A1.shape[1]):
        axes, outer = "abcdef"[:M], "uvwxyz"[:M]
        factors = [getattr(own, f"A{m + 1}")[e, g] for m in range(M)]
        if "core" in dict(own.named_parameters()):
            parts = ",".join(o + a for o, a in zip(outer, axes, strict=True))
            made = torch.einsum(f"{axes},{parts}->{outer}", own.core[e, g], *factors)
        else:
            rule = ",".join(o + "a" for o in outer)
            made = torch.einsum(f"{rule}->{outer}", *factors)
        assert made.shape == tuple(sides)
        found.append(made.flatten()[:size])
    return own.scale * torch.cat(found)


ALIKE = [(12, 18)] * 4
OTHERS = [(12, 18), (7, 9), (18, 12), (5, 31)]
JOINED: list[tuple[list[tuple[int, int]], dict[str, Any], list[int], bool]] = [
    (OTHERS, {"order": 3, "groups": 1}, [9, 9, 9], False),
    (OTHERS, {"order": 3, "groups": 3, "core": "diagonal"}, [7, 7, 7], False),
    (OTHERS, {"order": 2, "groups": 7}, [10, 10], False),
    (OTHERS, {"order": 4, "groups": 50}, [2, 2, 2, 2], False),
    (ALIKE, {"order": 3, "fold": "weight"}, [4, 12, 18], True),
    (ALIKE, {"order": 5, "fold": "weight"}, [4, 3, 4, 3, 6], True),
    (ALIKE, {"order": 4, "fold": "weight", "core": "diagonal"}, [4, 12, 3, 6], True),
    (ALIKE, {"order": 3, "fold": "weight", "groups": 2}, [2, 12, 18], True),
    (ALIKE, {"order": 2, "fold": "weight", "groups": 4}, [12, 18], True),
]


@pytest.mark.parametrize(("shapes", "more", "sides", "factored"), JOINED)
@pytest.mark.parametrize("top_k", [None, 2])
def test_layers_in_the_same_groups(
    shapes: list[tuple[int, int]],
    more: dict[str, Any],
    sides: list[int],
    factored: bool,
    top_k: int | None,
) -> None:
    model = pair(shapes, E=3, r=2, alpha=3.0, scope="model", **more)
    found = list(sites(model).values())
    own: Any = found[0].experts
    disturb(found[0])
    counts = [site.experts.count() for site in found]
    entries = sum(math.prod(shape) for shape in shapes)
    G, core = more.get("groups", 1), 0 if "core" in more else 2 ** len(sides)
    assert counts == [3 * G * (2 * sum(sides) + core), 0, 0, 0]
    start, size = 0, -(-entries // G)
    for site, shape in zip(found, shapes, strict=True):
        assert (site.experts.split is not None) == factored
        stop = start + math.prod(shape)
        dense = [whole(own, e, sides, size)[start:stop].view(shape) for e in range(3)]
        start = stop
        x = torch.randn(6, shape[1], dtype=torch.float64, requires_grad=True)
        gates = gates_of(6, 3, top_k).requires_grad_()
        want = site.base(x) + sum(
            gates[:, e : e + 1] * (x @ dense[e].t()) for e in range(3)
        )
        got = run(site, x, gates, top_k)
        assert off(got, want) < 1e-12
        leaves = [x, gates, *own.parameters()]
        c = torch.randn_like(want)
        theirs = torch.autograd.grad(want, leaves, c)
        ours = list(torch.autograd.grad(got, leaves, c))
        if top_k:
            # gradients of gates that are zero are not read
            ours[1] = torch.where(gates != 0, ours[1], theirs[1])
        for one, two in zip(ours, theirs, strict=True):
            assert off(one, two) < 1e-12
        assert off(site.experts.delta_weight(1, site.base.weight), dense[1]) < 1e-12


def test_lotr_over_two_layers_is_one_tensor_of_three_axes() -> None:
    shared, hyper = vector("lotr")
    settings = {"r": hyper["r"], "alpha": hyper["alpha"], "order": 3}
    model = pair([(20, 28)] * 2, fold="weight", scope="type", **settings)
    found = list(sites(model).values())
    own: Any = found[0].experts
    files = [vector("lotr", f"{layer}/")[0] for layer in range(2)]
    with torch.no_grad():
        own.A1.copy_(torch.eye(2, 3))
        own.A2.copy_(shared["shared.U"])
        own.A3.copy_(shared["shared.V"].t())
        own.core.zero_()
        for layer, t in enumerate(files):
            own.core[0, 0, layer] = t["param.G"]
            found[layer].base.weight.copy_(t["base.weight"])
            found[layer].base.bias.copy_(t["base.bias"])
    for layer, t in enumerate(files):
        grads = {"G": lambda layer=layer: own.core.grad[0, 0, layer]}
        errors = worst_of_vector(found[layer], t, grads)
        assert max(errors.values()) < 1e-12, errors
    assert off(own.A2.grad[0, 0], shared["grad.U"]) < 1e-12
    assert off(own.A3.grad[0, 0].t(), shared["grad.V"]) < 1e-12


def test_only_rows_of_the_first_axis_that_a_layer_reads_are_formed() -> None:
    model = pair([(64, 16)] * 64, order=3, scope="model")
    site = list(sites(model).values())[40]
    made: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(  # type: ignore[no-untyped-def]
            self, func, types, args=(), kwargs=None
        ):
            out = func(*args, **(kwargs or {}))
            made.extend([out.numel()] if isinstance(out, Tensor) else [])
            return out

    with Sizes(), torch.no_grad():
        run(site, torch.randn(2, 16, dtype=torch.float64), None)
    # n = 41: two rows of 41^2, or the ranks of the other axes; the group has 65536
    assert made and max(made) <= 4 * 41**2


def test_a_model_in_one_group_is_saved_merged_and_copied(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    ids = torch.arange(1, 17).view(2, 8)
    raw = {
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "experts": {"kind": "superlora", "scope": "model", "groups": 2},
        "router": {"kind": "none"},
    }
    config = molora.AdapterConfig.from_dict(raw)
    model: Any = molora.wrap(tiny_llama(), config, seed=3)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny_llama()(ids).logits)
    first = next(iter(sites(model)))
    names = {"A1", "A2", "A3", "core"}
    assert set(adapter_tensors(model)) == {f"{first}.experts.{n}" for n in names}
    for parameter in adapter_parameters(model).values():
        parameter.data.normal_(0, 0.5)
    model.save_pretrained(tmp_path / "out")
    again = molora.load(tiny_llama(), tmp_path / "out")
    with torch.no_grad():
        want = model(ids).logits
        assert torch.equal(again(ids).logits, want)
        assert (want - tiny_llama()(ids).logits).abs().max() > 1e-3
        assert off(molora.merge(again)(ids).logits, want) < 1e-5


def test_scopes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(WrapError, match="fold=weight.*another shape.*scope: type"):
        pair([(4, 6), (6, 5)], fold="weight", scope="model")
    with pytest.raises(WrapError, match=r"layer '0'.*is \[4, 6\]"):
        pair([(4, 6), (6, 4)], fold="weight", scope="model")
    with pytest.raises(WrapError, match="order=2.*set order: 3"):
        pair([(4, 6)] * 2, fold="weight", scope="model", order=2)
    with pytest.raises(WrapError, match="groups=2.*3 layers"):
        pair([(4, 6)] * 3, fold="weight", scope="model", groups=2)
    part = {"kind": "superlora", "scope": "model"}
    with pytest.raises(WrapError, match="a part of a sum"):
        site_of({"kind": "sum", "parts": [part, {"kind": "lora"}]}, *layer_of(4, 6))
    raw = {
        "target_modules": ["0", "1"],
        "experts": {"kind": "superlora", "scope": "model"},
        "overrides": [{"match": "1", "experts": {"r": 2}}],
    }
    layers = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(2)])
    with pytest.raises(WrapError, match=r"experts\.scope.*different settings of r"):
        molora.wrap(layers, molora.AdapterConfig.from_dict(raw))


def hadamard(d: int) -> Tensor:
    """H_ij = (-1)^(number of ones that i and j share)."""
    entries = [[(-1.0) ** (i & j).bit_count() for j in range(d)] for i in range(d)]
    return torch.tensor(entries, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "shuffle"),
    [("random", False), ("random", True), ("fastfood", False), (None, True)]
    + [("fastfood", True)],
)
@pytest.mark.parametrize("scope", ["site", "model"])
def test_a_projection_by_its_definition(
    kind: str | None, shuffle: bool, scope: str
) -> None:
    G, ratio = 20, {"projection_ratio": 0.4} if kind else {}
    settings = {"groups": G, "projection": kind, "shuffle": shuffle, **ratio}
    model = pair(OTHERS[:2], E=2, r=2, scope=scope, projection_prng_key=5, **settings)
    first, site = sites(model).values()
    disturb(first)
    disturb(site)
    own: Any = first.experts if scope == "model" else site.experts
    entries = 12 * 18 + 7 * 9 if scope == "model" else 7 * 9
    N = -(-entries // G)
    P = math.ceil(0.4 * N) if kind else N
    n = own.A1.shape[2]
    assert n**3 >= P > (n - 1) ** 3 and own.count() == 2 * G * (3 * n * 2 + 8)
    fixed = own.projection
    F = torch.eye(N, P, dtype=torch.float64)
    if kind == "random":
        F = fixed.matrix
        assert F.shape == (N, P)
    if kind == "fastfood":
        d = 2 ** math.ceil(math.log2(N))
        B = torch.zeros(d, P, dtype=torch.float64)
        B[:P] = torch.diag(fixed.signs)
        mixed = torch.diag(fixed.gains) @ torch.eye(d)[fixed.order].double()
        F = (hadamard(d) @ mixed @ hadamard(d) @ B)[:N] / (N * d) ** 0.5
    if shuffle:
        assert sorted(fixed.places.tolist()) == list(range(N))
        F = F[fixed.places]
    start = 12 * 18 if scope == "model" else 0

    def dense(e: int) -> Tensor:
        folded = whole(own, e, [n] * 3, P).view(G, P)
        return (folded @ F.t()).flatten()[start : start + 63].view(7, 9)

    x, gates = torch.randn(6, 9, dtype=torch.float64), gates_of(6, 2)
    want = site.base(x) + sum(gates[:, e : e + 1] * (x @ dense(e).t()) for e in (0, 1))
    got = run(site, x, gates)
    assert off(got, want) < 1e-12
    leaves, c = list(own.parameters()), torch.randn_like(want)
    theirs = torch.autograd.grad(want, leaves, c)
    ours = torch.autograd.grad(got, leaves, c)
    assert max(off(a, b) for a, b in zip(ours, theirs, strict=True)) < 1e-12
    assert off(site.experts.delta_weight(1, site.base.weight), dense(1)) < 1e-12
    assert not any("projection" in name for name in model.state_dict())


@pytest.mark.parametrize("kind", ["random", "fastfood"])
def test_projections_keep_the_norm_on_average(kind: str) -> None:
    x = torch.randn(40, generator=torch.Generator().manual_seed(1))
    found = torch.stack(
        [FixedProjection(kind, False, 40, 100, seed)(x) for seed in range(400)]
    )
    norms = found.square().sum(1) / x.square().sum()
    assert abs(norms.mean() - 1) < 0.04 and norms.std() < 0.5
    # no output is favoured
    shares = found.square().mean(0) * 100 / x.square().sum()
    assert shares.min() > 0.6 and shares.max() < 1.5
    one, two = (FixedProjection(kind, True, 40, 100, seed)(x) for seed in (3, 3))
    assert torch.equal(one, two)
    assert not torch.equal(one, FixedProjection(kind, True, 40, 100, 4)(x))


def test_fast_hadamard_of_several_factors() -> None:
    x = torch.randn(3, 256, dtype=torch.float64)
    assert off(fast_hadamard(x), x @ hadamard(256)) < 1e-12


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"fold": "weight", "order": 2, "shuffle": True}, "which projection and shuf"),
        ({"projection": "random"}, "projection_ratio: belongs to projection"),
        ({"projection_ratio": 0.5}, "set both or neither"),
        ({"projection_prng_key": 3}, "no projection or shuffle to seed"),
        ({"projection": "random", "projection_ratio": 0.5}, "fastfood, or groups"),
    ],
)
def test_projections_that_mean_nothing_are_refused(
    settings: dict[str, Any], told: str
) -> None:
    with pytest.raises((ConfigError, WrapError), match=told):
        site_of({"kind": "superlora", **settings}, *layer_of(4, 6))


def test_a_projection_is_drawn_again_when_it_is_loaded(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    ids = torch.arange(1, 17).view(2, 8)
    experts = {"scope": "type", "groups": 2, "shuffle": True, "projection": "fastfood"}
    raw = {
        "target_modules": ["q_proj", "k_proj"],
        "experts": {"kind": "superlora", "projection_ratio": 0.3, **experts},
        "router": {"kind": "none"},
    }
    model: Any = molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(raw), seed=3)
    for parameter in adapter_parameters(model).values():
        parameter.data.normal_(0, 0.7)
    model.save_pretrained(tmp_path / "out")
    again = molora.load(tiny_llama(), tmp_path / "out")
    with torch.no_grad():
        want = model(ids).logits
        assert torch.equal(again(ids).logits, want)
        assert (want - tiny_llama()(ids).logits).abs().max() > 1e-3
