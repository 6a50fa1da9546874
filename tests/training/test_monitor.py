"""Routing statistics against hand-worked numbers; collapse is warned of once."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import molora
from molora.errors import DataError
from molora.model import sites
from molora.records import SiteStats
from molora.training import MoloraTrainingSettings, RoutingMonitor
from molora.training.monitor import SiteUse
from molora.training.routing_log import RoutingLog, scalars, summary

Factory = Callable[..., PreTrainedModel]
FIRST = "model.layers.0.mlp.up_proj"
SECOND = "model.layers.1.mlp.up_proj"


def wrapped(tiny_llama: Factory, **router: Any) -> Any:
    settings = {
        "target_modules": ["up_proj"],
        "experts": {"kind": "lora", "num_experts": 4, "r": 2},
        "router": {"kind": "topk", "top_k": 2} | router,
        "balance": [{"kind": "switch", "weight": 0.1}],
    }
    return molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(settings)).train()


def put(
    model: Any,
    gates: list[float],
    chosen: list[float],
    path: str = FIRST,
    tokens: float = 10.0,
) -> None:
    model.molora_runtime.stats[path] = SiteStats(
        tokens=torch.tensor(tokens),
        gate_sum_E=torch.tensor(gates),
        chosen_sum_E=torch.tensor(chosen),
        balance={"switch": torch.tensor(2.5)},
        forwards=2,
    )


def test_numbers_by_hand(tiny_llama: Factory) -> None:
    model = wrapped(tiny_llama)
    monitor = RoutingMonitor(model, MoloraTrainingSettings())
    # 10 tokens, gates that add up to 8 (not renormalised), 20 assignments
    put(model, [4.0, 3.6, 0.4, 0.0], [10.0, 9.0, 1.0, 0.0])
    put(model, [2.0, 2.0, 2.0, 2.0], [5.0, 5.0, 5.0, 5.0], SECOND)
    uses = monitor.read(1)
    assert list(uses) == [FIRST, SECOND]
    use = uses[FIRST]
    assert use.mean_weight == pytest.approx([0.5, 0.45, 0.05, 0.0])
    assert use.share == pytest.approx([0.5, 0.45, 0.05, 0.0])
    # 0.5 ln 2 + 0.45 ln(1 / 0.45) + 0.05 ln 20, over ln 4
    assert use.entropy == pytest.approx(0.8556887 / 1.3862944, rel=1e-6)
    # live above 1/40
    assert use.live_experts == 3
    assert use.per_token == pytest.approx(2.0)
    assert use.balance == {"switch": pytest.approx(1.25)}
    assert summary(uses) == {
        "routing/entropy_mean": pytest.approx((1 + 0.617249) / 2, rel=1e-5),
        "routing/entropy_min": pytest.approx(0.617249, rel=1e-5),
        "routing/live_experts_min": 3,
        "routing/max_mean_weight": pytest.approx(0.5),
        "routing/balance_switch": pytest.approx(1.25),
    }
    single = scalars(uses)
    assert len(single) == 10
    assert single[f"routing_sites/{FIRST}/max_share"] == pytest.approx(0.5)
    # a reading starts anew, and a site that saw no real token has no numbers
    put(model, [0.0] * 4, [0.0] * 4, tokens=0.0)
    assert monitor.read(1) == {}
    assert summary({}) == {}


def test_statistics_are_of_what_the_routers_did(tiny_llama: Factory) -> None:
    model = wrapped(tiny_llama, noise=0.0)
    monitor = RoutingMonitor(model, MoloraTrainingSettings())
    ids = torch.randint(3, 128, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    gates: dict[str, list[torch.Tensor]] = {}
    handles = [
        site.router.register_forward_hook(
            lambda module, args, routing: gates.setdefault(module.site, []).append(
                routing.gates.detach()
            )
        )
        for site in sites(model).values()
    ]
    for batch in (ids, ids.flip(0)):
        model(input_ids=batch, attention_mask=mask)
    for handle in handles:
        handle.remove()
    uses = monitor.read(1)
    real = mask.flatten().bool()
    for path, use in uses.items():
        kept = torch.cat([g[real] for g in gates[path]]).double()
        assert use.tokens == 22
        assert use.mean_weight == pytest.approx((kept.sum(0) / 22).tolist(), rel=1e-5)
        assert use.share == pytest.approx(((kept > 0).sum(0) / 44).tolist(), rel=1e-5)
    assert len(uses) == 2


@pytest.mark.parametrize(
    ("weight", "per_token", "told"),
    [
        ([0.25, 0.25, 0.25, 0.25], 2.0, None),
        ([0.5, 0.5, 0.0, 0.0], 2.0, "only 2 of 4"),
        ([0.5, 0.45, 0.05, 0.0], 2.0, None),
        ([0.81, 0.07, 0.06, 0.06], 2.0, "expert 0 of 4 has 81%"),
        ([0.1, 0.79, 0.11, 0.0], 2.0, None),
        # every token goes to all of them: there is no choice that could collapse
        ([0.5, 0.5], 2.0, None),
        ([0.9, 0.1], 1.0, None),
        ([0.99, 0.01], 1.0, "only 1 of 2"),
        # a soft router of near uniform gates that always has the same likeliest expert
        ([0.26, 0.25, 0.25, 0.24], 1.0, None),
        ([1.0, 0.0, 0.0, 0.0], 1.0, "only 1 of 4"),
    ],
)
def test_what_counts_as_collapse(
    weight: list[float], per_token: float, told: str | None
) -> None:
    live = sum(w > 0.1 / len(weight) for w in weight)
    use = SiteUse(10, weight, weight, 0.5, live, per_token, {})
    reason = use.collapse(0.8)
    assert reason is None if told is None else (reason or "").startswith(told)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [r.getMessage() for r in caplog.records if "collapsed" in r.msg]
    caplog.clear()
    return found


def test_warning_comes_once_per_collapse_over_a_window(
    tiny_llama: Factory, caplog: pytest.LogCaptureFixture
) -> None:
    model = wrapped(tiny_llama)
    monitor = RoutingMonitor(model, MoloraTrainingSettings(collapse_window=10))
    healthy = ([2.5] * 4, [5.0] * 4)
    broken = ([10.0, 0.0, 0.0, 0.0], [10.0, 10.0, 0.0, 0.0])

    def log(use: Any, steps: int = 5) -> list[str]:
        put(model, *use)
        put(model, *healthy, SECOND)
        monitor.read(steps)
        return warnings(caplog)

    assert log(broken) == []
    (text,) = log(broken)
    assert "1 of 2 routers" in text and "last 10 steps" in text
    assert FIRST in text and SECOND not in text
    assert log(broken) == []
    assert log(healthy) == []
    assert log(healthy) == []
    assert log(broken) == []
    assert len(log(broken)) == 1
    # one long reading is a window of its own
    assert log(healthy, steps=100) == []
    assert len(log(broken, steps=100)) == 1
    # a pause is no evidence
    never = RoutingMonitor(model, MoloraTrainingSettings(collapse_window=0))
    put(model, *broken)
    never.read(100)
    assert warnings(caplog) == []


@pytest.mark.parametrize("push", [0.0, 20.0])
@pytest.mark.parametrize("kind", ["topk", "soft"])
def test_pushed_logit_is_a_collapse_and_a_fresh_router_is_none(
    tiny_llama: Factory, caplog: pytest.LogCaptureFixture, push: float, kind: str
) -> None:
    settings = {"kind": kind} | ({"top_k": 2} if kind == "topk" else {})
    config = molora.AdapterConfig.from_dict(
        {
            "target_modules": ["up_proj"],
            "experts": {"kind": "lora", "num_experts": 8, "r": 2},
            "router": settings,
        }
    )
    model = molora.wrap(tiny_llama(), config).train()
    monitor = RoutingMonitor(model, MoloraTrainingSettings(collapse_window=3))
    for site in sites(model).values():
        site.router.logits = pushed(site.router.logits, push)
    for step in range(3):
        ids = torch.randint(
            3, 128, (2, 16), generator=torch.Generator().manual_seed(step)
        )
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
        with caplog.at_level(logging.WARNING):
            uses = monitor.read(1)
    found = warnings(caplog)
    if not push:
        assert found == []
        return
    assert "2 of 2 routers have collapsed" in found[0]
    assert all(use.mean_weight[3] > 0.99 for use in uses.values())


def pushed(logits: Any, push: float) -> Any:
    def with_push(x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = logits(x)
        return found + push * torch.nn.functional.one_hot(torch.tensor(3), 8)

    return with_push


def test_state_goes_on_where_it_was(tiny_llama: Factory) -> None:
    model = wrapped(tiny_llama)
    monitor = RoutingMonitor(model, MoloraTrainingSettings(collapse_window=4))
    put(model, [10.0, 0.0, 0.0, 0.0], [10.0, 10.0, 0.0, 0.0])
    monitor.read(3)
    put(model, [0.1, 0.2, 0.3, 0.4], [4.0, 5.0, 6.0, 5.0])
    state = monitor.state()
    other = wrapped(tiny_llama)
    again = RoutingMonitor(other, MoloraTrainingSettings(collapse_window=4))
    again.restore(state)
    restored = other.molora_runtime.stats[FIRST]
    assert torch.equal(restored.gate_sum_E, torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert restored.forwards == 2
    assert again.read(2) == monitor.read(2)
    assert [s for s, _ in again.window] == [s for s, _ in monitor.window] == [3, 2]


def test_model_without_routers_has_no_statistics(tiny_llama: Factory) -> None:
    config = {
        "target_modules": ["up_proj"],
        "experts": {"kind": "lora", "num_experts": 1, "r": 2},
    }
    model = molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(config))
    monitor = RoutingMonitor(model, MoloraTrainingSettings())
    assert model.molora_runtime.stats is None
    assert monitor.read(1) == {}
    monitor.restore(monitor.state())


def test_log_drops_what_comes_after_the_resumed_step(tmp_path: Path) -> None:
    path = tmp_path / "routing_log.jsonl"
    use = SiteUse(3.0, [1 / 3, 2 / 3], [0.5, 0.5], 0.918295834, 2, 1.0, {"z": math.pi})
    log = RoutingLog(path, 0)
    for step in (1, 2, 3):
        log.write(step, {"a": use, "b": use})
    path.write_text(path.read_text() + '{"step": 1, "si')
    RoutingLog(path, 2).write(3, {"a": use})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = [(line["step"], line["site"]) for line in lines]
    assert found == [(1, "a"), (1, "b"), (2, "a"), (2, "b"), (3, "a")]
    assert lines[0]["mean_weight"] == [0.333333, 0.666667]
    assert lines[0]["balance"] == {"z": 3.14159}
    RoutingLog(path, 0)
    assert path.read_text() == ""


@pytest.mark.parametrize("line", ['{"site": "a"}', '{"step": []}', "[1]", "\xe9"])
def test_a_file_of_another_kind_is_no_log(line: str, tmp_path: Path) -> None:
    path = tmp_path / "routing_log.jsonl"
    path.write_bytes(line.encode("latin-1"))
    with pytest.raises(DataError, match="is no routing log"):
        RoutingLog(path, 1)
    assert path.read_bytes() == line.encode("latin-1")
