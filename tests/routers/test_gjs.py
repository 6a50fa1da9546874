"""The GJS objective: values by hand, its bounds, its gradient, refused settings."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import molora
from molora.errors import ConfigError
from molora.routers import OBJECTIVES, Routing


def gjs(routing: Routing, mask: Tensor | None = None, **settings: Any) -> Tensor:
    cls = OBJECTIVES["gjs"]
    config = cls.Config.from_dict({"kind": "gjs", "weight": 1.0, **settings})
    value: Tensor = cls(config)(routing, mask)
    return value


def soft(probs: Tensor, rows: Tensor | None = None) -> Routing:
    return Routing(probs, None, probs.log(), None, rows=rows)


P = torch.tensor(
    [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5]], dtype=torch.float64
)


def H(q: list[float]) -> float:
    return -math.fsum(v * math.log(v) for v in q)


def test_by_hand() -> None:
    # means: 1.05, 1.25, 0.7 thirds; bounds at 0.9 and 0.6 of ln 3
    most = math.log(3)
    each = [max(H(row), 0.6 * most) for row in P.tolist()]
    # the second token is surer than asked
    assert each[1] == 0.6 * most and each[0] > 0.6 * most
    mean = min(H([0.35, 1.25 / 3, 0.7 / 3]), 0.9 * most)
    # the mean is more even than asked
    assert mean == 0.9 * most
    want = (0.3 * most - (mean - sum(each) / 3)) / most
    got = gjs(soft(P), gamma_balance=0.9, gamma_certain=0.6)
    assert float(got) == pytest.approx(want, abs=1e-7) and want > 0.1


def test_uniform_costs_one_and_perfect_use_nothing() -> None:
    uniform = torch.full((6, 3), 1 / 3).double()
    assert float(gjs(soft(uniform))) == pytest.approx(1, abs=1e-6)
    perfect = torch.eye(3).double().repeat(2, 1).clamp(min=1e-30)
    assert float(gjs(soft(perfect))) == pytest.approx(0, abs=1e-6)
    # all tokens sure of one expert: no balance
    collapsed = perfect[:1].expand(6, -1)
    assert float(gjs(soft(collapsed))) == pytest.approx(1, abs=1e-6)


def test_nothing_is_asked_beyond_the_bounds() -> None:
    probs = (torch.eye(3).double() * 0.97 + 0.01).requires_grad_()
    value = gjs(soft(probs), gamma_balance=0.9, gamma_certain=0.3)
    (grad,) = torch.autograd.grad(value, probs)
    assert value == 0 and not grad.any()


def test_rows_count_once_each_and_are_added() -> None:
    """However long they are: the mask cuts the tokens alone."""
    mask = torch.tensor([1.0, 1.0, 0.0]).double()
    tokens, rows = gjs(soft(P), mask), gjs(soft(P[:2]))
    assert float(gjs(soft(P, P[:2]), mask)) == pytest.approx(float(tokens + rows))
    assert float(tokens) > 0 and float(rows) > 0


def test_of_the_distribution_not_of_the_gates() -> None:
    gates = torch.zeros_like(P).scatter(-1, P.topk(1).indices, 1.0)
    chosen = Routing(gates, P, torch.zeros_like(P), 1)
    assert torch.equal(gjs(chosen), gjs(Routing(P, P, torch.zeros_like(P), None)))


def test_gradient_agrees_with_differences() -> None:
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    w = torch.randn(2, 3, generator=torch.Generator().manual_seed(1)).double()
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0]).double()

    def value(z: Tensor, w: Tensor) -> Tensor:
        return gjs(Routing(z, None, z, None, rows=torch.softmax(w, -1)), mask)

    leaves = [z.requires_grad_(), w.requires_grad_()]
    assert torch.autograd.gradcheck(value, leaves)
    grads = torch.autograd.grad(value(z, w), leaves)
    assert all(grad.abs().max() > 1e-3 for grad in grads) and not grads[0][1].any()


@pytest.mark.parametrize(
    ("settings", "router", "message"),
    [
        ({"gamma_certain": 0.9, "gamma_balance": 0.9}, "soft", "must be below"),
        ({"gamma_balance": 1.1}, "soft", "less than or equal to 1"),
        ({}, "arrow", "no probabilities over the experts"),
    ],
)
def test_what_means_nothing_is_refused(
    settings: Any, router: str, message: str
) -> None:
    raw = {
        "target_modules": ["q_proj"],
        "experts": {"kind": "lora", "num_experts": 4, "r": 2},
        "router": {"kind": router},
        "balance": [{"kind": "gjs", "weight": 1.0, **settings}],
    }
    with pytest.raises(ConfigError, match=message):
        molora.AdapterConfig.from_dict(raw)
