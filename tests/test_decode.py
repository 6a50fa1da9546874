"""One decoded token by the short way equals the long one, and what is left to that."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import molora
from molora import layer as layer_module
from molora.decode import short_way
from molora.errors import RoutingError
from molora.experts.lora import LoRAExperts
from molora.layer import MoloraLinear
from molora.model import sites
from tests.conftest import Factory

LORA = {"kind": "lora", "num_experts": 5, "r": 4, "lora_alpha": 6}


def wrapped(
    tiny_llama: Factory, router: Any = None, dtype: Any = torch.float64, **experts: Any
) -> Any:
    raw = {"target_modules": "all-linear", "experts": {**LORA, **experts}}
    if raw["experts"]["num_experts"] > 1:
        raw["router"] = {"kind": "topk", "top_k": 2, **(router or {})}
    model = molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(raw)).to(dtype)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("Bt") or "gate.weight" in name:
            parameter.data.normal_()
    return model.eval()


def site_of(model: Any, name: str = "up_proj") -> MoloraLinear:
    site = model.model.layers[0].mlp.get_submodule(name)
    assert isinstance(site, MoloraLinear)
    return site


def token(model: Any, dtype: Any = torch.float64) -> Tensor:
    width = site_of(model).in_features
    return torch.randn(1, 1, width, generator=torch.Generator().manual_seed(3)).to(
        dtype
    )


def by_hand(site: MoloraLinear, x: Tensor, top_k: int, kept: bool) -> Tensor:
    """The layer's output from its parameters: the definition in float64."""
    experts: Any = site.experts
    x = x.double().view(-1)
    y = site.base.weight.double() @ x  # type: ignore[operator]
    gates = torch.ones(1, dtype=torch.float64)
    if site.router is not None:
        heat = site.router.config.temperature  # type: ignore[attr-defined]
        logits = site.router.gate.weight.double() @ x / heat  # type: ignore[union-attr, operator]
        probs = logits.softmax(0)
        gates = torch.where(probs >= probs.sort().values[-top_k], probs, 0.0)
        gates = gates / gates.sum() if kept else gates
    for e, gate in enumerate(gates):
        a = experts.A[e % len(experts.A)].double()
        b = experts.Bt[e % len(experts.Bt)].double()
        y = y + gate * experts.config.scales()[0] * (b.t() @ (a @ x))
    return y


@pytest.mark.parametrize(
    ("router", "experts"),
    [
        ({}, {}),
        ({"top_k": 1, "renormalize": False}, {}),
        ({"top_k": 3, "renormalize": False, "temperature": 0.7}, {}),
        ({"top_k": 5, "temperature": 2.0}, {}),
        ({}, {"shared": ["A"]}),
        ({}, {"shared": ["B"], "use_rslora": True}),
        ({}, {"trainability": {"A": "frozen"}}),
        ({}, {"num_experts": 1}),
    ],
)
def test_equals_the_definition(tiny_llama: Factory, router: Any, experts: Any) -> None:
    model = wrapped(tiny_llama, router, **experts)
    site, x = site_of(model), token(model)
    with torch.no_grad():
        y = short_way(site, x)
    wanted = by_hand(site, x, router.get("top_k", 2), router.get("renormalize", True))
    assert y is not None and y.shape == (1, 1, site.out_features)
    torch.testing.assert_close(y.view(-1), wanted, rtol=1e-9, atol=1e-9)
    # the long way, which several tokens take
    with torch.no_grad():
        both = site(torch.cat([x, -x], 1))
    torch.testing.assert_close(both[:, :1], y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(tiny_llama: Factory, dtype: Any) -> None:
    model = wrapped(tiny_llama, dtype=torch.float32)
    for site in sites(model).values():
        site.base.to(dtype)
    site, x = site_of(model), token(model, torch.float32).to(dtype)
    with torch.no_grad():
        y = short_way(site, x)
        base = site.base(x).double().view(-1)
        exact = by_hand(site, x, 2, True)
        # the definition from the base output as the model has it
        exact += base - site.base.weight.double() @ x.double().view(-1)  # type: ignore[operator]
        long = site(torch.cat([x, x], 1))[:, :1]
    assert y is not None and y.dtype == dtype
    rounded_once = (exact.to(dtype) - exact).norm()
    assert (y.view(-1) - exact).norm() <= 1.01 * rounded_once
    torch.testing.assert_close(y, long)


def test_generation_with_a_cache_takes_it(
    tiny_llama: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, taken = wrapped(tiny_llama), []

    def noted(site: MoloraLinear, x: Tensor) -> Tensor | None:
        y = short_way(site, x)
        taken.append(y is not None)
        return y

    monkeypatch.setattr(layer_module, "short_way", noted)
    ids = torch.tensor([[5, 17, 33, 9]])
    given = {"max_new_tokens": 6, "do_sample": False, "attention_mask": ids > 0}
    cached = model.generate(ids, **given)
    assert sum(taken) == 5 * 14 and taken.count(False) == 14
    assert torch.equal(cached, model.generate(ids, use_cache=False, **given))


@pytest.mark.parametrize(
    "experts",
    [
        {"r": [2, 3, 4, 4, 4]},
        {"trainability": {"B": "masked"}, "density": 0.5},
        {"trainability": {"A": "seeded"}},
        {"kind": "loha", "lora_alpha": None},
        {"kind": "dora", "lora_alpha": None, "r": None, "inner": {"kind": "lora"}},
    ],
)
def test_other_experts_are_left_to_forward(tiny_llama: Factory, experts: Any) -> None:
    changed = {**LORA, **experts}
    settings = {key: value for key, value in changed.items() if value is not None}
    raw = {"target_modules": ["up_proj"], "experts": settings}
    raw["router"] = {"kind": "topk", "top_k": 2}
    model = molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(raw)).eval()
    site = site_of(model)
    with torch.no_grad():
        assert short_way(site, token(model, torch.float32)) is None


@pytest.mark.parametrize(
    "router",
    [{"kind": "soft"}, {"kind": "topp"}, {"scope": "block"}, {"input": "sequence"}],
)
def test_other_routers_are_left_to_forward(tiny_llama: Factory, router: Any) -> None:
    raw = {
        "target_modules": "all-linear",
        "experts": LORA,
        "router": router if "kind" in router else {"kind": "topk", **router},
    }
    model = molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(raw)).eval()
    with torch.no_grad():
        assert short_way(site_of(model), token(model, torch.float32)) is None


def test_what_a_call_asks_for_is_left_to_forward(tiny_llama: Factory) -> None:
    model = wrapped(tiny_llama, dtype=torch.float32)
    site, x = site_of(model), token(model, torch.float32)

    def left() -> bool:
        with torch.no_grad():
            return short_way(site, x) is None

    assert not left()
    with molora.disabled(model):
        assert left()
    with molora.record_routing(model):
        assert left()
    with torch.autocast("cpu", torch.bfloat16):
        assert left()
    model.train()
    assert left()
    model.eval()
    for module in (site.experts, site.router, site.router.gate):  # type: ignore[union-attr]
        hook = module.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
        assert left()
        hook.remove()
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert left()
    everywhere.remove()
    with torch.no_grad():
        # the base layer is in float32
        assert short_way(site, x.bfloat16()) is None
        assert short_way(site, torch.cat([x, x], 1)) is None
    assert not left()


def test_what_is_set_afterwards_is_seen(tiny_llama: Factory) -> None:
    model = wrapped(tiny_llama, dtype=torch.float32, lora_dropout=0.5)
    site, x = site_of(model), token(model, torch.float32)
    router: Any = site.router
    experts: Any = site.experts
    with torch.no_grad():
        assert short_way(site, x) is not None
        for module in (experts, router):
            module.train()
            assert short_way(site, x) is None
            module.eval()
        experts.scale = 0.0
        torch.testing.assert_close(site(x), site.base(x))
        experts.scale = 1.5
        long = site(torch.cat([x, x], 1))
        torch.testing.assert_close(site(x), long[:, :1])
        nn.utils.parametrizations.weight_norm(router.gate)
        assert short_way(site, x) is None


def test_a_family_that_derives_from_lora_is_left_to_forward() -> None:
    class Twice(LoRAExperts):
        """A family of one's own."""

        def own(self) -> Any:
            A, Bt, scale = super().own()
            return 2 * A, Bt, scale

    config = Twice.Config(kind="lora", r=2)
    generator = torch.Generator()
    made = Twice(config, in_features=4, out_features=3, generator=generator)
    assert made.plain_scale() is None


def test_a_copy_decodes_by_itself(tiny_llama: Factory) -> None:
    model = wrapped(tiny_llama, dtype=torch.float32)
    site, x = site_of(model), token(model, torch.float32)
    with torch.no_grad():
        before = site(x)
        twin = copy.deepcopy(site)
        twin.experts.Bt.zero_()  # type: ignore[operator, union-attr]
        assert torch.equal(site(x), before)
        torch.testing.assert_close(twin(x), site.base(x))


def test_recorded_routing_is_that_of_the_short_way(tiny_llama: Factory) -> None:
    model = wrapped(tiny_llama, dtype=torch.float32)
    site, x = site_of(model), token(model, torch.float32)
    with torch.no_grad():
        short = site(x)
        with molora.record_routing(model):
            long = site(x)
    torch.testing.assert_close(short, long)


def test_a_tie_is_left_to_forward_and_a_bad_input_is_refused(
    tiny_llama: Factory,
) -> None:
    model = wrapped(tiny_llama, dtype=torch.float32)
    site, x = site_of(model), token(model, torch.float32)
    with torch.no_grad():
        assert short_way(site, torch.zeros_like(x)) is None
        with pytest.raises(RoutingError, match="up_proj.*not finite"):
            site(x * torch.nan)


def test_other_experts_in_the_same_layer_are_seen(tiny_llama: Factory) -> None:
    model = wrapped(tiny_llama, dtype=torch.float32)
    site, x = site_of(model), token(model, torch.float32)
    with torch.no_grad():
        before = site(x)
        site.experts.A.copy_(-site.experts.A)  # type: ignore[operator, arg-type]
        base = site.base(x)
        torch.testing.assert_close(site(x) - base, base - before)
        molora.grow(model)
        assert site.plan is None or site.plan.experts is not site.experts
        site(x)
        assert site.plan is not None and site.plan.experts is site.experts
    molora.collapse(model, method="linear")
    with torch.no_grad():
        y = site(x)
        assert site.plan is not None and site.plan.choose is None
        molora.merge(model)
        merged = site(x)
    torch.testing.assert_close(y, merged, rtol=1e-4, atol=1e-4)
