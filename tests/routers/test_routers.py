"""Routers on flat tokens: dtype, temperature, noise, selection, ties, faults."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import molora
from molora.context import ForwardContext
from molora.errors import RoutingError
from molora.experts import LoRAExperts
from molora.model import sites
from molora.routers import ROUTERS, Routing

# those whose probabilities are a softmax
GATED = ["adamole", "dynmole", "soft", "threshold", "topk", "topp"]


def router(kind: str, wide: int = 12, E: int = 4, seed: int = 0, **kw: Any) -> Any:
    """A router in eval mode, whose gate is drawn from N(0, 1)."""
    cls: Any = ROUTERS[kind]
    generator = torch.Generator().manual_seed(seed)
    made = cls(
        cls.Config.from_dict({"kind": kind, **kw}),
        in_features=wide,
        num_experts=E,
        site="layers.3.up",
        generator=generator,
    )
    nn.init.normal_(made.gate.weight, generator=generator)
    return made.eval()


def route(made: Any, x: Tensor) -> Routing:
    routing: Routing = made(x, ForwardContext())
    return routing


def tokens(T: int = 30, wide: int = 12, seed: int = 1) -> Tensor:
    return torch.randn(T, wide, generator=torch.Generator().manual_seed(seed))


def identity(kind: str, E: int, **kw: Any) -> Any:
    """A router whose logits are its input."""
    made = router(kind, wide=E, E=E, **kw)
    nn.init.eye_(made.gate.weight)
    return made


def softmax64(z: Tensor) -> Tensor:
    e = (z.double() - z.double().max(-1, keepdim=True).values).exp()
    return e / e.sum(-1, keepdim=True)


@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_softmax_is_float32_whatever_the_input(kind: str, dtype: torch.dtype) -> None:
    made, x = router(kind, wide=64), tokens(wide=64).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        routing = route(made, x)
    for part in (routing.gates, routing.probs, routing.logits):
        assert part.dtype == torch.float32
    exact = softmax64(x.double() @ made.gate.weight.double().t())
    # bfloat16 or float16 logits would be off by 1e-2 here
    assert (routing.probs.double() - exact).abs().max() < 1e-5
    assert torch.allclose(routing.gates.sum(-1), torch.ones(30), atol=1e-6)


@pytest.mark.parametrize("kind", GATED)
def test_float64_stays_float64(kind: str) -> None:
    made, x = router(kind).double(), tokens().double()
    routing = route(made, x)
    exact = softmax64(x @ made.gate.weight.t())
    assert (routing.probs - exact).abs().max() < 1e-14


@pytest.mark.parametrize("kind", GATED)
def test_huge_logits_stay_finite(kind: str) -> None:
    made = identity(kind, 4)
    x = torch.tensor([[1e5, -1e5, 0.0, 9.9e4]], dtype=torch.bfloat16)
    routing = route(made, x.requires_grad_())
    assert routing.logits.abs().max() > 9e4
    assert routing.gates.tolist() == [[1.0, 0.0, 0.0, 0.0]]
    routing.gates.sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("kind", GATED)
def test_temperature_divides_the_logits(kind: str) -> None:
    x = tokens()
    warm, plain = router(kind, temperature=2.5), router(kind)
    assert torch.allclose(route(warm, x).logits, route(plain, x).logits / 2.5)
    exact = softmax64(x.double() @ plain.gate.weight.double().t() / 2.5)
    assert (route(warm, x).probs.double() - exact).abs().max() < 1e-6


@pytest.mark.parametrize("kind", GATED)
def test_noise_is_on_the_logits_and_in_training_only(kind: str) -> None:
    made, x = router(kind, noise=0.5, E=2), tokens(4000)
    state = torch.get_rng_state()
    clean = route(made, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(route(made, x).logits, clean.logits)
    made.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        noisy, again = route(made, x), route(made, x)
    assert not torch.equal(noisy.logits, again.logits)
    difference = (noisy.logits - clean.logits).detach()
    assert difference.std() == pytest.approx(0.5, rel=0.05)
    assert difference.mean() == pytest.approx(0, abs=0.03)
    # the gates follow from the noisy logits by a plain softmax
    assert torch.allclose(noisy.probs.double(), softmax64(noisy.logits), atol=1e-6)
    without = router(kind, E=2).train()
    assert torch.equal(route(without, x).logits, clean.logits)


def test_topk_by_hand() -> None:
    z = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.15, 0.05]]))
    kept = route(identity("topk", 4, renormalize=False), z)
    assert torch.allclose(kept.gates[0], torch.tensor([0.0, 0.4, 0.0, 0.3]))
    assert torch.allclose(kept.gates[1], torch.tensor([0.7, 0.0, 0.15, 0.0]))
    normed = route(identity("topk", 4), z)
    assert torch.allclose(normed.gates[0], torch.tensor([0, 4 / 7, 0, 3 / 7]))
    assert torch.allclose(
        normed.gates[1], torch.tensor([0.7 / 0.85, 0, 0.15 / 0.85, 0])
    )
    for routing in (kept, normed):
        assert torch.allclose(routing.probs, z.exp())
        assert routing.assigned().tolist() == [
            [False, True, False, True],
            [True, False, True, False],
        ]
    soft = route(identity("soft", 4), z)
    assert torch.equal(soft.gates, soft.probs)
    assert soft.assigned().int().tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    one = route(identity("topk", 4, top_k=1, renormalize=False), z)
    assert torch.allclose(one.gates[1], torch.tensor([0.7, 0, 0, 0]))


def test_topk_of_all_experts_is_soft() -> None:
    x = tokens()
    both = []
    for kind, kw in (("topk", {"top_k": 4}), ("soft", {})):
        made = router(kind, **kw)
        routing = route(made, x)
        (routing.gates * tokens(30, 4)).sum().backward()
        both.append((routing.gates, made.gate.weight.grad))
    assert torch.allclose(both[0][0], both[1][0], atol=1e-7)
    assert torch.allclose(both[0][1], both[1][1], atol=1e-6)


def test_renormalised_gradient_by_hand() -> None:
    """Two of three: g = sigmoid of the difference of the two logits that count."""
    z = torch.tensor([[0.3, -1.0, 1.1]], requires_grad=True)
    route(identity("topk", 3), z).gates[0, 2].backward()
    s = 1 / (1 + math.exp(-0.8))
    want = torch.tensor([[-s * (1 - s), 0.0, s * (1 - s)]])
    assert z.grad is not None and torch.allclose(z.grad, want, atol=1e-6)


@pytest.mark.parametrize("T", [1, 3, 500])
def test_exact_ties_are_broken_alike_in_every_batch(T: int) -> None:
    made = identity("topk", 8, top_k=3)
    for z in (torch.zeros(8), torch.tensor([0.0, 1, 0, 1, 0, 1, 0, 1])):
        alone = route(made, z[None]).gates[0]
        assert int((alone > 0).sum()) == 3
        assert torch.allclose(alone[alone > 0], torch.full((3,), 1 / 3))
        gates = route(made, z.expand(T, 8)).gates
        assert torch.equal(gates, alone.expand(T, 8))
        mixed = torch.cat([tokens(T, 8), z.expand(T, 8)])
        assert torch.equal(route(made, mixed).gates[T:], alone.expand(T, 8))


@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_name_the_site(kind: str, bad: float) -> None:
    made, x = router(kind), tokens()
    x[17, 3] = bad
    with pytest.raises(RoutingError, match=r"'layers\.3\.up': router logits are not"):
        route(made, x)
    made.gate.weight.data[0, 0] = bad
    with pytest.raises(RoutingError, match="lower the learning rate"):
        route(made, tokens())


def test_nan_in_one_layer_names_that_site_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    molora.wrap(model, _config())
    gate: Any = sites(model)["1"].router
    gate.gate.weight.data[1, 1] = math.nan
    with pytest.raises(RoutingError, match="site '1'"):
        model(torch.randn(2, 6, generator=torch.Generator().manual_seed(0)))


def _config(**router: Any) -> molora.AdapterConfig:
    return molora.AdapterConfig.from_dict(
        {
            "target_modules": ["0", "1"],
            "experts": {"kind": "lora", "num_experts": 3, "r": 2},
            "router": {"kind": "topk", **router},
        }
    )


@pytest.mark.parametrize("kind", GATED)
def test_no_tokens_and_one_token(kind: str) -> None:
    made = router(kind)
    assert route(made, torch.zeros(0, 12)).gates.shape == (0, 4)
    x = tokens()
    one = torch.cat([route(made, row[None]).gates for row in x])
    assert torch.allclose(one, route(made, x).gates, atol=1e-6)


@pytest.mark.parametrize("kind", GATED)
def test_initial_gates_are_near_uniform(kind: str) -> None:
    cls: Any = ROUTERS[kind]
    made = cls(
        cls.Config(kind=kind),
        in_features=64,
        num_experts=4,
        site="m",
        generator=torch.Generator().manual_seed(0),
    )
    assert made.gate.weight.detach().std() == pytest.approx(0.02, rel=0.15)
    probs = route(made, tokens(200, 64)).probs
    assert (probs - 0.25).abs().max() < 0.2
    assert (probs.mean(0) - 0.25).abs().max() < 0.02


@pytest.mark.parametrize("kind", ["soft", "topk"])
def test_gradients_of_the_gate_against_float64_autograd(kind: str) -> None:
    made, x = router(kind), tokens().requires_grad_()
    w = tokens(30, 4, seed=3)
    (route(made, x).gates * w).sum().backward()
    x64 = x.detach().double().requires_grad_()
    weight = made.gate.weight.detach().double().requires_grad_()
    p = torch.softmax(x64 @ weight.t(), -1)
    if kind == "topk":
        p = p * torch.zeros_like(p).scatter(-1, p.topk(2).indices, 1.0)
        p = p / p.sum(-1, keepdim=True)
    (p * w.double()).sum().backward()
    for got, want in ((x.grad, x64.grad), (made.gate.weight.grad, weight.grad)):
        assert got is not None and want is not None
        assert (got.double() - want).abs().max() < 1e-5


def test_all_tokens_to_one_expert_is_that_expert_alone() -> None:
    made = identity("topk", 4, top_k=1, renormalize=False)
    x = torch.zeros(20, 4)
    x[:, 2] = 50
    gates = route(made, x).gates
    assert torch.equal(gates, torch.tensor([0.0, 0, 1, 0]).expand(20, 4))
    settings = LoRAExperts.Config(num_experts=4, r=2, lora_alpha=3.0)
    bank = LoRAExperts(
        settings, in_features=4, out_features=5, generator=torch.Generator()
    )
    nn.init.normal_(bank.Bt)
    base = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    y = bank(x, gates, base)
    dense = base + x @ bank.delta_weight(2).t()
    assert torch.allclose(y, dense, atol=1e-4)
    y.sum().backward()
    for factor in (bank.A, bank.Bt):
        assert factor.grad is not None
        assert torch.equal(factor.grad[[0, 1, 3]], torch.zeros_like(factor[[0, 1, 3]]))
        assert factor.grad[2].abs().sum() > 0


def test_every_router_is_registered_with_its_paper() -> None:
    for name, entry in ROUTERS.entries().items():
        assert entry.paper.startswith(("arXiv:", "openreview:")), name
        assert entry.summary.endswith((".", ")")), name
    with pytest.raises(ValueError, match="'soft' is registered twice"):
        ROUTERS.register("soft", paper="arXiv:1")(ROUTERS["soft"])
    with pytest.raises(ValueError, match="'new': registration needs a paper"):
        ROUTERS.register("new", paper="")
    with pytest.raises(ValueError, match="unknown router 'softt'. Did you mean 'soft'"):
        ROUTERS["softt"]
