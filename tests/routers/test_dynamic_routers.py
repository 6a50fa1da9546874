"""Routers that choose a varying number of experts: by hand, limits, bad settings."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import molora
from molora.context import ForwardContext
from molora.errors import ConfigError, RoutingError
from molora.routers import ROUTERS, Routing
from molora.routers.ldmole import sparsegen


def identity(kind: str, E: int, **settings: Any) -> Any:
    """A router whose logits are its input."""
    cls: Any = ROUTERS[kind]
    made = cls(
        cls.Config.from_dict({"kind": kind, **settings}),
        in_features=E,
        num_experts=E,
        site="layers.3.up",
        generator=torch.Generator().manual_seed(0),
    )
    nn.init.eye_(made.gate.weight)
    return made.eval()


def route(made: Any, probs: Any) -> Routing:
    routing: Routing = made(torch.tensor(probs).log(), ForwardContext())
    return routing


def near(got: Tensor, want: Any) -> bool:
    return torch.allclose(got, torch.tensor(want).float(), atol=1e-6)


ROWS = [[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.15, 0.05]]


def test_top_p_by_hand() -> None:
    # 0.4 + 0.3 reach 0.65; 0.7 alone does
    kept = route(identity("topp", 4, top_p=0.65, renormalize=False), ROWS)
    assert near(kept.gates, [[0, 0.4, 0, 0.3], [0.7, 0, 0, 0]])
    normed = route(identity("topp", 4, top_p=0.65), ROWS)
    assert near(normed.gates, [[0, 4 / 7, 0, 3 / 7], [1, 0, 0, 0]])
    assert normed.assigned().tolist() == [[0, 1, 0, 1], [1, 0, 0, 0]]
    assert near(normed.probs, ROWS)
    two = route(identity("topp", 4, top_p=0.65, min_experts=2), ROWS)
    assert near(two.gates[1], [14 / 17, 0, 3 / 17, 0])
    tiny = route(identity("topp", 4, top_p=1e-9), ROWS)
    assert near(tiny.gates, [[0, 1, 0, 0], [1, 0, 0, 0]])
    everything = route(identity("topp", 4, top_p=1.0), ROWS)
    assert near(everything.gates, ROWS)


def test_dynmole_by_hand() -> None:
    def entropy(row: list[float]) -> float:
        return (1 - sum(p**1.1 for p in row)) / 0.1

    first, second = (entropy(row) for row in ROWS)
    assert first > 1.1 > second
    made = identity("dynmole", 4, top_p=0.5, entropy_threshold=1.1, min_experts=1)
    assert near(route(made, ROWS).gates, [ROWS[0], [1, 0, 0, 0]])
    # defaults: two experts at least, threshold 0.9
    sure = [[0.96, 0.02, 0.01, 0.01]]
    assert entropy(sure[0]) < 0.9
    assert near(route(identity("dynmole", 4), sure).gates, [[96 / 98, 2 / 98, 0, 0]])
    shannon = identity(
        "dynmole", 4, top_p=0.5, entropy_index=1.0, entropy_threshold=1.27
    )
    assert -sum(p * math.log(p) for p in ROWS[0]) > 1.27
    assert near(route(shannon, ROWS).gates[0], ROWS[0])


def test_threshold_by_hand_and_a_token_without_an_expert() -> None:
    routing = route(identity("threshold", 4, threshold=0.25), [*ROWS, [0.25] * 4])
    assert near(routing.gates[:2], [[0, 4 / 7, 0, 3 / 7], [1, 0, 0, 0]])
    # learned gates are finite where nobody is chosen
    made = identity("threshold", 4, threshold=0.5)
    z = torch.tensor(ROWS[:1]).log().requires_grad_()
    gates = made(z, ForwardContext()).gates
    assert near(gates, [[0.0] * 4])
    gates.sum().backward()
    assert z.grad is not None and torch.equal(z.grad, torch.zeros(1, 4))


def test_adamole_by_hand() -> None:
    made = identity("adamole", 4, max_threshold=0.4)
    # at the start the threshold is half of 0.4
    routing = route(made, ROWS)
    assert near(routing.gates, [[0, 2 / 3, 0, 1 / 3], [1, 0, 0, 0]])
    with torch.no_grad():
        made.threshold.bias.fill_(math.log(3))
    # now 0.3
    assert near(route(made, [[0.1, 0.45, 0.1, 0.35]]).gates, [[0, 0.75, 0, 0.25]])
    assert identity("adamole", 8).highest == 1 / 8


def test_sparsegen_by_hand() -> None:
    z = torch.tensor([[1.0, 0.4, 0.1, -1.0]]).double()
    zero = torch.zeros(1, 1).double()
    # lambda 0 is sparsemax; the third is below tau = (1 + 0.4 - 1) / 2
    want = torch.tensor([[0.8, 0.2, 0.0, 0.0]]).double()
    assert torch.allclose(sparsegen(z, zero), want)
    # a larger lambda is sparser, a smaller one denser, as a temperature
    assert torch.allclose(sparsegen(z, zero + 0.5).count_nonzero(), torch.tensor(1))
    dense = sparsegen(z, zero - 9)
    assert int(dense.count_nonzero()) == 4
    assert torch.allclose(dense, sparsegen(z / 10, zero))
    for values in (want, dense):
        assert float(values.sum()) == pytest.approx(1)
    huge = torch.tensor([[1e5, -1e5, 0.0, 9.9e4]])
    assert sparsegen(huge, torch.zeros(1, 1)).tolist() == [[1, 0, 0, 0]]


@pytest.mark.parametrize("lam", [-2.0, 0.0, 0.7])
def test_sparsegen_solves_its_problem(lam: float) -> None:
    """argmin |g - z|^2 - lambda |g|^2 on the simplex, against random points of it."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 5, generator=generator, dtype=torch.float64)
    best = sparsegen(z, torch.full((1, 1), lam).double())

    def cost(g: Tensor) -> Tensor:
        return (g - z).square().sum(-1) - lam * g.square().sum(-1)

    noise = torch.randn(4000, 5, generator=generator, dtype=torch.float64)
    points = torch.softmax(3 * noise, -1)
    steps = torch.logspace(-3, 0, 4000, dtype=torch.float64)[:, None]
    for others in (points, (1 - steps) * best + steps * points):
        assert (cost(others) >= cost(best) - 1e-12).all()


@pytest.mark.parametrize("kind", ["adamole", "ldmole"])
def test_what_is_learned_beside_the_gate_is_checked(kind: str) -> None:
    made = identity(kind, 4)
    layer = made.threshold if kind == "adamole" else made.out
    with torch.no_grad():
        layer.weight.fill_(math.nan)
    with pytest.raises(RoutingError, match=r"'layers\.3\.up': router logits are not"):
        made(torch.ones(2, 4), ForwardContext())


@pytest.mark.parametrize("kind", ["adamole", "dynmole", "ldmole", "threshold", "topp"])
def test_unused_gates_pass_no_gradient(kind: str) -> None:
    """Kernels may leave anything in the gradient of a gate that is zero."""
    made = identity(kind, 6)
    x = 3 * torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    routing = made(x.requires_grad_(), ForwardContext())
    assert routing.top_k == 6 and int((routing.gates == 0).sum()) > 0
    upstream = torch.ones(40, 6).masked_fill(routing.gates == 0, math.nan)
    routing.gates.backward(upstream)
    assert x.grad is not None and torch.isfinite(x.grad).all()
    for parameter in made.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize(
    ("router", "words"),
    [
        ({"kind": "topp", "top_p": 0.0}, r"router\.top_p: .*greater than 0.*got 0"),
        ({"kind": "topp", "top_p": 1.5}, r"router\.top_p: .*less than or equal to 1"),
        ({"kind": "topp", "min_experts": 5}, r"min_experts=5 exceeds num_experts=4"),
        (
            {"kind": "dynmole", "entropy_threshold": 1.3},
            "never exceeded: .* at most 1.2",
        ),
        ({"kind": "dynmole", "entropy_index": 0.0}, r"router\.entropy_index"),
        ({"kind": "threshold", "threshold": 0.3}, r"threshold=0\.3 exceeds .*=0\.25"),
        ({"kind": "adamole", "max_threshold": 0.5}, r"set it below 0\.5"),
        ({"kind": "ldmole", "hidden": 0}, r"router\.hidden: .*got 0"),
    ],
)
def test_bad_settings(router: dict[str, Any], words: str) -> None:
    raw = {
        "target_modules": ["lin"],
        "experts": {"kind": "lora", "num_experts": 4},
        "router": router,
    }
    with pytest.raises(ConfigError, match=words):
        molora.AdapterConfig.from_dict(raw)
