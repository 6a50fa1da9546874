"""What holds for every bilinear family: mixtures, sizes, sharing, wrapping."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import molora
from molora.experts import EXPERTS, FactorExperts
from molora.model import adapter_parameters, sites
from tests.bilinear import FAMILIES, bank, randomised

E, I, O = 3, 30, 50  # noqa: E741
# values that one expert trains, by the formulas of the papers
COUNTS = {
    "lora": 3 * (I + O),
    "adalora": 3 * (I + O + 1),
    "sora": 3 * (I + O + 1),
    "alora": 3 * (I + O),
    "bilora": 3 * (I + O + 1),
    "vera": 7 + O,
    "aflora": 3 * (I + O) + 3 + O,
    "lotr": 3 * 3,
    "melora": (2 + 1) * (I + O) // 2,
    # chunks of ceil(30 / 4) and ceil(50 / 3), one rank of its own
    "prolora": 4 * (8 + 17) + (I + O),
}
SHARED = {"lotr": 3 * (I + O)}
each = pytest.mark.parametrize("kind", FAMILIES)


def test_every_bilinear_family_is_checked_here() -> None:
    known = {k for k in EXPERTS.names() if issubclass(EXPERTS[k], FactorExperts)}
    assert known == set(FAMILIES) == set(COUNTS)


def explicit(experts: Any, x: Tensor, gates: Tensor | None) -> Tensor:
    """Sum over experts, from the dense update of each, differentiable."""
    A, Bt, scale = experts.factors()
    total = torch.zeros(len(x), Bt.shape[2], dtype=x.dtype)
    for e in range(experts.num_experts):
        delta = scale * Bt[e % len(Bt)].t() @ A[e % len(A)]
        gate = 1.0 if gates is None else gates[:, e : e + 1]
        total = total + gate * (x @ delta.t())
    return total


@each
@pytest.mark.parametrize("tokens", [0, 1, 6])
@pytest.mark.parametrize("count", [1, E])
def test_a_mixture_is_the_explicit_sum(kind: str, tokens: int, count: int) -> None:
    experts = bank(kind, I, O, num_experts=count, **FAMILIES[kind])
    x = torch.randn(tokens, I, dtype=torch.float64, requires_grad=True)
    base = torch.randn(tokens, O, dtype=torch.float64, requires_grad=True)
    gates = None
    if count > 1:
        gates = torch.rand(tokens, count, dtype=torch.float64, requires_grad=True)
    # nothing is added at the start
    assert torch.equal(experts(x, gates, base), base)
    randomised(experts)
    got, want = experts(x, gates, base), base + explicit(experts, x, gates)
    assert (got - want).abs().sum() <= 1e-12 * max(1, want.abs().sum())
    assert torch.allclose(experts(x, gates, None) + base, got, atol=1e-10)
    layer = nn.Linear(I, O).double().requires_grad_(False)
    around = experts(x, gates, layer)
    assert torch.allclose(around, layer(x) + explicit(experts, x, gates), atol=1e-10)
    inputs = [x, base, *experts.parameters()] + ([] if gates is None else [gates])
    c = torch.randn_like(got)
    ours = torch.autograd.grad(got, inputs, c, allow_unused=True)
    theirs = torch.autograd.grad(want, inputs, c, allow_unused=True)
    for one, two in zip(ours, theirs, strict=True):
        assert one is not None and two is not None
        assert (one - two).abs().sum() <= 1e-12 * max(1.0, float(two.abs().sum()))


@each
def test_delta_and_factors_of_each_expert(kind: str) -> None:
    experts = randomised(bank(kind, I, O, num_experts=E, **FAMILIES[kind]))
    A, Bt, scale = experts.factors()
    for e in range(E):
        want = scale * Bt[e % len(Bt)].t() @ A[e % len(A)]
        got = experts.delta_weight(e)
        assert got.dtype == torch.float64
        assert (got - want).abs().max() <= 1e-12 * want.abs().max()
        a, b = experts.expert_factors(e)
        assert (b.t() @ a - want).abs().max() <= 1e-5 * want.abs().max()
    assert not torch.equal(experts.delta_weight(0), experts.delta_weight(1))


@each
def test_it_trains_as_many_values_as_its_formula_says(kind: str) -> None:
    settings = FAMILIES[kind]
    for count in (1, E):
        experts = bank(kind, I, O, num_experts=count, **settings)
        assert experts.count() == count * COUNTS[kind] + SHARED.get(kind, 0)
        counted = sum(
            p.numel() for n, p in experts.named_parameters() if n not in experts.frozen
        )
        assert counted == experts.count()


@each
def test_experts_are_drawn_apart_and_from_the_generator(kind: str) -> None:
    one, two = (bank(kind, I, O, num_experts=E, **FAMILIES[kind]) for _ in range(2))
    for name, values in one.named_parameters():
        assert torch.equal(values, dict(two.named_parameters())[name])
    A = one.value("A")
    assert len(A) == 1 or not torch.equal(A[0], A[1])


@each
def test_experts_share_what_is_asked_for(kind: str) -> None:
    names = EXPERTS[kind].Config.TENSORS  # type: ignore[attr-defined]
    for name in names:
        made = bank(kind, I, O, num_experts=E, **FAMILIES[kind], shared=[name])
        experts = randomised(made)
        assert len(experts.value(name)) == 1
        assert all(len(experts.value(n)) == E for n in names if n != name)
        x = torch.randn(4, I, dtype=torch.float64)
        gates = torch.rand(4, E, dtype=torch.float64)
        got = experts(x, gates, None)
        assert (got - explicit(experts, x, gates)).abs().max() < 1e-10


class Layers(nn.Module):
    """Two layers of linears of different widths."""

    def __init__(self) -> None:
        super().__init__()
        block = {"up": nn.Linear(12, 20), "down": nn.Linear(20, 12)}
        self.layers = nn.ModuleList(
            nn.ModuleDict(copy.deepcopy(block)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            x = x + layer["down"](layer["up"](x).tanh())
        return x


@each
def test_a_wrapped_model_merges_copies_collapses_and_runs_in_bf16(
    kind: str, tmp_path: Any
) -> None:
    def wrapped(base: nn.Module, count: int) -> Any:
        router = {"kind": "soft"} if count > 1 else {"kind": "none"}
        raw = {
            "target_modules": ["up", "down"],
            "experts": {"kind": kind, "num_experts": count, **FAMILIES[kind]},
            "router": router,
        }
        return molora.wrap(base, molora.AdapterConfig.from_dict(raw))

    def filled(model: Any) -> Any:
        for parameter in adapter_parameters(model).values():
            parameter.data.normal_(0, 0.2)
        return model

    base = Layers()
    x = torch.randn(5, 12)
    want = base(x)
    for count in (1, E):
        model = wrapped(copy.deepcopy(base), count)
        assert torch.equal(model(x), want)
        filled(model)
        before = model(x)
        assert not torch.allclose(before, want)
        assert torch.equal(copy.deepcopy(model)(x), before)
        folder = tmp_path / str(count)
        molora.checkpoint.save_pretrained(model, folder)
        again = molora.load(copy.deepcopy(base), folder)
        assert torch.allclose(again(x), before, atol=1e-5)
        half = filled(wrapped(copy.deepcopy(base).bfloat16(), count))
        y = half(x.bfloat16())
        assert y.dtype == torch.bfloat16 and torch.isfinite(y).all()
        assert all(p.dtype == torch.float32 for p in adapter_parameters(half).values())
        y.sum().backward()
        for name, parameter in adapter_parameters(half).items():
            assert parameter.requires_grad == (parameter.grad is not None), name
        if count == 1:
            single = copy.deepcopy(model)
            assert torch.allclose(molora.merge(single)(x), before, atol=1e-5)
            assert torch.equal(molora.unmerge(single)(x), before)
        assert len(sites(model)) == 4
        molora.unwrap(model)
        assert torch.equal(model(x), want)


@pytest.mark.parametrize("kind", ["adalora", "sora", "alora", "bilora"])
def test_masked_ranks_add_nothing_and_are_left_out_of_the_factors(kind: str) -> None:
    settings = FAMILIES[kind] | ({"singular_values": "raw"} if kind == "bilora" else {})
    experts = randomised(bank(kind, I, O, num_experts=2, **settings))
    keep = torch.tensor([[True, False, True], [False, False, False]])
    diagonal = experts.diagonal().detach() * keep
    want = experts.value("B")[0].t() @ (diagonal[0][:, None] * experts.value("A")[0])
    experts.mask_ranks(keep)
    if kind == "alora":
        want = experts.value("B")[0].t() @ (keep[0][:, None] * experts.value("A")[0])
    got = experts.delta_weight(0)
    assert (got - experts.scale * want).abs().max() < 1e-12
    assert not experts.delta_weight(1).any()
    a, b = experts.expert_factors(0)
    assert a.shape == (2, I) and (b.t() @ a - got).abs().max() < 1e-4
    a, b = experts.expert_factors(1)
    assert a.shape == (1, I) and not b.any()
    with pytest.raises(molora.errors.WrapError, match=r"bool tensor \(2, 3\)"):
        experts.mask_ranks(keep[:1])
    if kind == "alora":
        experts.mask_ranks(~keep)
        assert torch.equal(experts.gates, (~keep).double())
