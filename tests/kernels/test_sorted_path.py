"""The sorted form against the definition and autograd; dropout drawn again."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from molora.errors import ConfigError
from molora.kernels import lowrank_mixture

NAMES = ("x", "A", "Bt", "gates", "base")


def by_einsum(p: dict[str, Any], keep: Tensor | None = None) -> dict[str, Tensor]:
    """Output and gradients in float64, by plain autograd through one einsum."""
    v = {n: p[n].detach().double().requires_grad_() for n in NAMES}
    experts = v["gates"].shape[1]
    x = v["x"] if keep is None else v["x"] * keep.double()
    A, Bt = (v[n].expand(experts, -1, -1) for n in ("A", "Bt"))
    scale = torch.as_tensor(p["scale"], dtype=torch.float64).expand(experts)
    update = torch.einsum("ti,eri,ero,te,e->to", x, A, Bt, v["gates"], scale)
    y = v["base"] + update
    y.backward(p["dy"].double())
    return {"y": y.detach(), **{f"d{n}": v[n].grad for n in NAMES}}


def by_backend(p: dict[str, Any], backend: str, **options: Any) -> dict[str, Tensor]:
    v = {n: p[n].detach().requires_grad_() for n in NAMES}
    y = lowrank_mixture(
        v["x"], v["A"], v["Bt"], v["gates"], p["scale"], v["base"], backend, **options
    )
    y.backward(p["dy"])
    return {"y": y.detach(), **{f"d{n}": v[n].grad for n in NAMES}}


def assert_near(p: dict[str, Any], got: Any, want: Any, tol: float) -> None:
    # the gate of an expert that was not chosen has no gradient in the sorted form
    want = {**want, "dgates": want["dgates"] * (p["gates"] != 0)}
    for name, value in want.items():
        found = got[name].double()
        assert found.shape == value.shape, name
        if name == "dgates":
            found = found * (p["gates"] != 0)
        if value.numel():
            worst = (found - value).abs().max()
            assert worst <= tol * max(1.0, float(value.abs().max())), (name, worst)


def problem(
    T: int, E: int, K: int, wide: int, out: int, r: int, shared: str, seed: int
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    chosen = torch.rand(T, E, generator=g).topk(K, -1).indices
    gates = torch.zeros(T, E).scatter(1, chosen, torch.rand(T, K, generator=g) + 0.1)
    return {
        "x": torch.randn(T, wide, generator=g),
        "A": torch.randn(1 if shared == "A" else E, r, wide, generator=g),
        "Bt": torch.randn(1 if shared == "B" else E, r, out, generator=g),
        "gates": gates,
        "scale": torch.rand(E, generator=g) + 0.5,
        "base": torch.randn(T, out, generator=g),
        "dy": torch.randn(T, out, generator=g),
    }


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    T=st.sampled_from([0, 1, 2, 7, 40]),
    experts=st.sampled_from([(1, 1), (2, 1), (5, 2), (7, 7), (13, 3)]),
    width=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    r=st.sampled_from([4, 8, 12]),
    shared=st.sampled_from(["", "A", "B"]),
    seed=st.integers(0, 99),
)
def test_values_and_all_gradients_equal_an_einsum(
    T: int,
    experts: tuple[int, int],
    width: tuple[int, int],
    r: int,
    shared: str,
    seed: int,
) -> None:
    wide, out = (4 * w for w in width)
    p = problem(T, *experts, wide, out, r, shared, seed)
    want = by_einsum(p)
    got = by_backend(p, "sorted", top_k=experts[1])
    assert_near(p, got, want, 2e-5)
    unchosen = p["gates"] == 0
    assert not got["dgates"][unchosen].any()


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_any_strides(layout: str) -> None:
    p = problem(9, 5, 2, 8, 12, 4, "", 1)
    for name in ("x", "base", "dy", "gates"):
        value = p[name]
        if layout == "transposed":
            p[name] = value.t().contiguous().t()
        elif layout == "sliced":
            p[name] = torch.cat([value, value + 1], 1)[:, : value.shape[1]]
        elif name != "gates":
            p[name] = value[:1].expand_as(value)
    assert_near(p, by_backend(p, "sorted"), by_einsum(p), 2e-5)


def test_all_tokens_to_one_expert_and_experts_without_tokens() -> None:
    p = problem(20, 6, 1, 8, 8, 4, "", 2)
    p["gates"] = torch.zeros(20, 6)
    p["gates"][:, 4] = 0.7
    got = by_backend(p, "sorted")
    assert_near(p, got, by_einsum(p), 2e-5)
    others = [0, 1, 2, 3, 5]
    assert not got["dA"][others].any() and not got["dBt"][others].any()


def test_no_gate_at_all_is_the_base() -> None:
    p = problem(6, 3, 1, 8, 8, 4, "", 3)
    p["gates"] = torch.zeros(6, 3)
    got = by_backend(p, "sorted")
    assert torch.equal(got["y"], p["base"])
    assert all(not got[n].any() for n in ("dx", "dA", "dBt", "dgates"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("emulated", [True, False])
def test_half_precision_inputs(
    dtype: torch.dtype, emulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from molora.kernels import torch_path

    monkeypatch.setattr(torch_path, "slow_on_cpu", lambda dtype, device: emulated)
    p = problem(200, 9, 2, 64, 48, 8, "", 4)
    for name in ("x", "base", "dy"):
        p[name] = p[name].to(dtype)
    got, dense = by_backend(p, "sorted"), by_backend(p, "torch")
    want = by_einsum(p)
    for name, value in want.items():
        assert got[name].dtype == dense[name].dtype
        chosen = p["gates"] != 0 if name == "dgates" else torch.tensor(1.0)
        ours, theirs = (
            ((found[name].double() - value) * chosen).norm() for found in (got, dense)
        )
        # rounded as often as the concatenated form, summed over pairs
        assert ours <= 2.0 * theirs + 1e-6, (name, float(ours), float(theirs))


@pytest.mark.parametrize("shared", ["", "B"])
@pytest.mark.parametrize(
    ("inner", "outer"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)],
)
def test_a_base_of_higher_precision(
    inner: torch.dtype, outer: torch.dtype, shared: str
) -> None:
    p = problem(30, 5, 2, 16, 8, 8, shared, 9)
    for name in ("x", "A", "Bt"):
        p[name] = p[name].to(inner)
    for name in ("base", "dy"):
        p[name] = p[name].to(outer)
    got, dense = by_backend(p, "sorted"), by_backend(p, "torch")
    assert got["y"].dtype == dense["y"].dtype == outer
    tol = 2e-2 if inner == torch.bfloat16 else 2e-5
    assert_near(p, got, by_einsum(p), tol)


def test_the_definition_takes_no_tokens_and_only_a_base() -> None:
    p = problem(0, 3, 1, 8, 8, 4, "", 3)
    assert_near(p, by_backend(p, "reference"), by_einsum(p), 1e-12)
    p = problem(4, 3, 1, 8, 8, 4, "", 3)
    base = p["base"].requires_grad_()
    args = (p["x"], p["A"], p["Bt"], p["gates"], 1.0, base, "reference")
    lowrank_mixture(*args).backward(p["dy"].double())
    assert torch.equal(base.grad, p["dy"])


def test_each_argument_may_be_frozen() -> None:
    p = problem(9, 5, 2, 8, 12, 4, "", 5)
    want = by_einsum(p)
    for missing in NAMES:
        v = {n: p[n].detach().clone().requires_grad_(n != missing) for n in NAMES}
        y = lowrank_mixture(*(v[n] for n in NAMES[:4]), p["scale"], v["base"], "sorted")
        y.backward(p["dy"])
        assert v[missing].grad is None
        for name in NAMES:
            if name not in (missing, "gates"):
                error = (v[name].grad - want[f"d{name}"]).abs().max()
                assert error < 1e-4, (missing, name)


@pytest.mark.parametrize("backend", ["torch", "sorted", "reference"])
def test_dropout_is_drawn_again_in_backward(backend: str) -> None:
    p = problem(60, 5, 2, 32, 24, 4, "", 6)
    options = {"dropout": 0.3, "seed": 11}
    # the mask seen through one expert that copies its input
    eye = torch.eye(32)[None]
    ones = torch.ones(60, 32)
    gate = torch.ones(60, 1)
    keep = lowrank_mixture(ones, eye, eye, gate, 1.0, None, backend, **options)
    assert keep.float().unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert (keep == 0).float().mean() == pytest.approx(0.3, abs=0.05)
    got = by_backend(p, backend, **options)
    assert_near(p, got, by_einsum(p, keep), 2e-5)
    other = by_backend(p, backend, dropout=0.3, seed=12)
    assert not torch.equal(other["y"], got["y"])


def test_nothing_but_x_and_rank_space_is_kept_for_backward() -> None:
    p = problem(200, 16, 2, 64, 48, 8, "", 7)
    leaves = {n: p[n].requires_grad_() for n in NAMES}
    for backend in ("torch", "sorted"):
        kept: list[Tensor] = []

        def pack(value: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(value)
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            lowrank_mixture(
                *(leaves[n] for n in NAMES[:4]),
                p["scale"],
                leaves["base"],
                backend,
                dropout=0.1,
                seed=3,
            )
        own = {t.data_ptr() for t in leaves.values()}
        extra = sum(t.numel() for t in kept if t.data_ptr() not in own)
        # z of every rank, or of the chosen pairs
        assert extra == 200 * (16 * 8 if backend == "torch" else 2 * 8)


def test_it_declines_what_it_cannot_do() -> None:
    p = problem(4, 3, 2, 8, 8, 4, "", 8)
    args = [p[n].double() for n in ("x", "A", "Bt", "gates", "scale", "base")]
    with pytest.raises(ConfigError, match="'sorted' declined: computes in .*float64"):
        lowrank_mixture(*args, backend="sorted")
    p = problem(4, 3, 2, 6, 8, 3, "", 8)
    args = [p[n] for n in ("x", "A", "Bt", "gates", "scale", "base")]
    with pytest.raises(ConfigError, match="r=3, I=6: rows must be multiples of 16"):
        lowrank_mixture(*args, backend="sorted")
