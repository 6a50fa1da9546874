"""Every registered expert family: what must hold of each, whatever its mathematics.

Each property is one test. Layers are not square, and their sizes have few divisors;
those that a family cannot take are refused with the setting that would have to change.
What a family computes is compared with other implementations in experts/.

T tokens, E experts, I in, O out features.
"""

import copy
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import molora
from molora.errors import ConfigError, WrapError
from molora.experts import EXPERTS, AbstractExperts
from molora.model import adapter_parameters, sites
from molora.routers import ROUTERS
from tests.registered import (
    ROUTED,
    SCOPES,
    TASKS,
    VARIANTS,
    family_of,
    family_settings,
    router_settings,
)

Factory = Callable[..., PreTrainedModel]
FAMILIES = EXPERTS.names()
ALL = [*FAMILIES, *VARIANTS]
SAVED = ["lora frozen", "lora seeded", "lora masked", "lora pissa", "dora of sum"]
"""Variants that save other things than their family."""
SIZES = [(30, 50), (28, 20), (16, 24), (7, 13)]
"""I and O of the layers."""
E = 4
IDS = torch.arange(3, 17).view(2, 7)


class Layer(nn.Module):
    """A model of one numbered layer, with the argument names of a language model."""

    def __init__(self, ins: int, outs: int, bias: bool = True):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(ins, outs, bias=bias)])
        for parameter in self.parameters():
            parameter.data.normal_(0, 0.5, generator=generator)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        y: Tensor = self.layers[0](inputs_embeds)
        return y


def wrapped(model: Any, kind: str, E: int = 1, router: str = "none") -> Any:
    raw = {
        "target_modules": r"layers\.0|.*\.(q_proj|k_proj|down_proj)",
        "experts": family_settings(kind, E),
        "router": router_settings(router),
    }
    return molora.wrap(model, molora.AdapterConfig.from_dict(raw), seed=1)


def disturbed(model: Any, size: float = 0.2) -> Any:
    """Other values than those of the start, in all that is trained."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                scale = 0.7 if "router" in name else size
                parameter.add_(scale * noise.to(parameter.dtype))
    return model


def layers(kind: str, E: int = 1, router: str = "none") -> list[Any]:
    """A wrapped layer of each size that the family takes, with a bias or not."""
    found = []
    for number, (ins, outs) in enumerate(SIZES):
        try:
            model = wrapped(Layer(ins, outs, bias=number % 2 == 0), kind, E, router)
        except WrapError as error:
            fields = family_of(kind).Config.model_fields
            assert any(name in str(error) for name in fields), error
            continue
        found.append(model.double())
    assert any(site_of(model).in_features % 2 == 0 for model in found)
    return found


def site_of(model: Any) -> Any:
    return next(iter(sites(model).values()))


def input_of(model: Any, B: int = 2, S: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    wide = site_of(model).in_features
    return torch.randn(B, S, wide, generator=generator, dtype=torch.float64)


def tiny(make: Factory, kind: str) -> Any:
    deep = 2 if kind in SCOPES else 1
    return make(num_hidden_layers=deep, intermediate_size=40)


def near(got: Tensor, want: Tensor, tol: float = 1e-6) -> bool:
    assert got.shape == want.shape
    return bool((got - want).abs().max() <= tol * (1 + want.abs().max()))


@pytest.mark.parametrize("kind", ALL)
def test_the_start_is_the_base(kind: str) -> None:
    for E, router in ((1, "none"), (3, "soft")):
        for model in layers(kind, E, router):
            x, site = input_of(model), site_of(model)
            with torch.no_grad():
                same = near(model(x), site.base(x))
            assert same or not site.experts.starts_at_zero
            if not site.experts.starts_at_zero:
                told = f"{sys.modules[family_of(kind).__module__].__doc__}".split()
                assert "not zero at the start" in " ".join(told)


@pytest.mark.parametrize("kind", ALL)
def test_merge_is_the_forward_and_unmerge_is_exact(kind: str) -> None:
    for model in layers(kind):
        disturbed(model)
        x, site = input_of(model), site_of(model)
        with torch.no_grad():
            want, plain = model(x), site.base(x)
        # after a forward, in which coft may limit its blocks
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        with torch.no_grad():
            assert not near(want, plain, 1e-3)
            if site.experts.linear:
                assert near(molora.merge(model)(x), want)
                assert not near(site.base(x), plain, 1e-3)
                molora.unmerge(model)
            else:
                with pytest.raises(WrapError, match="no change of a weight"):
                    molora.merge(model)
                with pytest.raises(WrapError):
                    site.experts.delta_weight(0, before["layers.0.base.weight"])
        # coft limits its blocks in every forward, again after rounding
        rounded = ".experts.upper" if kind == "oft coft" else "none"
        for name, values in model.named_parameters():
            exact = torch.equal(values, before[name])
            assert exact or (rounded in name and near(values, before[name])), name


@pytest.mark.parametrize("kind", ALL)
def test_collapse_is_the_even_mean_or_refused(kind: str) -> None:
    for model in layers(kind, 3, "soft"):
        experts = site_of(disturbed(model)).experts
        weight = experts.frozen_weight()
        shifts = experts.delta_bias(0, torch.ones(len(weight), dtype=weight.dtype))
        if kind.startswith("ia3") or not experts.linear or shifts is not None:
            with pytest.raises(WrapError, match=r"low-rank|nonlinear"):
                molora.collapse(model, "concat", show_progress=False)
            assert site_of(model).experts is experts
            continue
        mean = sum(experts.delta_weight(e, weight) for e in range(3)) / 3
        molora.collapse(model, "concat", show_progress=False)
        assert near(site_of(model).delta_weight(), mean, 1e-5)


@pytest.mark.parametrize("kind", ALL)
def test_the_count_is_what_is_trained(kind: str) -> None:
    for E, router in ((1, "none"), (3, "soft")):
        for model in layers(kind, E, router):
            experts = site_of(model).experts
            trained = [p.numel() for p in experts.parameters() if p.requires_grad]
            masks = [b for n, b in experts.named_buffers() if "mask_" in n]
            hidden = sum(int((~mask).sum()) for mask in masks)
            assert experts.count() == sum(trained) - hidden > 0
            frozen = {n for n, p in experts.named_parameters() if not p.requires_grad}
            parts = [m for m in experts.modules() if isinstance(m, AbstractExperts)]
            assert {n.rpartition(".")[2] for n in frozen} == {
                name for part in parts for name in part.frozen
            }


@pytest.mark.parametrize("kind", [*FAMILIES, *SAVED, *SCOPES])
def test_save_and_load(kind: str, tiny_llama: Factory, tmp_path: Path) -> None:
    for E, router in ((1, "none"), (3, "soft")):
        model = disturbed(wrapped(tiny(tiny_llama, kind), kind, E, router))
        model.save_pretrained(tmp_path / str(E))
        again = molora.load(tiny(tiny_llama, kind), tmp_path / str(E))
        with torch.no_grad():
            want = model(IDS).logits
            assert torch.equal(again(IDS).logits, want)
            with molora.disabled(model):
                assert not near(model(IDS).logits, want, 1e-4)


@pytest.mark.parametrize("kind", [*FAMILIES, *SCOPES])
def test_activation_checkpointing(kind: str, tiny_llama: Factory) -> None:
    found = []
    for reentrant in (None, True, False):
        model = disturbed(wrapped(tiny(tiny_llama, kind), kind, E, "topk")).train()
        if reentrant is not None:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(IDS, labels=IDS).loss.backward()
        trained = adapter_parameters(model).items()
        found.append({n: p.grad for n, p in trained if p.requires_grad})
    for name, grad in found[0].items():
        assert grad is not None and grad.isfinite().all(), name
        for other in found[1:]:
            assert near(other[name], grad), name
        assert grad.any() or "router" in name, name


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_base_in_half_precision(kind: str, tiny_llama: Factory) -> None:
    # a rounded score could choose another expert
    for E, router in ((1, "none"), (3, "soft")):
        model = tiny(tiny_llama, kind).bfloat16()
        model = disturbed(wrapped(model, kind, E, router)).train()
        exact = copy.deepcopy(model).float()
        out = model(IDS, labels=IDS)
        assert out.logits.dtype == torch.bfloat16
        with torch.no_grad():
            assert near(out.logits.float(), exact(IDS).logits, 0.1)
        out.loss.backward()
        for name, parameter in adapter_parameters(model).items():
            assert parameter.dtype == torch.float32, name
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("kind", FAMILIES)
def test_generation_with_and_without_a_cache(kind: str, tiny_llama: Factory) -> None:
    model = disturbed(wrapped(tiny(tiny_llama, kind), kind, 3, "topk")).double().eval()
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached = model.generate(IDS, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(IDS, use_cache=False, **settings))
    assert cached.shape == (2, 12)


def updates(site: Any, kind: str, x_TI: Tensor) -> Tensor:
    """Update of each expert by itself, [E, T, O]."""
    made, bias = [], site.experts.frozen_bias()
    zeros_O = x_TI.new_zeros(site.out_features)
    for e in range(site.experts.num_experts):
        if site.experts.linear:
            weight = site.experts.delta_weight(e, site.base_weight())
            y = x_TI @ weight.to(x_TI.dtype).t()
            change = site.experts.delta_bias(e, zeros_O if bias is None else bias)
            made.append(y if change is None else y + change)
            continue
        layer = Layer(site.in_features, site.out_features, bias is not None)
        layer.layers[0].load_state_dict(site.base.state_dict())
        single = wrapped(layer, kind).double()
        state = site.experts.state_dict()
        for name, values in site_of(single).experts.state_dict().items():
            mine = state[name]
            values.copy_(mine if mine.shape == values.shape else mine[e : e + 1])
        made.append(single(x_TI) - site.base(x_TI))
    return torch.stack(made)


def routed(make: Factory, kind: str, router: str) -> tuple[Any, dict[str, Tensor]]:
    """A model under E experts, and a batch of two rows for it."""
    if ROUTERS[router].reads_base_pass:
        return wrapped(tiny(make, kind), kind, E, router), {"input_ids": IDS}
    first = site_of(layers(kind)[0])
    model = wrapped(Layer(first.in_features, first.out_features), kind, E, router)
    return model, {"inputs_embeds": input_of(model)}


@pytest.mark.parametrize("kind", ALL)
def test_every_router_gives_the_explicit_sum(kind: str, tiny_llama: Factory) -> None:
    # what a router asks of a family does not depend on its settings
    for router in ("soft", "topk") if kind in VARIANTS else ROUTED:
        if router == "arrow" and not hasattr(family_of(kind), "factors"):
            with pytest.raises(ConfigError, match="two factors"):
                routed(tiny_llama, kind, router)
            continue
        model, batch = routed(tiny_llama, kind, router)
        site = site_of(disturbed(model.double()).train())
        seen: list[Tensor] = []
        site.register_forward_hook(lambda _, x, y, seen=seen: seen.extend((x[0], y)))
        names = (*site.router.known_tasks(site.router.config), *TASKS)[:2]
        rows, tokens, *_ = next(iter(batch.values())).shape
        with ExitStack() as stack:
            stack.enter_context(molora.tasks(model, names))
            prompt = torch.ones(rows, tokens, dtype=torch.bool)
            stack.enter_context(molora.prompts(model, prompt))
            trace = stack.enter_context(molora.record_routing(model))
            model(**batch)
        # the pass of the base, where a router makes one, comes first
        x_TI, y_TO = (values.flatten(0, 1) for values in seen[-2:])
        gates_TE = trace.sites[site.path].gates[0].to(y_TO.dtype).view(-1, E)
        with torch.no_grad():
            alone_ETO = updates(site, kind, x_TI)
            want_TO = site.base(x_TI) + torch.einsum("te,eto->to", gates_TE, alone_ETO)
        assert near(y_TO, want_TO, 1e-5), router
        assert not near(y_TO, site.base(x_TI), 1e-4), router
        y_TO.square().mean().backward()
        for name, parameter in site.experts.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, (router, name)
                assert parameter.grad.isfinite().all(), (router, name)
                assert parameter.grad.any(), (router, name)
