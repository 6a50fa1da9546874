"""The grouped low-rank matmul against its definition, autograd and exact rounding."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from molora.errors import ConfigError
from molora.kernels import (
    lowrank_mixture,
    reference,
    router_logits,
    torch_path,
)

NAMES = ("x", "A", "Bt", "gates", "base")


def by_einsum(
    x: Tensor, A: Tensor, Bt: Tensor, gates: Tensor | None, scale: Any, base: Any
) -> Tensor:
    """The same sum in one einsum, differentiated by plain autograd."""
    experts = 1 if gates is None else gates.shape[1]
    gates = torch.ones(len(x), 1, dtype=x.dtype) if gates is None else gates
    scale = torch.as_tensor(scale, dtype=x.dtype).expand(experts)
    A, Bt = (f.expand(experts, -1, -1) for f in (A, Bt))
    y = torch.einsum("ti,eri,ero,te,e->to", x, A, Bt, gates, scale)
    return y if base is None else base + y


def problem(
    T: int, E: int, wide: int, out: int, r: int, *, shared: str = "", seed: int = 0
) -> dict[str, Any]:
    """Random arguments in float64; gates are top-2 where there are three experts."""
    g = torch.Generator().manual_seed(seed)
    gates = torch.rand(T, E, generator=g, dtype=torch.float64)
    if E > 2:
        gates = gates * (gates >= gates.topk(2, -1).values[:, -1:])
    return {
        "x": torch.randn(T, wide, generator=g, dtype=torch.float64),
        "A": torch.randn(1 if "A" in shared else E, r, wide, generator=g).double(),
        "Bt": torch.randn(1 if "B" in shared else E, r, out, generator=g).double(),
        "gates": gates,
        "scale": torch.rand(E, generator=g, dtype=torch.float64) + 0.5,
        "base": torch.randn(T, out, generator=g, dtype=torch.float64),
        "dy": torch.randn(T, out, generator=g, dtype=torch.float64),
    }


def run(function: Any, p: dict[str, Any]) -> dict[str, Tensor]:
    """Output and every gradient of sum(y * dy)."""
    args = {}
    for name in (*NAMES, "scale"):
        value = p[name]
        leaf = name != "scale" and value is not None
        args[name] = value.detach().requires_grad_() if leaf else value
    y = function(*(args[n] for n in ("x", "A", "Bt", "gates", "scale", "base")))
    y.backward(p["dy"].to(y.dtype))
    grads = {f"d{n}": args[n].grad for n in NAMES if args[n] is not None}
    return {"y": y.detach(), **grads}


def assert_near(got: dict[str, Tensor], want: dict[str, Tensor], tol: float) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name] is not None, name
        assert got[name].shape == value.shape, name
        if value.numel():
            worst = (got[name].double() - value.double()).abs().max()
            assert worst <= tol * max(1.0, float(value.abs().max())), (name, worst)


LAYOUTS = {
    "plain": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced": lambda x: torch.cat([x, x + 1], dim=1)[:, : x.shape[1]],
    "strided": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "expanded": lambda x: x[:1].expand_as(x) if len(x) else x,
}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    T=st.sampled_from([0, 1, 2, 7, 40]),
    E=st.sampled_from([1, 2, 3, 5, 7]),
    width=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    r=st.integers(1, 9),
    shared=st.sampled_from(["", "A", "B", "AB"]),
    scale=st.sampled_from(["list", 1.0, 2, 0.3]),
    layout=st.sampled_from(sorted(LAYOUTS)),
    odd=st.sampled_from(["", "no gates", "no base", "one expert", "dense"]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 99),
)
def test_values_and_all_gradients_equal_an_einsum(
    T: int,
    E: int,
    width: tuple[int, int],
    r: int,
    shared: str,
    scale: Any,
    layout: str,
    odd: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    E = 1 if odd == "no gates" else E
    p = problem(T, E, *width, r, shared=shared, seed=seed)
    if scale != "list":
        p["scale"] = scale
    if odd == "no gates":
        p["gates"] = None
    elif odd == "no base":
        p["base"] = None
    elif odd == "one expert":
        p["gates"] = torch.zeros(T, E).double()
        p["gates"][:, E - 1] = 1
    elif odd == "dense":
        p["gates"] = torch.rand(T, E, generator=torch.Generator().manual_seed(1))
        p["gates"] = p["gates"].double()
    p = {k: LAYOUTS[layout](v) if k in (*NAMES[3:], "x") and v is not None else v
         for k, v in p.items()}  # fmt: skip
    # the exact problem is the one that the lower precision sees
    low = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in p.items()}
    high = {k: v.double() if isinstance(v, Tensor) else v for k, v in low.items()}
    before = {k: v.clone() for k, v in low.items() if isinstance(v, Tensor)}
    want = run(by_einsum, high)
    assert_near(run(lowrank_mixture, low), want, 1e-11 if dtype.itemsize == 8 else 1e-5)
    if T:
        assert_near(run(reference, high), want, 1e-11)
    for name, value in before.items():
        assert torch.equal(low[name], value), f"{name} was modified"


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_definition_on_numbers_worked_by_hand(backend: str) -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    # expert 0: (x1 + x2) * 10; expert 1: x1 * 100
    A = torch.tensor([[[1.0, 1.0]], [[1.0, 0.0]]])
    Bt = torch.tensor([[[10.0]], [[100.0]]])
    gates = torch.tensor([[0.5, 0.25], [0.0, 1.0]])
    base = torch.tensor([[7.0], [8.0]])
    want = [[7 + 0.5 * 2 * 30 + 0.25 * 3 * 100], [8 + 3 * 300]]
    scale = torch.tensor([2.0, 3.0])
    got = lowrank_mixture(x, A, Bt, gates, scale, base, backend=backend)
    assert got.tolist() == want


@pytest.mark.parametrize("shared", ["", "A", "B"])
@pytest.mark.parametrize("gated", [True, False])
def test_gradcheck(shared: str, gated: bool) -> None:
    p = problem(3, 4 if gated else 1, 5, 6, 2, shared=shared)
    inputs = [p[n].requires_grad_() for n in ("x", "A", "Bt")]
    gates = p["gates"].requires_grad_() if gated else None
    scale = p["scale"] if gated else 1.5
    args = (*inputs, gates, p["base"].requires_grad_())

    def call(x: Tensor, A: Tensor, Bt: Tensor, gates: Any, base: Tensor) -> Tensor:
        return lowrank_mixture(x, A, Bt, gates, scale, base)

    assert torch.autograd.gradcheck(call, args)


@pytest.mark.parametrize("missing", NAMES)
def test_each_argument_may_be_frozen(missing: str) -> None:
    p = problem(4, 3, 5, 6, 2)
    args = {n: p[n].requires_grad_(n != missing) for n in NAMES}
    y = lowrank_mixture(*(args[n] for n in NAMES[:4]), p["scale"], args["base"])
    y.backward(p["dy"])
    want = run(by_einsum, p)
    for name in NAMES:
        if name == missing:
            assert args[name].grad is None
        else:
            assert torch.allclose(args[name].grad, want[f"d{name}"], atol=1e-12), name


def test_an_unchosen_expert_gets_a_zero_gradient() -> None:
    p = problem(6, 3, 5, 4, 2)
    p["gates"][:, 1] = 0
    got = run(lowrank_mixture, p)
    assert torch.equal(got["dA"][1], torch.zeros(2, 5, dtype=torch.float64))
    assert torch.equal(got["dBt"][1], torch.zeros(2, 4, dtype=torch.float64))
    assert got["dA"][0].abs().max() > 0
    # the gate of an unchosen expert still gets its gradient
    assert got["dgates"][:, 1].abs().min() > 0


@pytest.fixture(params=["emulated", "native"])
def bf16_cpu(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both forms of the path: on a CPU that multiplies bfloat16 and one that cannot."""
    slow = request.param == "emulated"
    monkeypatch.setattr(torch_path, "slow_on_cpu", lambda dtype, device: slow)
    yield request.param


def to_bf16(value: Tensor) -> Tensor:
    return value.bfloat16().double()


def correctly_rounded(p: dict[str, Any]) -> dict[str, Tensor]:
    """Every product exact, every intermediate rounded once to bfloat16."""
    E, r = p["A"].shape[:2]
    A, Bt = to_bf16(p["A"]), to_bf16(p["Bt"])
    x, dy, w = p["x"], p["dy"], p["gates"] * p["scale"]
    z = to_bf16(torch.einsum("ti,eri->ter", x, A))
    zg = to_bf16(z * w[..., None])
    y = to_bf16(p["base"] + torch.einsum("ter,ero->to", zg, Bt))
    h = to_bf16(torch.einsum("to,ero->ter", dy, Bt))
    dz = to_bf16(h * w[..., None])
    return {
        "y": y,
        "dx": to_bf16(torch.einsum("ter,eri->ti", dz, A)),
        "dA": to_bf16(torch.einsum("ter,ti->eri", dz, x)),
        "dBt": to_bf16(torch.einsum("ter,to->ero", zg, dy)),
        "dgates": (h * z).sum(-1) * p["scale"],
        "dbase": dy,
    }


@pytest.mark.parametrize("T", [1, 5, 200])
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("E", [2, 8])
def test_bf16_error_is_that_of_correct_rounding(
    bf16_cpu: str, T: int, with_base: bool, E: int
) -> None:
    p = problem(T, E, 96, 80, 8)
    if not with_base:
        p["base"] = p["base"] * 0
    for name in ("x", "base", "dy"):
        p[name] = to_bf16(p[name])
    exact, rounded = run(reference, p), correctly_rounded(p)
    low = {k: v.bfloat16() if k in ("x", "base", "dy") else v.float()
           for k, v in p.items()}  # fmt: skip
    got = run(lowrank_mixture, low)
    assert got["y"].dtype == got["dx"].dtype == got["dbase"].dtype == torch.bfloat16
    assert got["dA"].dtype == got["dBt"].dtype == got["dgates"].dtype == torch.float32
    for name, value in exact.items():
        ours = (got[name].double() - value).norm()
        theirs = (rounded[name] - value).norm()
        # 1.5 is the figure to reach; a needless rounding already shows at 1.1
        assert ours <= 1.1 * theirs + 1e-12, (name, float(ours), float(theirs))


def test_few_and_many_tokens_agree_to_rounding(bf16_cpu: str) -> None:
    # 16 rank columns: 15 tokens are cast up, 16 are not
    p = problem(64, 4, 48, 40, 4)
    x, base = p["x"].bfloat16(), p["base"].bfloat16()
    A, Bt, gates, scale = (p[n].float() for n in ("A", "Bt", "gates", "scale"))
    many = lowrank_mixture(x, A, Bt, gates, scale, base)
    few = [
        lowrank_mixture(x[i : i + 15], A, Bt, gates[i : i + 15], scale,
                        base[i : i + 15]) for i in range(0, 64, 15)
    ]  # fmt: skip
    exact = reference(x, A, Bt, gates, scale, base)
    few_error = (torch.cat(few).double() - exact).norm()
    assert few_error <= 1.01 * (to_bf16(exact) - exact).norm()
    assert (torch.cat(few).double() - many.double()).norm() <= 2 * 2**-8 * exact.norm()


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters() -> (
    None
):
    p = problem(40, 3, 24, 20, 4)
    low = {k: v.float() for k, v in p.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = lowrank_mixture(low["x"], low["A"], low["Bt"], low["gates"], low["scale"])
        assert y.dtype == torch.bfloat16
        got = run(lowrank_mixture, low)
    assert got["y"].dtype == torch.float32
    exact = run(reference, p)
    for name, value in exact.items():
        error = (got[name].double() - value).norm() / value.norm()
        assert got[name].dtype == torch.float32
        assert error < 2**-7, (name, float(error))
    # as every operator under autocast does
    with torch.autocast("cpu", torch.bfloat16):
        double = run(lowrank_mixture, p)
    assert_near(double, exact, 1e-11)


def test_nothing_of_low_precision_but_x_and_z_is_kept_for_backward(
    bf16_cpu: str,
) -> None:
    p = {k: v.float() for k, v in problem(200, 4, 48, 40, 4).items()}
    x, base = p["x"].bfloat16(), p["base"].bfloat16()
    leaves = {n: p[n].requires_grad_() for n in ("A", "Bt", "gates")}
    kept: list[Tensor] = []

    def pack(value: Tensor) -> Tensor:
        kept.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        lowrank_mixture(x, *leaves.values(), p["scale"], base)
    own = {t.data_ptr() for t in (x, base, *leaves.values())}
    extra = [t for t in kept if t.data_ptr() not in own]
    assert [tuple(t.shape) for t in extra] == [(200, 16)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", torch.zeros(4, 6)),
        ("x", torch.zeros(2, 4, 5)),
        ("A", torch.zeros(2, 2, 5)),
        ("A", torch.zeros(3, 1, 5)),
        ("Bt", torch.zeros(2, 2, 4)),
        ("Bt", torch.zeros(2, 4)),
        ("gates", torch.zeros(1, 3)),
        ("gates", torch.zeros(4, 1)),
        ("gates", None),
        ("scale", torch.zeros(4, 1)),
        ("scale", torch.zeros(2)),
        ("base", torch.zeros(1, 4)),
        ("base", torch.zeros(4)),
    ],
)
def test_shapes_that_broadcasting_would_accept_are_refused(
    name: str, value: Tensor | None
) -> None:
    args = {**problem(4, 3, 5, 4, 2), name: value}
    order = ("x", "A", "Bt", "gates", "scale", "base")
    with pytest.raises(ConfigError, match="shapes do not fit") as caught:
        lowrank_mixture(*(args[n] for n in order))
    shown = None if value is None else tuple(value.shape)
    assert f"'{name}': {shown}" in str(caught.value)


@pytest.mark.parametrize("dropout", [1.0, -0.1, float("nan")])
def test_dropout_out_of_range_is_refused(dropout: float) -> None:
    p = problem(4, 3, 5, 4, 2)
    args = [p[n] for n in ("x", "A", "Bt", "gates", "scale", "base")]
    with pytest.raises(ConfigError, match=f"dropout={dropout} is not in"):
        lowrank_mixture(*args, dropout=dropout)


def test_backends_are_chosen_by_name_and_say_why_not() -> None:
    p = problem(4, 3, 5, 4, 2)
    args = [p[n] for n in ("x", "A", "Bt", "gates", "scale", "base")]
    with pytest.raises(ConfigError, match=r"'tritn' is unknown.*'torch'.*'reference'"):
        lowrank_mixture(*args, backend="tritn")
    said = "'sorted' declined: computes in torch.float64.*; I=5: rows must be"
    with pytest.raises(ConfigError, match=said):
        lowrank_mixture(*args, backend="sorted")
    args[3] = None
    args[1:3] = p["A"][:1], p["Bt"][:1]
    args[4] = 1.0
    with pytest.raises(ConfigError, match="'sorted' declined: one expert: nothing"):
        lowrank_mixture(*args, backend="sorted")


def test_router_logits_are_float32_and_keep_x_as_it_is() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 64, generator=g).bfloat16().requires_grad_()
    weight = torch.randn(5, 64, generator=g, requires_grad=True)
    kept: list[Tensor] = []

    def pack(value: Tensor) -> Tensor:
        kept.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        logits = router_logits(x, weight)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), weight.data_ptr()}
    assert logits.dtype == torch.float32
    d = torch.randn(50, 5, generator=g)
    logits.backward(d)
    x64, w64, d64 = x.detach().double(), weight.detach().double(), d.double()
    assert torch.allclose(logits.double(), x64 @ w64.t(), atol=1e-4)
    assert weight.grad is not None and x.grad is not None
    assert torch.allclose(weight.grad.double(), d64.t() @ x64, atol=1e-4)
    assert x.grad.dtype == torch.bfloat16
    assert (x.grad.double() - d64 @ w64).norm() < 2**-8 * (d64 @ w64).norm()
    assert torch.autograd.gradcheck(
        router_logits, (x64[:3].requires_grad_(), w64.requires_grad_())
    )
