"""Grouped kernels in the interpreter against the definition in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molora.kernels import triton_grouped
from molora.kernels.gradients import Needs
from molora.kernels.triton_route import route
from tests.kernels.routed import (
    Call,
    count_launches,
    error,
    expected,
    make,
    philox_keep,
    rounded,
)

pytestmark = pytest.mark.usefixtures("exact_interpreter", "poisoned")
ALL = Needs(True, True, True, True)


def run(
    call: Call, dy: torch.Tensor, dropout: float = 0.0, seed: int = 0
) -> list[torch.Tensor]:
    """Result and all gradients."""
    y, z = triton_grouped.forward(*call, dropout, seed)
    x, _, *routed = call
    gradients = triton_grouped.backward(dy, x, z, *routed, dropout, seed, ALL)
    return [y, *(gradient for gradient in gradients if gradient is not None)]


def check(call: Call, limit: float = 1e-5, seed: int = 1) -> bool:
    """Compare the result and all gradients."""
    g = torch.Generator().manual_seed(seed)
    dy = torch.randn(len(call.x), call.Bt.shape[2], generator=g).to(call.x.dtype)
    found, wanted = run(call, dy), expected(call, dy)
    assert len(found) == len(wanted)
    for name, one, other in zip(
        ("y", "dx", "dA", "dBt", "dgates"), found, wanted, strict=True
    ):
        assert error(one, other) < limit, name
    return True


@pytest.mark.parametrize(
    ("T", "I", "O", "E", "r", "K"),
    [
        pytest.param(1, 40, 24, 7, 3, 2, id="one token"),
        pytest.param(5, 17, 33, 5, 2, 5, id="below a tile, every expert"),
        pytest.param(70, 72, 90, 11, 5, 3, id="prime experts"),
        pytest.param(33, 16, 16, 4, 8, 1, id="one expert each"),
        pytest.param(40, 24, 40, 48, 8, 2, id="several chunks of experts"),
        pytest.param(9, 24, 40, 2, 70, 1, id="long rank"),
        pytest.param(9, 24, 40, 1, 4, 1, id="one expert"),
    ],
)
def test_definition(T: int, I: int, O: int, E: int, r: int, K: int) -> None:  # noqa: E741
    assert check(make(T, I, O, E, r, K))


def test_all_tokens_to_one_expert_and_none_to_others() -> None:
    call = make(70, 24, 20, 6, 4, 2)
    gates = torch.zeros_like(call.gates)
    gates[:, 4] = torch.linspace(-1, 1, 70)
    assert check(call._replace(gates=gates))
    dy = torch.ones(70, 20)
    _, _, dA, dBt, dgates = run(call._replace(gates=gates), dy)
    unused = [0, 1, 2, 3, 5]
    assert not dA[unused].any() and not dBt[unused].any()
    assert not dgates[:, unused].any()


def test_tokens_with_fewer_experts_and_with_none() -> None:
    call = make(40, 24, 20, 6, 4, 3)
    gates = call.gates.clone()
    gates[::3] = 0
    gates[1::3, :4] = 0
    assert check(call._replace(gates=gates))


@pytest.mark.parametrize("shared", ["A", "Bt"])
def test_shared_factor(shared: str) -> None:
    call = make(40, 24, 20, 6, 4, 2)
    assert check(call._replace(**{shared: getattr(call, shared)[:1].clone()}))


def test_strides_scale_and_no_base() -> None:
    call = make(40, 24, 20, 6, 4, 2)
    padded = torch.randn(40, 31)[:, 3:27]
    assert check(call._replace(x=padded, scale=1.5, base=None))
    turned = torch.randn(24, 40).t()
    wide = torch.randn(40, 50)[:, ::2][:, :20]
    assert check(call._replace(x=turned, base=wide))


def test_no_tokens() -> None:
    call = make(0, 24, 20, 6, 4, 2)
    y, dx, dA, dBt, dgates = run(call, torch.empty(0, 20))
    assert y.shape == (0, 20) and dx.shape == (0, 24) and dgates.shape == (0, 6)
    assert dA.shape == call.A.shape and dBt.shape == call.Bt.shape
    assert not dA.any() and not dBt.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_correct_rounding(dtype: torch.dtype) -> None:
    call = make(70, 72, 90, 11, 8, 3, dtype)
    dy = torch.randn(70, 90).to(dtype)
    wanted = expected(call, dy)
    best = rounded(call, dy)
    found = run(call, dy)
    assert [t.dtype for t in found] == [dtype, dtype, *[torch.float32] * 3]
    for one, ideal, exact in zip(found, best, wanted, strict=True):
        assert error(one, exact) < 1.5 * error(ideal, exact)


def test_dropout_is_the_philox_mask_in_every_place() -> None:
    call = make(20, 24, 20, 6, 4, 2)
    seed, p = 2**40 + 12345, 0.3
    keep = philox_keep(seed, p, 20, 24)
    assert 0.6 < (keep > 0).double().mean() < 0.8
    dy = torch.randn(20, 20)
    found = run(call, dy, p, seed)
    for one, other in zip(found, expected(call, dy, keep), strict=True):
        assert error(one, other) < 1e-5


def test_two_runs_are_equal() -> None:
    call = make(70, 24, 20, 11, 4, 3, torch.bfloat16)
    dy = torch.randn(70, 20).bfloat16()
    for one, other in zip(run(call, dy), run(call, dy), strict=True):
        assert torch.equal(one, other)


def test_only_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = count_launches(monkeypatch)
    call = make(20, 24, 20, 6, 4, 2)
    x, _, *routed = call
    z = triton_grouped.forward(*call)[1]
    routed_by = ["route_count", "route_place"]
    assert launches == [*routed_by, "grouped_shrink", *["grouped_expand"] * 2]
    dy = torch.randn(20, 20)
    wanted = expected(call, dy)[1:]
    launches.clear()
    run(call, dy)
    # result: 5; then routing, two weight gradients, ranks, and x in two slots
    assert len(launches) - 5 == 7
    for index in range(4):
        needs = Needs(*(index == other for other in range(4)))
        launches.clear()
        found = triton_grouped.backward(dy, x, z, *routed, 0.0, 0, needs)
        assert len(launches) == 2 + [3, 2, 1, 1][index]
        assert [value is not None for value in found] == [*needs]
        assert error(found[index], wanted[index]) < 1e-5  # type: ignore[arg-type]


def test_route_of_a_small_example() -> None:
    gates = torch.tensor(
        [
            [0.0, 0.0, 0.5, 0.5],
            [1.0, 0.0, 0.0, 0.0],
            [0.0, 0.0, 0.0, 0.0],
            [0.2, 0.3, 0.0, 0.5],
            [0.1, 0.0, 0.9, 0.0],
        ]
    )
    found = route(gates, top_k=2)
    # slot 0: experts 0, 2 and none; slot 1: experts 1, 2, 3 and none. Token 3 has three
    # experts and K = 2: the third is left out
    assert found.order_P.tolist() == [1, 3, 4, 0, 2, 3, 4, 0, 1, 2]
    starts = found.offsets[:: found.blocks]
    assert starts.tolist() == [0, 3, 3, 4, 4, 5, 5, 6, 7, 8, 10]


@given(st.integers(1, 90), st.integers(1, 20), st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_route_sorts_every_slot(T: int, E: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    gates = torch.rand(T, E, generator=g)
    gates *= torch.rand(T, E, generator=g) < 0.5
    K = min(E, 3)
    found = route(gates, K)
    starts = found.offsets[:: found.blocks].tolist()
    for slot in range(K):
        groups: list[list[int]] = [[] for _ in range(E + 1)]
        for token, row in enumerate(gates.tolist()):
            used = [e for e in range(E) if row[e]]
            groups[used[slot] if slot < len(used) else E].append(token)
        for expert, tokens in enumerate(groups):
            group = slot * (E + 1) + expert
            assert found.order_P[starts[group] : starts[group + 1]].tolist() == tokens


def test_shapes_of_the_route_do_not_depend_on_the_gates() -> None:
    sparse, full = torch.zeros(70, 9), torch.ones(70, 9)
    found = [route(gates, 3) for gates in (sparse, full)]
    shapes = [(r.order_P.shape, r.offsets.shape, r.blocks) for r in found]
    assert shapes[0] == shapes[1]


def test_reasons() -> None:
    call = make(4, 8, 8, 4, 2, 2)
    x, base, A, Bt, gates, scale, top_k = call
    args = (x, A, Bt, gates, scale, base)
    assert triton_grouped.why_not(*args, top_k) == []
    assert "top_k" in triton_grouped.why_not(*args, None)[0]
    none = (x, A[:1], Bt[:1], None, 1.0, base, None)
    assert "one expert" in triton_grouped.why_not(*none)[0]
    both = (x, A[:1], Bt[:1], gates, scale, base, top_k)
    assert "both shared" in triton_grouped.why_not(*both)[0]
    double = (x.double(), *args[1:], top_k)
    assert triton_grouped.why_not(*double)
