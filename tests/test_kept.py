"""What is kept between forwards: made once, and again whenever a source changes."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import molora
from molora.context import ForwardContext
from molora.kept import Keeping, Kept
from molora.model import sites
from tests.bits import layer_of as quantised_layer
from tests.families import disturb, layer_of, off, site_of

DORA = {"kind": "dora", "inner": {"kind": "lora", "r": 3}}
X = torch.randn(4, 10, generator=torch.Generator().manual_seed(0)).double()
KEEPING: dict[str, dict[str, Any]] = {
    "dora": DORA,
    "dora around lokr": {"kind": "dora", "inner": {"kind": "lokr", "r": 2}},
    "oft": {"kind": "oft", "oft_block_size": 5},
    "boft": {"kind": "boft", "boft_block_size": 2, "boft_n_butterfly_factor": 1},
}


def made(settings: dict[str, Any], E: int = 3) -> Any:
    """A layer from 10 to 8 features in eval mode, its values shaken."""
    site = site_of(settings, *layer_of(8, 10), E=E)
    disturb(site)
    return site.eval()


def once(site: Any, x: Tensor = X) -> Tensor:
    """Result in a forward that goes on from a cache."""
    going_on = site.runtime.use(ForwardContext(continues=True), 0)
    with torch.no_grad(), going_on:
        y: Tensor = site(x)
    return y


def fresh(site: Any, x: Tensor = X) -> Tensor:
    """The same without anything that was kept: gradients are asked for."""
    with torch.enable_grad():
        y: Tensor = copy.deepcopy(site)(x)
    return y.detach()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every time that something is made, not read."""
    calls: list[int] = []
    real = Kept.of

    def of(self: Kept, sources: Any, make: Callable[[], Any]) -> Any:
        def noted() -> Any:
            calls.append(1)
            return make()

        return real(self, sources, noted)

    monkeypatch.setattr(Kept, "of", of)
    return calls


@pytest.mark.parametrize("name", KEEPING)
def test_it_is_made_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    site, calls = made(KEEPING[name]), counted(monkeypatch)
    want = once(site)
    once_made = len(calls)
    for _ in range(3):
        assert torch.equal(once(site), want)
    assert len(calls) == once_made > 0
    site(X)
    site(X)
    # with gradients nothing is kept, and what was there is gone
    assert len(calls) == 3 * once_made
    assert torch.equal(once(site), want)
    assert len(calls) == 4 * once_made


def values(site: Any) -> dict[str, nn.Parameter]:
    return dict(site.experts.named_parameters())


def in_place(site: Any, name: str) -> None:
    with torch.no_grad():
        values(site)[name].mul_(1.5)


def in_inference_mode(site: Any, name: str) -> None:
    with torch.inference_mode():
        values(site)[name].mul_(1.5)


def through_an_alias(site: Any, name: str) -> None:
    values(site)[name].detach().view(-1)[:3].fill_(2.0)


def other_storage(site: Any, name: str) -> None:
    value = values(site)[name]
    value.data = 1.5 * value.data


def storages_that_come_back(site: Any, name: str) -> None:
    """Memory of the first is free when the last is made."""
    value = values(site)[name]
    for _ in range(6):
        value.data = 1.2 * value.data


def other_parameter(site: Any, name: str) -> None:
    owner, _, last = name.rpartition(".")
    old = values(site)[name]
    new = nn.Parameter(1.5 * old.detach())
    setattr(site.experts.get_submodule(owner), last, new)


def loaded(site: Any, name: str) -> None:
    state = site.experts.state_dict()
    site.experts.load_state_dict({**state, name: 1.5 * state[name]})


def loaded_by_assignment(site: Any, name: str) -> None:
    state = site.experts.state_dict()
    site.experts.load_state_dict({**state, name: 1.5 * state[name]}, assign=True)


def one_step(site: Any, name: str, kind: Any, **settings: Any) -> None:
    optimizer = kind([values(site)[name]], lr=0.1, **settings)
    site(X).square().sum().backward()
    optimizer.step()


def by_adamw(site: Any, name: str) -> None:
    one_step(site, name, torch.optim.AdamW)


def by_fused_adamw(site: Any, name: str) -> None:
    one_step(site, name, torch.optim.AdamW, fused=True)


def by_foreach_sgd(site: Any, name: str) -> None:
    one_step(site, name, torch.optim.SGD, foreach=True)


def by_what_counts_nothing(site: Any, name: str) -> None:
    """As kernels do that get a pointer; a forward with gradients went before."""
    site(X)
    values(site)[name].data.mul_(1.5)


def unseen_then_a_switch_of_mode(site: Any, name: str) -> None:
    values(site)[name].data.mul_(1.5)
    site.eval()


CHANGES = [
    in_place,
    in_inference_mode,
    through_an_alias,
    other_storage,
    storages_that_come_back,
    other_parameter,
    loaded,
    loaded_by_assignment,
    by_adamw,
    by_fused_adamw,
    by_foreach_sgd,
    by_what_counts_nothing,
    unseen_then_a_switch_of_mode,
]


@pytest.mark.parametrize(
    ("name", "change"),
    [*(("dora", change) for change in CHANGES), *((n, in_place) for n in KEEPING)],
)
def test_a_changed_parameter_is_seen(name: str, change: Any) -> None:
    for parameter in values(made(KEEPING[name])):
        site = made(KEEPING[name])
        before = once(site)
        change(site, parameter)
        after = once(site)
        assert off(after, fresh(site)) < 1e-12, parameter
        assert off(after, before) > 1e-4, parameter


def test_what_counts_nothing_is_seen_in_a_forward_of_its_own() -> None:
    site = made(DORA)
    once(site)
    with torch.no_grad():
        before = site(X)
        values(site)["magnitude"].data.mul_(1.5)
        after = site(X)
    assert off(after, fresh(site)) < 1e-12 < off(after, before)


def test_a_generation_makes_it_once(
    tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"target_modules": ["down_proj"], "experts": DORA}
    model: Any = molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(config))
    for site in sites(model).values():
        disturb(site)
    calls, ids = counted(monkeypatch), torch.tensor([[5, 9, 4]])
    given = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    first = model.generate(ids, attention_mask=ids > 0, **given)
    assert len(calls) == len(sites(model)) == 2
    for site in sites(model).values():
        values(site)["magnitude"].data.mul_(-3)
    second = model.generate(ids, attention_mask=ids > 0, **given)
    assert len(calls) == 4
    uncached = model.generate(ids, attention_mask=ids > 0, use_cache=False, **given)
    assert torch.equal(second, uncached) and not torch.equal(first, second)


def weight_in_place(site: Any) -> None:
    with torch.no_grad():
        site.base.weight.mul_(1.5)


def other_weight(site: Any) -> None:
    site.base.weight = nn.Parameter(1.5 * site.base.weight.detach())


def other_layer(site: Any) -> None:
    site.base = nn.Linear(10, 8).double()


@pytest.mark.parametrize("change", [weight_in_place, other_weight, other_layer])
def test_a_changed_base_is_seen(change: Callable[[Any], None]) -> None:
    site = made(DORA)
    before = once(site)
    change(site)
    assert off(once(site), fresh(site)) < 1e-12 < off(once(site), before)


@pytest.mark.parametrize("name", KEEPING)
def test_another_dtype_and_back(name: str) -> None:
    site = made(KEEPING[name])
    want = once(site)
    narrow = once(site.float(), X.float())
    assert narrow.dtype == torch.float32
    assert off(narrow, want) < 1e-5
    half = once(site.bfloat16(), X.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.equal(half, fresh(site, X.bfloat16()))
    again = once(site.double())
    # rounded to bf16 on the way
    assert torch.equal(again, fresh(site)) and off(again, want) > 1e-6


def test_tensors_of_another_layer_are_sources() -> None:
    model = nn.ModuleDict({"one": nn.Linear(10, 8), "two": nn.Linear(10, 8)})
    inner = {"kind": "superlora", "scope": "model", "r": 2}
    config = {"target_modules": ["one", "two"], "experts": {**DORA, "inner": inner}}
    molora.wrap(model, molora.AdapterConfig.from_dict(config)).double().eval()
    one, two = sites(model).values()
    disturb(one)
    before = once(two)
    with torch.no_grad():
        one.experts.inner.A1.mul_(5)
    assert off(once(two), fresh(two)) < 1e-12 < 1e-4 < off(once(two), before)


def test_modules_that_swap_their_parameters() -> None:
    site = made(DORA)
    want = once(site)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        assert off(once(site.float(), X.float()), want) < 1e-5
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_another_device() -> None:
    module = Keeping()
    module.value = nn.Parameter(torch.ones(3))
    with torch.no_grad():
        first = module.kept(lambda: 2 * module.value)
        assert module.kept(lambda: 2 * module.value) is first
        moved = module.to("meta").kept(lambda: 2 * module.value)
    assert moved.is_meta and not first.is_meta


def test_merge_and_unmerge() -> None:
    model = nn.ModuleDict({"lin": nn.Linear(10, 8)})
    config = {"target_modules": ["lin"], "experts": DORA, "router": {"kind": "none"}}
    molora.wrap(model, molora.AdapterConfig.from_dict(config)).double().eval()
    site = sites(model)["lin"]
    disturb(site)
    want = once(site)
    molora.merge(model)
    assert off(once(site), want) < 1e-9
    with torch.no_grad():
        # the experts by themselves read the weight as it was before
        x_TI = X @ torch.eye(10).double()
        plain = X @ site.base_weight().t() + site._bias_O()
        assert off(site.experts(x_TI, None, plain), want) < 1e-9
    molora.unmerge(model)
    assert torch.equal(once(site), want)
    with torch.no_grad():
        site.experts.magnitude.mul_(2)
    assert off(once(site), fresh(site)) < 1e-12
    molora.merge(model)
    assert off(once(site), fresh(site)) < 1e-9 < off(once(site), want)


def test_autocast_has_its_own() -> None:
    site = made({"kind": "dora", "inner": {"kind": "lokr", "r": 2}}).float()
    want = once(site, X.float())
    with torch.autocast("cpu", torch.bfloat16):
        narrow = once(site, X.float())
    assert torch.equal(once(site, X.float()), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(narrow, fresh(site, X.float()))
    assert off(narrow.double(), want.double()) > 1e-4


def test_inference_mode_and_back() -> None:
    """What was made in inference mode serves without gradients, and no others."""
    site = made(DORA)
    with torch.inference_mode():
        want = site(X).clone()
    assert torch.equal(once(site), want)
    x = X.clone().requires_grad_()
    y = site(x)
    y.sum().backward()
    assert x.grad is not None and torch.equal(y.detach(), want)


def test_parameters_of_inference_mode_have_no_version() -> None:
    with torch.inference_mode():
        site = made(DORA)
        before = site(X).clone()
        site.experts.magnitude.mul_(2)
        assert off(site(X), before) > 1e-4


def test_copies_hold_nothing() -> None:
    site = made(DORA)
    want = once(site)
    twin = copy.deepcopy(site)
    with torch.no_grad():
        twin.experts.magnitude.mul_(2)
    assert off(once(twin), want) > 1e-4 and torch.equal(once(site), want)
    held = site.experts._kept
    assert held._known is not None
    assert copy.deepcopy(held)._known is None


def test_nothing_is_kept_alive() -> None:
    """A weight that was moved away must be free to go."""
    site = made(DORA)
    once(site)
    held = {n: weakref.ref(p.untyped_storage()) for n, p in site.named_parameters()}
    site.to("meta")
    assert [name for name, storage in held.items() if storage() is not None] == []


def test_a_compiled_layer_sees_changes() -> None:
    site = made(DORA)
    torch._dynamo.reset()
    compiled = torch.compile(site, backend="eager", fullgraph=True)
    assert off(once(compiled), once(site)) < 1e-12
    with torch.no_grad():
        for value in site.experts.parameters():
            value.mul_(1.5)
    assert off(once(compiled), fresh(site)) < 1e-12
    assert off(once(site), fresh(site)) < 1e-12


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_a_quantised_weight_is_not_read_again(
    bits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"lin": quantised_layer(bits, torch.randn(64, 128) / 8)})
    config = {"target_modules": ["lin"], "experts": DORA, "router": {"kind": "none"}}
    molora.wrap(model, molora.AdapterConfig.from_dict(config)).eval()
    site = sites(model)["lin"]
    disturb(site)
    x = torch.randn(2, 128)
    reads: list[int] = []
    real = site.experts.frozen_weight
    site.experts.frozen_weight = lambda: (reads.append(1), real())[1]
    first, second = once(site, x), once(site, x)
    assert torch.equal(first, second) and len(reads) == 1
    scale = site.experts.frozen_sources()[1]
    with torch.no_grad():
        scale.mul_(2)
    assert off(once(site, x).double(), first.double()) > 1e-3 and len(reads) == 2
