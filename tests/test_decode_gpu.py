"""The short way through a layer on a GPU, run in Triton's interpreter."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import molora
from molora import decode
from molora.decode import _on_gpu, _plan
from molora.kernels import topk_route
from molora.layer import MoloraLinear
from molora.model import sites
from molora.routers import topk as topk_module

EXPERTS = {"kind": "lora", "num_experts": 5, "r": 4, "lora_alpha": 6}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Routing by the kernels, on tensors of the CPU; notes each call's arguments."""
    calls: list[Any] = []

    def routed(*args: Any) -> tuple[Tensor, Tensor]:
        calls.append(args)
        return topk_route(*args)

    monkeypatch.setattr(topk_module, "can_route", lambda x, weight: True)
    monkeypatch.setattr(topk_module, "topk_route", routed)
    monkeypatch.setattr(torch, "_assert_async", lambda flag, message: None)
    yield calls


def layer(router: dict[str, Any] | None, **more: Any) -> MoloraLinear:
    """A layer whose experts and router were shaken."""
    raw: dict[str, Any] = {"target_modules": ["0"], "experts": EXPERTS | more}
    if router is not None:
        raw["router"] = router
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(24, 16))
    model = molora.wrap(plain, molora.AdapterConfig.from_dict(raw)).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.5 if "gate" in name else 0.2)
    return sites(model)["0"]


def by_hand(site: MoloraLinear, x: Tensor, top_k: int, kept: bool) -> Tensor:
    """The layer from its parameters, in float64."""
    bank: Any = site.experts
    base: Any = site.base
    x = x.double().reshape(-1, 24)
    gates = torch.ones(len(x), 1).double()
    if site.router is not None:
        gate: Any = site.router.gate
        logits = x @ gate.weight.double().t() / site.router.config.temperature  # type: ignore[attr-defined]
        probs = logits.softmax(-1)
        least = probs.sort(-1).values[:, -top_k].unsqueeze(-1)
        gates = torch.where(probs >= least, probs, 0.0)
        gates = gates / gates.sum(-1, keepdim=True) if kept else gates
    y = x @ base.weight.double().t() + base.bias.double()
    for e in range(gates.shape[1]):
        A, Bt = bank.A[e % len(bank.A)], bank.Bt[e % len(bank.Bt)]
        y = y + gates[:, e : e + 1] * 1.5 * (x @ A.double().t() @ Bt.double())
    return y


@pytest.mark.parametrize("shape", [(1, 24), (2, 3, 24), (1, 1, 24), (0, 24)])
@pytest.mark.parametrize(
    ("router", "more"),
    [
        ({"kind": "topk", "top_k": 2}, {}),
        ({"kind": "topk", "top_k": 1, "renormalize": False}, {}),
        ({"kind": "topk", "top_k": 3, "renormalize": False, "temperature": 0.6}, {}),
        ({"kind": "topk", "top_k": 2}, {"shared": ["A"]}),
        (None, {"num_experts": 1}),
    ],
)
@torch.no_grad()
def test_it_is_the_definition(
    kernels: list[Any], router: Any, more: Any, shape: tuple[int, ...]
) -> None:
    site = layer(router, **more)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    plan = _plan(site)
    assert plan.scale == 1.5
    y = _on_gpu(site, x, plan)
    assert y is not None and y.shape == (*shape[:-1], 16)
    settings = router or {}
    wanted = by_hand(
        site, x, settings.get("top_k", 1), settings.get("renormalize", True)
    )
    torch.testing.assert_close(y.double().view(-1, 16), wanted, rtol=1e-5, atol=1e-5)
    assert len(kernels) == (router is not None)


@pytest.mark.parametrize(
    "router",
    [
        {"kind": "topk", "top_k": 2},
        {"kind": "topk", "top_k": 2, "temperature": 0.5, "renormalize": False},
    ],
)
def test_training_routes_by_the_kernels(kernels: list[Any], router: Any) -> None:
    found = []
    for used in (True, False):
        if not used:
            topk_module.can_route = lambda x, weight: False  # type: ignore[assignment]
        site = layer(router).train()
        x = torch.randn(9, 24, generator=torch.Generator().manual_seed(2))
        x.requires_grad_()
        y = site(x)
        leaves = [x, *(p for p in site.parameters() if p.requires_grad)]
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert len(kernels) == 1
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "router",
    [
        {"kind": "topk", "top_k": 2, "noise": 0.3},
        {"kind": "topk", "top_k": 2, "expert_dropout": 0.3},
        {"kind": "phatgoose", "top_k": 2},
    ],
)
def test_what_is_drawn_or_scored_otherwise_goes_another_way(
    kernels: list[Any], router: Any
) -> None:
    site = layer(router).train()
    site(torch.randn(3, 24))
    assert not kernels


@pytest.mark.parametrize("step", ["scores", "logits", "available"])
def test_own_scores_go_another_way(kernels: list[Any], step: str) -> None:
    kind = topk_module.TopKRouter
    own = type("Own", (kind,), {step: lambda self, x: -getattr(kind, step)(self, x)})
    site = layer({"kind": "topk", "top_k": 2})
    assert site.router is not None
    site.router.__class__ = own
    assert site.router.in_one(torch.randn(3, 24)) is None
    assert not kernels


@torch.no_grad()
def test_the_update_learns_how_many_experts_a_token_uses(
    kernels: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    original = decode.lowrank_mixture

    def noted(*args: Any, **settings: Any) -> Tensor:
        told.append(settings)
        return original(*args, **settings)

    monkeypatch.setattr(decode, "lowrank_mixture", noted)
    site = layer({"kind": "topk", "top_k": 3})
    assert _on_gpu(site, torch.randn(2, 24), _plan(site)) is not None
    assert told == [{"top_k": 3}] and len(kernels) == 1


@torch.no_grad()
def test_a_factor_on_another_device_is_no_plain_case() -> None:
    site, x = layer(None, num_experts=1), torch.randn(1, 24)
    plan = _plan(site)
    assert not decode._is_special(site, plan, x)
    site.experts.A = nn.Parameter(site.experts.A.to("meta"))  # type: ignore[operator]
    assert decode._is_special(site, plan, x)


def test_a_bias_on_the_choice_goes_another_way(kernels: list[Any]) -> None:
    site = layer({"kind": "topk", "top_k": 2})
    assert site.router is not None
    site.router.add_bias(5)
    site.router(torch.randn(3, 24), site.runtime.context_for("0", needed=True))
    assert not kernels
