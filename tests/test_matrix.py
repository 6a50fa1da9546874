"""Every registered router with every balance objective that fits it, in training.

The gradient that an objective adds is the one of plain autograd; it is the same under
both kinds of activation checkpointing, it adds up over micro-batches, and padding has
no part in it. What holds at inference (causality, batches, padding, the cache) is
checked for every router in test_inference.py, the form of the objectives in
test_properties.py.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import molora
from molora.model import adapter_parameters, sites
from molora.prompt import Prompt, prompt_from_labels
from molora.route import decide
from molora.routers import OBJECTIVES, ROUTERS
from tests.registered import (
    LOSSES,
    ROUTED,
    TASKS,
    objective,
    objective_settings,
    router_settings,
    takes,
)

Factory = Callable[..., PreTrainedModel]
E, WEIGHT = 4, 0.7
ELSEWHERE = {
    "block": {"scope": "block"},
    "model": {"scope": "model"},
    "sequence": {"input": "sequence"},
    "task": {"input": "task", "tasks": TASKS},
}
"""Other scopes and inputs than those of the pairs."""
MODES = {"eager": None, "reentrant": True, "non-reentrant": False}


def fits(router: str, kind: str) -> bool:
    made = objective(kind)
    return made.check(made.config, ROUTERS[router], E) is None


PAIRS = [(r, k) for r in ROUTED for k in LOSSES if fits(r, k)]
STEERED = [(r, k) for r in ROUTED for k in OBJECTIVES.names() if fits(r, k)]
# every router with one objective, where it also can stand
SHARED = [
    (f"{router}@{where}", kind)
    for router in ROUTED
    for where, settings in ELSEWHERE.items()
    for kind in [k for r, k in PAIRS if r == router][:1]
    if takes(router, **settings)
]
# those that nothing balances have to recompute as well
BARE = [(r, "") for r in ROUTED if not any(r == routed for routed, _ in STEERED)]
# capacity and expert dropout are settings of gates, noise too
EXTRAS = {"noise": 0.3, "expert_dropout": 0.3, "capacity": 1.2}


def able(router: str, *names: str) -> dict[str, Any]:
    """Those of the extra settings that a router takes."""
    cls = ROUTERS[router.partition("@")[0]]
    taken = [n for n in names if n in cls.Config.model_fields]
    return {n: EXTRAS[n] for n in taken if n != "capacity" or cls.selects}


def build(
    make: Factory, router: str, balance: list[str], mode: str = "eager", *extras: str
) -> Any:
    router, _, where = router.partition("@")
    raw = {
        "target_modules": ["q_proj", "down_proj"],
        "experts": {"kind": "lora", "num_experts": E, "r": 2},
        "router": router_settings(
            router, **able(router, *extras), **ELSEWHERE.get(where, {})
        ),
        "balance": [objective_settings(kind, WEIGHT) for kind in balance],
    }
    model: Any = molora.wrap(
        make(num_hidden_layers=1), molora.AdapterConfig.from_dict(raw)
    ).double()
    generator = torch.Generator().manual_seed(3)
    for name, p in adapter_parameters(model).items():
        p.data.normal_(0, 0.7 if "router" in name else 0.2, generator=generator)
    if MODES[mode] is not None:
        model.activation_checkpointing_enable({"use_reentrant": MODES[mode]})
    return model.train()


def batch(seed: int = 0, B: int = 3, S: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (B, S), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, S - 3 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    # nothing predicts the first token, unless padding stands before it
    labels[:, 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def run(model: Any, data: dict[str, Tensor], scale: float = 1.0) -> None:
    model.molora_runtime.balance_scale = scale
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(molora.tasks(model, TASKS[: len(data["input_ids"])]))
        torch.manual_seed(5)
        (model(**data).loss * scale).backward()


def gradients(model: Any) -> dict[str, Tensor]:
    # a router may have values that one loss does not reach
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in adapter_parameters(model).items()
    }
    model.zero_grad()
    return grads


def same(a: dict[str, Tensor], b: dict[str, Tensor], tol: float = 1e-6) -> bool:
    # Llama's norms round to float32, so gradients agree up to that
    return all((a[n] - b[n]).abs().max() <= tol * (1 + b[n].abs().max()) for n in b)


def by_plain_autograd(
    make: Factory, router: str, kind: str, data: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Loss plus the weighted mean of the objective, from the inputs of the sites."""
    model = build(make, router, [])
    read: dict[str, Tensor] = {}
    for path, site in sites(model).items():
        site.register_forward_pre_hook(
            lambda m, args, path=path: read.update({path: args[0]})
        )
    with molora.tasks(model, TASKS):
        loss = model(**data).loss
    context = molora.context.ForwardContext(
        data["attention_mask"].bool(),
        tuple(TASKS),
        rows=len(data["input_ids"]),
        prompt=Prompt(prompt_from_labels(data["labels"]), None, "labels"),
    )
    routers = [site for site in sites(model).values() if site.router is not None]
    for site in routers:
        path, x = site.path, read[site.path]
        assert site.router is not None
        if site.router.reads_base_pass:
            with molora.disabled(model), torch.no_grad():
                x = model.model(data["input_ids"], data["attention_mask"])[0]
        routing = decide(site.router, x, context)
        weight_T = context.token_weights(x.shape, path)
        rows = context.token_rows(x.shape, path)
        value = objective(kind)(routing, weight_T, rows)
        loss = loss + WEIGHT * value / len(routers)
    loss.backward()
    return gradients(model)


@pytest.mark.parametrize(("router", "kind"), PAIRS)
def test_the_gradient_is_that_of_the_summed_loss(
    router: str, kind: str, tiny_llama: Factory
) -> None:
    data = batch()
    model = build(tiny_llama, router, [kind])
    run(model, data)
    got = gradients(model)
    assert same(got, by_plain_autograd(tiny_llama, router, kind, data))
    without = build(tiny_llama, router, [])
    run(without, data)
    assert not same(gradients(without), got, 1e-5)


@pytest.mark.parametrize(("router", "kind"), STEERED + SHARED + BARE)
def test_recomputation_repeats_its_forward(
    router: str, kind: str, tiny_llama: Factory
) -> None:
    found = []
    # reentrant checkpoints cut a routing off that is shared by the whole model
    scope = build(tiny_llama, router, []).molora_config.router.scope
    modes = [m for m in MODES if m != "reentrant" or scope != "model"]
    for mode in modes:
        extras = EXTRAS if kind else ["noise"]
        model = build(tiny_llama, router, [kind] if kind else [], mode, *extras)
        run(model, batch())
        found.append(gradients(model))
    assert any(grad.any() for grad in found[0].values())
    assert all(same(other, found[0]) for other in found[1:]) and len(found) > 1


@pytest.mark.parametrize(("router", "kind"), PAIRS + SHARED)
def test_micro_batches_add_up(router: str, kind: str, tiny_llama: Factory) -> None:
    parts = [batch(1), batch(2)]
    model = build(tiny_llama, router, [kind])
    single = []
    for part in parts:
        run(model, part)
        single.append(gradients(model))
    for part in parts:
        run(model, part, scale=0.5)
    got = gradients(model)
    assert same(got, {n: (single[0][n] + single[1][n]) / 2 for n in got}, 1e-12)


@pytest.mark.parametrize(("router", "kind"), PAIRS + SHARED)
def test_padding_has_no_part(router: str, kind: str, tiny_llama: Factory) -> None:
    """Two columns of garbage on the left, two on the right."""
    plain = batch()
    generator = torch.Generator().manual_seed(9)
    garbage = torch.randint(3, 128, (3, 2), generator=generator)
    sides = {"input_ids": garbage, "labels": garbage * 0 - 100}
    padded = {}
    for name, values in plain.items():
        side = sides.get(name, garbage * 0)
        padded[name] = torch.cat([side, values, side], dim=1)
    positions = torch.arange(9).expand(3, -1)
    padded["position_ids"] = torch.cat([garbage * 0, positions], dim=1)
    found = []
    for data in (plain, padded):
        model = build(tiny_llama, router, [kind], "eager", "capacity")
        run(model, data)
        found.append(gradients(model))
    assert same(found[1], found[0])
