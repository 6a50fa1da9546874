"""Bias experts: PEFT's BEFT, training the bias itself, definitions, merging."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import molora
from molora.experts import BitFitExperts
from molora.model import sites
from tests.families import (
    disturb,
    layer_of,
    off,
    run,
    site_of,
    worst_of_sum,
)

Factory = Callable[..., PreTrainedModel]
IDS = torch.arange(1, 25).view(2, 12)


def bank(E: int, bias: bool = True) -> Any:
    weight, own = layer_of(7, 12)
    site = site_of({"kind": "bitfit"}, weight, own if bias else None, E=E)
    disturb(site)
    return site


def delta(site: Any) -> Any:
    return lambda e, x: x.new_ones(len(x), 1) * site.experts.shifts[e]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("E", [1, 4])
def test_a_mixture_is_the_sum_of_its_experts(E: int, bias: bool) -> None:
    site = bank(E, bias)
    found = worst_of_sum(site, delta(site))
    assert max(found.values()) < 1e-12, found
    assert site.experts.count() == E * 7


def test_hand_worked_numbers() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    site = site_of({"kind": "bitfit"}, weight, weight[0], E=2)
    shifts = torch.tensor([[10.0, 0.0], [0.0, 100.0]], dtype=torch.float64)
    site.experts.load_state_dict({"shifts": shifts})
    x = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    gates = torch.tensor([[0.5, 0.25]], dtype=torch.float64)
    want = torch.tensor([[1 + 2 + 1 + 5.0, 3 + 4 + 2 + 25.0]], dtype=torch.float64)
    assert torch.equal(run(site, x, gates), want)


def test_one_expert_trains_as_the_bias_itself() -> None:
    site = bank(1)
    own = nn.Linear(12, 7).double()
    own.load_state_dict(site.base.state_dict())
    own.weight.requires_grad_(False)
    with torch.no_grad():
        site.experts.shifts.zero_()
    ours = torch.optim.AdamW(site.experts.parameters(), lr=0.1, weight_decay=0)
    theirs = torch.optim.AdamW([own.bias], lr=0.1, weight_decay=0)
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        x = torch.randn(6, 12, generator=generator, dtype=torch.float64)
        for layer, optimizer in ((site, ours), (own, theirs)):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
    assert off(site.base.bias + site.experts.shifts[0], own.bias) < 1e-12
    assert off(own.bias, site.base.bias) > 0.1


@pytest.mark.parametrize("bias", [True, False])
def test_one_expert_merges_and_back(bias: bool) -> None:
    site = bank(1, bias)
    x = torch.randn(5, 12, dtype=torch.float64)
    want = run(site, x, None)
    before = {n: p.clone() for n, p in site.base.named_parameters()}
    site.merge()
    assert off(site(x), want) < 1e-12
    assert not site.base.bias.requires_grad
    assert (site._bias_O() is None) == (not bias)
    site.unmerge()
    after = dict(site.base.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert off(run(site, x, None), want) < 1e-12


def test_a_llama_without_biases_merges_exactly(tiny_llama: Factory) -> None:
    raw = {"target_modules": "all-linear", "experts": {"kind": "bitfit"}}
    model: Any = molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(raw)).double()
    for site in sites(model).values():
        disturb(site)
    names = set(model.state_dict())
    with torch.no_grad():
        want = model(IDS).logits
        with molora.disabled(model):
            assert off(model(IDS).logits, want) > 1e-3
        molora.merge(model)
        assert off(model(IDS).logits, want) < 1e-6
        molora.unmerge(model)
        assert set(model.state_dict()) == names
        assert off(model(IDS).logits, want) < 1e-12
        plain: Any = molora.unwrap(molora.merge(model))
        assert off(plain(IDS).logits, want) < 1e-6


def test_experts_that_shift_nothing_give_no_bias() -> None:
    for experts in ({"kind": "ia3"}, {"kind": "bitfit"}, {"kind": "lora"}):
        site = site_of(experts, layer_of(7, 12)[0])
        site.merge()
        assert site.base.bias is None
        site.unmerge()


def test_no_or_one_token_and_the_start() -> None:
    site = site_of({"kind": "bitfit"}, *layer_of(7, 12), E=3)
    for T in (0, 1):
        x = torch.randn(T, 12, dtype=torch.float64)
        y = run(site, x, torch.rand(T, 3, dtype=torch.float64))
        assert y.shape == (T, 7) and torch.equal(y, site.base(x))


def test_half_precision_base() -> None:
    weight, bias = (t.bfloat16() for t in layer_of(7, 12))
    site = site_of({"kind": "bitfit"}, weight, bias, E=3)
    site.experts.float()
    disturb(site)
    x = torch.randn(6, 12).bfloat16()
    gates = torch.rand(6, 3)
    y = run(site, x, gates)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and site.experts.shifts.grad.dtype == torch.float32
    want = site.base(x).float() + gates @ site.experts.shifts
    assert torch.equal(y, want.bfloat16())


@pytest.mark.parametrize("bias", [True, False])
def test_peft_reads_and_writes_the_same_expert(bias: bool) -> None:
    site = bank(3, bias)
    made = site.experts.to_peft(1)
    assert made.peft_type == BitFitExperts.peft_type == "BEFT"
    base = nn.ModuleDict({"lin": nn.Linear(12, 7, bias=bias)}).double()
    base["lin"].load_state_dict(site.base.state_dict())
    config = peft.BeftConfig(target_modules=["lin"], **made.settings)
    theirs: Any = peft.get_peft_model(base, config).base_model.model["lin"]
    assert theirs.beft_bias["default"].shape == made.tensors["beft_bias"].shape
    theirs.beft_bias["default"].data = made.tensors["beft_bias"]
    x: Tensor = torch.randn(5, 12, dtype=torch.float64)
    want = site.base(x) + delta(site)(1, x)
    assert off(theirs(x), want) < 1e-9
    experts, state = BitFitExperts.from_peft(config.to_dict(), made.tensors, 12, 7)
    again = site_of(experts, site.base.weight.data, site.base.bias)
    again.experts.load_state_dict(state)
    assert off(run(again, x, None), want) < 1e-9
