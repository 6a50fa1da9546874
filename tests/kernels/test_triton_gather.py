"""Decoding kernels in the interpreter against the definition in float64."""

import pytest
import torch

from molora.kernels import triton_gather
from molora.kernels.configs import pick
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


def agrees(call: Call) -> bool:
    """Compare y and z."""
    y, z = triton_gather.forward(*call)
    zeros = torch.zeros(len(call.x), call.Bt.shape[2])
    right = error(y, expected(call, zeros)[0]) < 1e-5
    for t, row in enumerate(call.gates):
        used = row.nonzero().flatten().tolist()
        for slot in range(call.top_k):
            wanted = torch.zeros(call.A.shape[1])
            if slot < len(used):
                wanted = call.A[used[slot] % len(call.A)] @ call.x[t]
            right &= torch.allclose(z[:, t, slot].sum(0), wanted, atol=1e-5)
    return right


@pytest.mark.parametrize(
    ("T", "I", "O", "E", "r", "K"),
    [
        pytest.param(1, 700, 24, 7, 3, 2, id="one token, parts of unequal length"),
        pytest.param(3, 17, 333, 5, 2, 5, id="every expert, several column tiles"),
        pytest.param(20, 72, 90, 11, 5, 3, id="prime experts"),
        pytest.param(5, 16, 16, 70, 8, 1, id="one expert each"),
        pytest.param(2, 24, 40, 1, 4, 1, id="one expert"),
        pytest.param(2, 70, 40, 3, 33, 2, id="long rank"),
    ],
)
def test_definition(T: int, I: int, O: int, E: int, r: int, K: int) -> None:  # noqa: E741
    assert agrees(make(T, I, O, E, r, K))


def test_a_sum_in_parts_is_tested() -> None:
    assert pick("gather_shrink", "sm_90", 4, 1, 700).split > 1


def test_tokens_with_fewer_experts_and_with_none() -> None:
    call = make(7, 24, 20, 6, 4, 3)
    gates = call.gates.clone()
    gates[::3] = 0
    gates[1::3, :4] = 0
    assert agrees(call._replace(gates=gates))


@pytest.mark.parametrize("shared", ["A", "Bt"])
def test_shared_factor(shared: str) -> None:
    call = make(3, 24, 20, 6, 4, 2)
    assert agrees(call._replace(**{shared: getattr(call, shared)[:1].clone()}))


def test_strides_scale_and_no_base() -> None:
    call = make(4, 24, 20, 6, 4, 2)
    assert agrees(call._replace(x=torch.randn(4, 31)[:, 3:27], scale=1.5, base=None))
    wide = torch.randn(4, 50)[:, ::2][:, :20]
    assert agrees(call._replace(x=torch.randn(24, 4).t(), base=wide))


def test_no_tokens() -> None:
    y, z = triton_gather.forward(*make(0, 24, 20, 6, 4, 2))
    assert y.shape == (0, 20) and z.shape[1:] == (0, 2, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_correct_rounding(dtype: torch.dtype) -> None:
    call = make(6, 72, 90, 11, 8, 3, dtype)
    dy = torch.zeros(6, 90, dtype=dtype)
    y = triton_gather.forward(*call)[0]
    exact, ideal = expected(call, dy)[0], rounded(call, dy)[0]
    assert y.dtype == dtype
    assert error(y, exact) < 1.5 * error(ideal, exact)


def test_dropout_is_the_philox_mask() -> None:
    call = make(3, 700, 20, 6, 4, 2)
    seed, p = 2**40 + 12345, 0.3
    keep = philox_keep(seed, p, 3, 700)
    y = triton_gather.forward(*call, p, seed)[0]
    assert error(y, expected(call, torch.zeros(3, 20), keep)[0]) < 1e-5


def test_two_launches_that_give_the_same_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launches = count_launches(monkeypatch)
    call = make(3, 24, 20, 6, 4, 2, torch.bfloat16)
    y = triton_gather.forward(*call)[0]
    assert launches == ["gather_shrink", "gather_expand"]
    assert torch.equal(triton_gather.forward(*call)[0], y)


def test_reasons() -> None:
    call = make(4, 8, 8, 4, 2, 2)
    x, base, A, Bt, gates, scale, top_k = call
    args = (x, A, Bt, gates, scale, base)
    assert triton_gather.why_not(*args, top_k) == []
    assert "top_k" in triton_gather.why_not(*args, None)[0]
    none = (x, A[:1], Bt[:1], None, 1.0, base, None)
    assert "one expert" in triton_gather.why_not(*none)[0]
    trained = (x, A.requires_grad_(), *args[2:], top_k)
    assert "gradient" in triton_gather.why_not(*trained)[0]
    with torch.no_grad():
        assert triton_gather.why_not(*trained) == []
