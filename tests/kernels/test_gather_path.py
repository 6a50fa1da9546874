"""The gathered form of CPUs against the definition."""

from typing import Any

import pytest
import torch
from torch import Tensor

from molora.errors import ConfigError
from molora.kernels import choice, lowrank_mixture, machine, reference
from molora.kernels.cost_model import FORMS, Shape


def problem(T: int, E: int = 6, K: int = 2, shared: str = "") -> dict[str, Any]:
    g = torch.Generator().manual_seed(T)
    ids = torch.rand(T, E, generator=g).topk(K).indices
    gates = torch.zeros(T, E).scatter(1, ids, torch.rand(T, K, generator=g) + 0.1)
    return {
        "x": torch.randn(T, 20, generator=g),
        "A": torch.randn(1 if shared == "A" else E, 4, 20, generator=g),
        "Bt": torch.randn(1 if shared == "B" else E, 4, 12, generator=g),
        "gates": gates,
        "scale": 0.7,
        "base": torch.randn(T, 12, generator=g),
    }


def near(y: Tensor, p: dict[str, Any], limit: float = 1e-5) -> bool:
    exact = reference(p["x"], p["A"], p["Bt"], p["gates"], p["scale"], p["base"])
    error = (y.double() - exact).abs().max() if exact.numel() else torch.zeros(())
    return y.shape == exact.shape and bool(error <= limit * (1 + exact.abs().amax()))


@pytest.mark.parametrize("per_expert", [False, True])
@pytest.mark.parametrize("shared", ["", "A", "B"])
@pytest.mark.parametrize("T", [1, 2, 5])
def test_result(T: int, shared: str, per_expert: bool) -> None:
    p = problem(T, shared=shared)
    if per_expert:
        p["scale"] = torch.linspace(0.5, 2, 6)
    y = lowrank_mixture(**p, backend="gather")
    assert near(y, p)
    assert near(lowrank_mixture(**p, backend="gather", top_k=2), p)


def test_no_token_no_base_and_no_expert() -> None:
    p = problem(0)
    assert lowrank_mixture(**p, backend="gather").shape == (0, 12)
    p = {**problem(1), "base": None}
    assert near(
        lowrank_mixture(**p, backend="gather"), {**p, "base": torch.zeros(1, 12)}
    )
    p = problem(1)
    p["gates"].zero_()
    y = lowrank_mixture(**p, backend="gather")
    assert torch.equal(y, p["base"])
    assert y.data_ptr() != p["base"].data_ptr()


def test_experts_not_in_use_are_not_read() -> None:
    p = problem(2)
    unused = [e for e in range(6) if not p["gates"][:, e].any()]
    p["A"][unused] = torch.nan
    p["Bt"][unused] = torch.nan
    assert len(unused) >= 2
    assert lowrank_mixture(**p, backend="gather").isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    p = problem(1)
    p["x"], p["base"] = p["x"].to(dtype), p["base"].to(dtype)
    y = lowrank_mixture(**p, backend="gather")
    exact = reference(p["x"], p["A"], p["Bt"], p["gates"], 0.7, p["base"])
    assert y.dtype == dtype
    assert (y - exact).norm() <= 1.01 * (exact.to(dtype) - exact).norm()


def test_dropout_draws_the_mask_of_the_other_forms() -> None:
    p = problem(3)
    made = [
        lowrank_mixture(**p, backend=name, dropout=0.4, seed=5)
        for name in ("torch", "gather")
    ]
    torch.testing.assert_close(*made)


def test_it_declines_gradients_and_one_expert() -> None:
    p = problem(1)
    p["A"].requires_grad_()
    with pytest.raises(ConfigError, match="a gradient is needed"):
        lowrank_mixture(**p, backend="gather")
    with torch.no_grad():
        assert near(lowrank_mixture(**p, backend="gather"), p)
    one = {**problem(1, E=1, K=1), "gates": None}
    with pytest.raises(ConfigError, match="one expert: nothing to gather"):
        lowrank_mixture(**one, backend="gather")


def test_bytes_are_those_of_the_experts_in_use() -> None:
    """Worked by hand: K factors of each side, x and y once for each expert."""
    s = Shape(1, 2048, 1024, 64, 8, 2, 4, training=False)
    moved = sum(work.bytes for work in FORMS["gather"](s))
    assert moved == 4 * 2 * (8 * (2048 + 1024) + 2048 + 2 * 1024 + 2 * 8)
    with pytest.raises(ValueError, match="no backward"):
        list(FORMS["gather"](s._replace(training=True)))


def test_auto_takes_it_for_decoding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = machine.Machine(gemm=1e11, grouped=2e10, bandwidth=1e10, launch=3e-6)
    monkeypatch.setattr(machine, "cpu", lambda dtype, threads: rates)
    choice._known_on_cpu.cache_clear()

    def taken(tokens: int, top_k: int | None = 2, trains: bool = False) -> str:
        x, A = torch.empty(tokens, 1024), torch.empty(64, 8, 1024)
        gates = torch.empty(tokens, 64)
        with torch.set_grad_enabled(trains):
            call = (x, A.requires_grad_(), A, gates, 1.0, None, top_k, False)
            return choice.choose("auto", *call)

    found = [taken(1), taken(1, None), taken(1, trains=True), taken(512)]
    choice._known_on_cpu.cache_clear()
    assert found == ["gather", "torch", "torch", "sorted"]


def test_decoding_in_float64_is_measured_as_float32() -> None:
    p = {name: value for name, value in problem(1).items() if name != "base"}
    p["A"], p["Bt"] = torch.randn(6, 256, 20).double(), torch.randn(6, 256, 12).double()
    p["x"], p["gates"] = p["x"].double(), p["gates"].double()
    y = lowrank_mixture(**p, top_k=2)
    assert near(y, {**p, "base": torch.zeros(1, 12)}, 1e-12)
