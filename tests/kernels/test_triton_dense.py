"""The rank-space kernels in the interpreter, against the definition in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from molora.kernels import reference as definition
from molora.kernels import triton_dense, triton_tiles
from molora.kernels.configs import Config
from molora.kernels.gradients import Needs

pytestmark = pytest.mark.usefixtures("exact_interpreter", "poisoned", "small_tiles")

NAMES = ("x", "A", "Bt", "gates")
SMALL = {
    "shrink_gate": Config(BM=16, BN=32, warps=4, stages=2, split=2),
    "expand_add": Config(BM=16, BN=32, warps=4, stages=2, columns=2),
    "bwd_rank": Config(BM=16, BN=32, warps=4, stages=2),
    "wgrad": Config(BM=16, BN=32, warps=4, stages=2, split=3),
}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that even a small problem needs several of, and does not fill."""
    monkeypatch.setattr(triton_tiles, "pick", lambda kernel, *_: SMALL[kernel])


def problem(
    T: int, E: int, wide: int, out: int, r: int, *, shared: str = "", seed: int = 0
) -> dict[str, Any]:
    """Random arguments in float64; gates are top-2 where there are three experts."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    gates = torch.rand(T, E, generator=g, dtype=torch.float64) + 0.1
    if E > 2:
        gates = gates * (gates >= gates.topk(2, -1).values[:, -1:])
    return {
        "x": normal(T, wide),
        "A": normal(1 if "A" in shared else E, r, wide) / wide**0.5,
        "Bt": normal(1 if "B" in shared else E, r, out),
        "gates": gates,
        "scale": torch.rand(E, generator=g, dtype=torch.float64) + 0.5,
        "base": normal(T, out),
        "dy": normal(T, out),
    }


def lowered(p: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Inputs of a low precision; parameters, gates and scale are float32."""
    low = {k: v.float() if isinstance(v, Tensor) else v for k, v in p.items()}
    for name in ("x", "base", "dy"):
        if low[name] is not None:
            low[name] = low[name].to(dtype)
    return low


def kernels(p: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Output and every gradient by the kernels."""
    args = (p["A"], p["Bt"], p["gates"], p["scale"])
    y, z = triton_dense.forward(p["x"], p["base"], *args, **options)
    grads = triton_dense.backward(p["dy"].to(y.dtype), p["x"], z, *args, **options)
    named = zip(NAMES, grads, strict=True)
    return {"y": y} | {f"d{n}": d for n, d in named if p[n] is not None}


def exact(p: dict[str, Any], factor: Tensor | None = None) -> dict[str, Tensor]:
    """Output and every gradient by the definition; factor is that of dropout."""
    args = {n: p[n].double().requires_grad_() for n in NAMES if p[n] is not None}
    x = args["x"] if factor is None else args["x"] * factor
    base = None if p["base"] is None else p["base"].double()
    scale = p["scale"].double() if isinstance(p["scale"], Tensor) else p["scale"]
    y = definition(x, args["A"], args["Bt"], args.get("gates"), scale, base)
    grads = torch.autograd.grad(y, list(args.values()), p["dy"].double())
    return {"y": y.detach()} | dict(zip((f"d{n}" for n in args), grads, strict=True))


def assert_near(got: dict[str, Tensor], want: dict[str, Tensor], tol: float) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].shape == value.shape, name
        error = float((got[name].double() - value).norm())
        assert error <= tol * float(value.norm()), (name, error)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda v: v,
    "transposed": lambda v: v.t().contiguous().t(),
    "padded": lambda v: torch.cat([v, v + torch.nan], dim=1)[:, : v.shape[1]],
    "spaced": lambda v: v.repeat_interleave(2, dim=1)[:, ::2],
    "expanded": lambda v: v[:1].expand_as(v),
}


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    # shrinking would take minutes in the interpreter, and examples are small
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    T=st.sampled_from([1, 2, 7, 16, 37]),
    E=st.sampled_from([1, 2, 3, 5, 7, 8]),
    width=st.tuples(st.sampled_from([1, 5, 32, 41]), st.sampled_from([1, 3, 32, 49])),
    r=st.sampled_from([1, 2, 3, 8, 11]),
    shared=st.sampled_from(["", "A", "B", "AB"]),
    scale=st.sampled_from(["list", 0.3]),
    layout=st.sampled_from(sorted(LAYOUTS)),
    odd=st.sampled_from(["", "no gates", "no base", "one expert", "dense"]),
    seed=st.integers(0, 99),
)
def test_values_and_all_gradients_equal_the_definition(
    T: int,
    E: int,
    width: tuple[int, int],
    r: int,
    shared: str,
    scale: Any,
    layout: str,
    odd: str,
    seed: int,
) -> None:
    p = problem(T, 1 if odd == "no gates" else E, *width, r, shared=shared, seed=seed)
    if scale != "list":
        p["scale"] = scale
    if odd == "no gates":
        p["gates"] = None
    elif odd == "no base":
        p["base"] = None
    elif odd == "one expert":
        p["gates"] = torch.zeros(T, E)
        p["gates"][:, E - 1] = 1
    elif odd == "dense":
        p["gates"] = torch.rand(T, E, generator=torch.Generator().manual_seed(seed))
    low = lowered(p, torch.float32)
    for name in ("x", "gates", "base", "dy"):
        if low[name] is not None:
            low[name] = LAYOUTS[layout](low[name])
    before = {k: v.clone() for k, v in low.items() if isinstance(v, Tensor)}
    assert_near(kernels(low), exact(low), 1e-5)
    for name, value in before.items():
        assert torch.equal(low[name], value), f"{name} was modified"


@pytest.mark.parametrize("shared", ["", "A", "B", "AB"])
def test_experts_beyond_one_tile_go_in_chunks(shared: str) -> None:
    # 37 experts of 16 padded ranks: 3 tiles of 16 experts, the last one ragged
    p = lowered(problem(20, 37, 21, 18, 12, shared=shared), torch.float32)
    assert triton_tiles.tile(37, 12) == (16, 16, 3)
    assert_near(kernels(p), exact(p), 1e-5)


def test_a_tile_is_what_a_matrix_instruction_takes() -> None:
    for experts in (1, 2, 3, 8, 37, 256):
        for r in (1, 2, 5, 8, 16, 100, 256):
            EC, RP, chunks = triton_tiles.tile(experts, r)
            assert EC & (EC - 1) == RP & (RP - 1) == 0
            assert 16 <= EC * RP <= 256
            assert r <= RP < max(2 * r, 17)
            assert (chunks - 1) * EC < experts <= chunks * EC
    # half the columns, but never half an expert
    assert triton_tiles.tile(8, 16, 64) == (4, 16, 2)
    assert triton_tiles.tile(8, 200, 64) == (1, 256, 8)


def test_no_token() -> None:
    p = lowered(problem(0, 3, 5, 6, 2), torch.float32)
    got = kernels(p)
    assert got["y"].shape == (0, 6) and got["dx"].shape == (0, 5)
    assert got["dgates"].shape == (0, 3)
    assert torch.equal(got["dA"], torch.zeros(3, 2, 5))
    assert torch.equal(got["dBt"], torch.zeros(3, 2, 6))


def test_an_unused_expert_gets_exactly_no_gradient() -> None:
    p = lowered(problem(40, 5, 20, 18, 3), torch.bfloat16)
    p["gates"][:, [1, 4]] = 0
    got = kernels(p)
    for name in ("dA", "dBt"):
        assert torch.equal(got[name][[1, 4]], torch.zeros_like(got[name][[1, 4]]))
        assert got[name][[0, 2, 3]].abs().amin(dim=(1, 2)).min() > 0
    # the gate of an unused expert still gets its gradient
    assert got["dgates"][:, 1].abs().min() > 0


def test_every_subset_of_gradients() -> None:
    p = lowered(problem(5, 3, 16, 16, 3), torch.float32)
    args = (p["A"], p["Bt"], p["gates"], p["scale"])
    _, z = triton_dense.forward(p["x"], None, *args)
    full = triton_dense.backward(p["dy"], p["x"], z, *args)
    for bits in range(16):
        needs = Needs(*(bool(bits >> i & 1) for i in range(4)))
        got = triton_dense.backward(p["dy"], p["x"], z, *args, needs=needs)
        for need, value, whole in zip(needs, got, full, strict=True):
            assert (value is None) is not need
            assert value is None or torch.equal(value, whole)


def test_two_runs_agree_to_the_bit() -> None:
    p = lowered(problem(20, 5, 24, 18, 4), torch.bfloat16)
    first, again = kernels(p, dropout=0.2, seed=3), kernels(p, dropout=0.2, seed=3)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_shipped_table_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    p = lowered(problem(150, 3, 40, 70, 8), torch.float32)
    assert_near(kernels(p), exact(p), 1e-5)


def correctly_rounded(p: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Every product exact, every intermediate rounded once to dtype."""

    def near(value: Tensor) -> Tensor:
        return value.to(dtype).double()

    A, Bt, x, dy = (near(p[n]) for n in ("A", "Bt", "x", "dy"))
    w = (p["gates"].double() * p["scale"].double())[..., None]
    z = near(torch.einsum("ti,eri->ter", x, A))
    h = torch.einsum("to,ero->ter", dy, Bt)
    # one product for all experts where they share the factor
    zg = near((z * w).sum(1, keepdim=True) if len(Bt) == 1 else z * w)
    dz = near((h * w).sum(1, keepdim=True) if len(A) == 1 else h * w)
    return {
        "y": near(p["base"].double() + torch.einsum("ter,ero->to", zg, Bt)),
        "dx": near(torch.einsum("ter,eri->ti", dz, A)),
        "dA": torch.einsum("ter,ti->eri", dz, x),
        "dBt": torch.einsum("ter,to->ero", zg, dy),
        "dgates": (h * z).sum(-1) * p["scale"].double(),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared", ["", "A", "B"])
def test_error_is_that_of_correct_rounding(dtype: torch.dtype, shared: str) -> None:
    p = lowered(problem(40, 5, 80, 64, 8, shared=shared), dtype)
    want, rounded, got = exact(p), correctly_rounded(p, dtype), kernels(p)
    assert got["y"].dtype == got["dx"].dtype == dtype
    assert got["dA"].dtype == got["dBt"].dtype == got["dgates"].dtype == torch.float32
    for name, value in want.items():
        ours = float((got[name].double() - value).norm())
        theirs = float((rounded[name] - value).norm())
        assert 0 < ours <= 1.5 * theirs, (name, ours, theirs)


def test_base_of_a_higher_precision_and_parameters_of_a_lower() -> None:
    p = lowered(problem(20, 3, 20, 18, 4), torch.bfloat16)
    p["base"] = p["base"].float() + 1000
    p |= {name: p[name].bfloat16() for name in ("A", "Bt")}
    got, want = kernels(p), exact(p)
    assert got["y"].dtype == torch.float32
    assert got["dA"].dtype == got["dBt"].dtype == torch.bfloat16
    # bfloat16 would round y itself by 4
    assert (got["y"].double() - want["y"]).abs().max() < 0.1
    assert_near({n: got[n] for n in got if n != "y"},
                {n: want[n] for n in got if n != "y"}, 2**-7)  # fmt: skip


def philox(seed: int, counter: np.ndarray) -> np.ndarray:
    """First word of Philox4x32-10 (Salmon et al., 2011) of 64-bit counters."""
    low = np.uint64(0xFFFFFFFF)
    c = [counter & low, counter >> np.uint64(32), counter * 0, counter * 0]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (second >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]),
            second & low,
            (first >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]),
            first & low,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0].astype(np.uint32)


def kept(seed: int, p: float, T: int, wide: int) -> Tensor:
    """Dropout mask by its definition; 2**31 values of a uniform number in [0, 1)."""
    word = philox(seed, np.arange(T * wide, dtype=np.uint64)).view(np.int32)
    word = np.where(word < 0, ~word, word)
    uniform = word.astype(np.float32) * np.float32(4.6566127342e-10)
    return torch.from_numpy(uniform >= np.float32(p)).view(T, wide)


def test_philox_of_this_test_gives_the_published_answers() -> None:
    # first of the known answers that Random123 publishes for philox4x32, 10 rounds
    assert philox(0, np.zeros(1, np.uint64)).tolist() == [0x6627E8D5]


@pytest.mark.parametrize("seed", [0, 1, 7, 2**31 + 5, 2**40 + 3])
def test_dropout_mask_is_philox_in_forward_and_backward(seed: int) -> None:
    p = lowered(problem(37, 3, 41, 18, 4), torch.float32)
    mask = kept(seed, 0.3, 37, 41)
    assert 0.65 < mask.float().mean() < 0.75
    want = exact(p, mask.double() / 0.7)
    got = kernels(p, dropout=0.3, seed=seed)
    assert_near(got, want, 1e-5)
    assert torch.equal(got["dx"] != 0, mask)


def test_dropped_elements_are_dropped_even_where_they_are_not_finite() -> None:
    p = lowered(problem(5, 2, 20, 18, 4), torch.float32)
    mask = kept(4, 0.5, 5, 20)
    p["x"] = torch.where(mask, p["x"], torch.inf)
    got = kernels(p, dropout=0.5, seed=4)
    assert all(value.isfinite().all() for value in got.values())


def test_each_reason_against_a_call() -> None:
    p = lowered(problem(4, 3, 5, 6, 2), torch.bfloat16)

    def reasons(**changed: Any) -> list[str]:
        order = ("x", "A", "Bt", "gates", "scale", "base")
        return triton_dense.why_not(*({**p, **changed}[n] for n in order), None)

    assert reasons() == reasons(base=None, scale=1.0) == []
    (reason,) = reasons(base=p["base"].double())
    assert reason == "base is torch.float64; it must have 16 or 32 bits"
    assert "gates are torch.bfloat16" in reasons(gates=p["gates"].bfloat16())[0]
    assert "both torch.bfloat16 like x" in reasons(A=p["A"].half())[0]
    assert "both must be float32" in reasons(Bt=p["Bt"].bfloat16())[0]
    wide = {n: torch.zeros(3, 257, p[n].shape[2]) for n in ("A", "Bt")}
    assert reasons(**wide) == ["rank 257 is above 256"]
    assert "size 0" in reasons(A=torch.zeros(3, 2, 0), x=torch.zeros(4, 0))[0]
    many = torch.zeros(1).expand(2**20, 5)
    assert "1048576 tokens are more than 1048560" in reasons(x=many)[0]
    large = torch.zeros(1).expand(2**11, 2**8, 2**12)
    assert "2**31 elements" in reasons(A=large)[0]
    on_meta = reasons(x=p["x"].to("meta"))
    assert any("x is on meta; the kernels run on a GPU" in why for why in on_meta)
    assert any("A is on cpu and x on meta" in why for why in on_meta)
    # several at once
    assert len(reasons(gates=p["gates"].double(), base=p["base"].double())) == 2


def test_without_the_interpreter_a_cpu_is_declined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_dense, "interpreted", lambda: False)
    p = lowered(problem(4, 3, 5, 6, 2), torch.bfloat16)
    args = (p[n] for n in ("x", "A", "Bt", "gates", "scale", "base"))
    (reason,) = triton_dense.why_not(*args)
    assert reason.startswith("x is on cpu; the kernels run on a GPU of NVIDIA or AMD")


def test_the_interpreter_still_needs_its_corrections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    p = lowered(problem(16, 1, 16, 16, 16), torch.bfloat16)
    y = triton_dense.forward(p["x"], None, p["A"], p["Bt"], None, 1.0)[0].double()
    want = exact({**p, "base": None, "gates": None, "scale": 1.0})["y"]
    error = float((y - want).norm() / want.norm())
    assert not error < 0.02, "Triton can multiply bfloat16: delete triton_shim.py"
