"""Capacity and expert dropout: by hand, in a layer, with padding, refused settings."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import molora
from molora.context import ForwardContext
from molora.errors import ConfigError
from molora.model import sites
from molora.routers.capacity import limited
from tests.oracle import Layer
from tests.registered import GATED, router_settings

GATES = torch.tensor(
    [[0.6, 0.4, 0], [0.7, 0, 0.3], [0.8, 0.2, 0], [0.9, 0, 0.1], [0.5, 0.5, 0]]
)


def test_capacity_by_hand() -> None:
    # ten assignments over three experts: 4 each; the first expert overflows by one
    want = GATES.clone()
    want[4, 0] = 0
    assert torch.equal(limited(GATES, 1.0, None), want)
    assert torch.equal(limited(GATES, 1.5, None), GATES)
    # padding takes no place, is not counted, and is not cut: 6 assignments, 2 each
    mask = torch.tensor([0.0, 1, 1, 0, 1])
    want = GATES.clone()
    want[4, 0] = 0
    assert torch.equal(limited(GATES, 1.0, mask), want)
    assert torch.equal(limited(GATES, 9.0, mask * 0), GATES)


def test_what_is_a_whole_number_but_for_rounding_is_not_rounded_up() -> None:
    gates = torch.zeros(100, 10)
    gates[:, 0] = 1
    # 11.000000000000002
    assert math.ceil(1.1 * 100 / 10) == 12
    assert int(limited(gates, 1.1, None).sum()) == 11


def layer_of(kind: str, **router: Any) -> tuple[Any, Any]:
    raw = {
        "target_modules": ["lin"],
        "experts": {"kind": "lora", "num_experts": 4, "r": 2},
        "router": router_settings(kind, init_range=2.0, **router),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = torch.randn(5, 6)
        model = molora.wrap(Layer(base, None), molora.AdapterConfig.from_dict(raw))
        site: Any = sites(model)["lin"]
        nn.init.normal_(site.experts.Bt)
    return model.double().train(), site


def tokens(B: int, S: int, wide: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, S, wide, generator=generator, dtype=torch.float64)


def by_hand(site: Any, x: Tensor, real: Tensor, capacity: float) -> Tensor:
    """The layer token by token; queues in the order of rows and positions."""
    flat, keep = x.flatten(0, 1), real.flatten()
    gates = site.router(flat, ForwardContext()).gates.detach()
    E = gates.shape[-1]
    limit = math.ceil(capacity * int((gates[keep] > 0).sum()) / E)
    served = [0] * E
    rows = []
    for t, token in enumerate(flat):
        y = site.base(token)
        for e in range(E):
            if gates[t, e] == 0:
                continue
            if keep[t]:
                served[e] += 1
                if served[e] > limit:
                    continue
            A, Bt = (p.double() for p in site.experts.expert_factors(e))
            y = y + gates[t, e] * (token @ A.t() @ Bt)
        rows.append(y)
    return torch.stack(rows).view(*x.shape[:2], -1)


@pytest.mark.parametrize("kind", [k for k in GATED if k != "soft"])
def test_overflow_is_left_to_the_base(kind: str) -> None:
    model, site = layer_of(kind, capacity=1.0)
    x, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, 4:] = 0
    y = model(x, attention_mask=mask).detach()
    want = by_hand(site, x, mask.bool(), 1.0)
    assert torch.allclose(y, want, atol=1e-5)
    free = by_hand(site, x, mask.bool(), 99.0)
    assert not torch.allclose(y, free, atol=1e-3)
    model.eval()
    assert torch.allclose(model(x, attention_mask=mask), free, atol=1e-5)


def test_records_show_what_was_served() -> None:
    model, site = layer_of("topk", capacity=1.0)
    with molora.record_routing(model) as trace:
        model(tokens(1, 20))
    gates = site.router(tokens(1, 20)[0], ForwardContext()).gates
    served = trace.sites["lin"].chosen_sum[""]
    assert int((gates > 0).sum()) == 40
    assert float(served.max()) == 10 and float(served.sum()) < 40


@pytest.mark.parametrize("kind", GATED)
def test_dropped_experts_are_replaced_and_one_always_stays(kind: str) -> None:
    model, site = layer_of(kind, expert_dropout=0.7)
    router = site.router
    x = tokens(1, 4000)[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dropped = router(x, ForwardContext())
        seen = router.available(dropped.logits)
    router.eval()
    state = torch.get_rng_state()
    clean = router(x, ForwardContext())
    assert torch.equal(torch.get_rng_state(), state)
    # objectives and the z-loss see all experts
    assert torch.equal(dropped.logits, clean.logits)
    assert torch.equal(dropped.probs, clean.probs)
    # a token sees each expert with 0.3, and the luckiest one in any case
    visible = torch.isfinite(seen).double()
    assert (visible.sum(-1) >= 1).all()
    assert float(visible.mean()) == pytest.approx(0.3 + 0.7**4 / 4, abs=0.01)
    full = dropped.gates.sum(-1)
    assert torch.isfinite(dropped.gates).all()
    used = full > 0
    assert torch.allclose(full[used], torch.ones(int(used.sum())).double(), atol=1e-5)
    # most tokens lose the expert that they like best
    best = clean.gates.argmax(-1, keepdim=True)
    lost = (dropped.gates.gather(-1, best) == 0).double().mean()
    assert float(lost) == pytest.approx(0.7 - 0.7**4 / 4, abs=0.03)


@pytest.mark.parametrize(
    ("router", "words"),
    [
        ({"kind": "soft", "capacity": 2.0}, "every token to every expert, so nothing"),
        ({"kind": "topk", "capacity": 0.9}, r"router\.capacity: .*got 0\.9"),
        ({"kind": "topk", "expert_dropout": 1.0}, r"router\.expert_dropout: .*got 1"),
        ({"kind": "soft", "expert_dropout": -0.1}, r"router\.expert_dropout"),
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
