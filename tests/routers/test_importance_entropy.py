"""Importance, entropy and mutual information: values by hand, limits, gradients."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from molora.routers import OBJECTIVES, Routing
from molora.routers.entropy import largest_tsallis, tsallis


def made(kind: str, **settings: Any) -> Any:
    cls = OBJECTIVES[kind]
    return cls(cls.Config.from_dict({"kind": kind, "weight": 1.0, **settings}))


def soft(probs: Tensor) -> Routing:
    return Routing(probs, probs, probs.log(), None)


P = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.4, 0.5, 0.1]]).double()
MASK = torch.tensor([True, False, True])


def test_importance_by_hand() -> None:
    # sums 1.0, 1.4, 0.6: mean 1, squared deviations 0, 0.16, 0.16
    assert float(made("cv2")(soft(P), None)) == pytest.approx(0.32 / 3)
    # sums 0.9, 0.8, 0.3: mean 2/3
    want = sum((q - 2 / 3) ** 2 for q in (0.9, 0.8, 0.3)) / 3 / (2 / 3) ** 2
    assert float(made("cv2")(soft(P), MASK)) == pytest.approx(want)
    # of the gates, not of the probabilities
    gates = torch.eye(3).double()
    even = Routing(gates, P, P.log(), 1)
    assert float(made("cv2")(even, None)) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("E", [2, 5, 8])
def test_importance_of_one_expert_alone_is_e_less_one(E: int) -> None:
    gates = torch.zeros(7, E)
    gates[:, 1] = 0.5
    assert float(made("cv2")(soft(gates), None)) == pytest.approx(E - 1, rel=1e-6)


def test_importance_gradient_by_hand() -> None:
    """Two experts: cv2 = ((a - b) / (a + b))^2."""
    gates = torch.tensor([[0.7, 0.3], [0.4, 0.1]]).double().requires_grad_()
    value = made("cv2")(soft(gates), None)
    a, b = 1.1, 0.4
    assert float(value) == pytest.approx(((a - b) / (a + b)) ** 2)
    (grad,) = torch.autograd.grad(value, gates)
    slope = 2 * (a - b) / (a + b) * 2 / (a + b) ** 2
    want = torch.tensor([[slope * b, -slope * a]]).double().expand(2, 2)
    assert torch.allclose(grad, want, atol=1e-12)


@pytest.mark.parametrize("q", [0.5, 1.0, 1.1, 2.0])
def test_tsallis_by_hand(q: float) -> None:
    for row in P.tolist():
        if q == 1:
            want = -sum(p * math.log(p) for p in row)
        else:
            want = (1 - sum(p**q for p in row)) / (q - 1)
        assert float(tsallis(torch.tensor(row).double(), q)) == pytest.approx(want)
    uniform = torch.full((4,), 0.25).double()
    assert float(tsallis(uniform, q)) == pytest.approx(largest_tsallis(4, q))
    one_hot = torch.tensor([0.0, 1.0, 0.0]).double().requires_grad_()
    value = tsallis(one_hot, q)
    assert float(value) == pytest.approx(0, abs=1e-14)
    assert torch.isfinite(torch.autograd.grad(value, one_hot)[0]).all()


@pytest.mark.parametrize("q", [1.0, 1.1])
def test_entropy_by_hand(q: float) -> None:
    h = [float(tsallis(row, q)) / largest_tsallis(3, q) for row in P]
    objective = made("entropy", index=q)
    assert float(objective(soft(P), None)) == pytest.approx(sum(h) / 3)
    assert float(objective(soft(P), MASK)) == pytest.approx((h[0] + h[2]) / 2)
    uniform = torch.full((5, 3), 1 / 3).double()
    assert float(objective(soft(uniform), None)) == pytest.approx(1)


def test_mutual_information_by_hand() -> None:
    def shannon(row: list[float]) -> float:
        return -sum(p * math.log(p) for p in row)

    mean = [0.45, 0.4, 0.15]
    each = (shannon(P[0].tolist()) + shannon(P[2].tolist())) / 2
    want = 1 - (shannon(mean) - each) / math.log(3)
    assert float(made("mutual_information")(soft(P), MASK)) == pytest.approx(want)


def test_mutual_information_wants_tokens_sure_of_different_experts() -> None:
    objective, sure = made("mutual_information"), torch.eye(3).double()
    assert float(objective(soft(sure), None)) == pytest.approx(0, abs=1e-12)
    same = sure[:1].expand(3, -1)
    assert float(objective(soft(same), None)) == pytest.approx(1)
    uniform = torch.full((3, 3), 1 / 3).double()
    assert float(objective(soft(uniform), None)) == pytest.approx(1)
    # entropy alone cannot tell the first two apart
    for probs in (sure, same):
        assert float(made("entropy")(soft(probs), None)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", ["entropy", "mutual_information"])
def test_probabilities_that_underflow_have_a_finite_gradient(kind: str) -> None:
    z = torch.tensor([[0.0, -2000.0, 1.0], [500.0, 0.0, -500.0]], requires_grad=True)
    routing = Routing(torch.softmax(z, -1), None, z, None)
    (grad,) = torch.autograd.grad(made(kind)(routing, None), z)
    assert torch.isfinite(grad).all()
