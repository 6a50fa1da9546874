"""LoRA banks: one expert equals PEFT, initialisation, ranks, scales, dropout, seeds."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import molora
from molora.experts import LoRAExperts
from molora.model import adapter_parameters, sites

Factory = Callable[..., PreTrainedModel]
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
}


def config(**experts: Any) -> molora.AdapterConfig:
    targets = experts.pop("targets", ["q_proj", "up_proj"])
    router = experts.pop("router", {"kind": "none"})
    raw = {
        "target_modules": targets,
        "experts": {"kind": "lora", **experts},
        "router": router,
    }
    return molora.AdapterConfig.from_dict(raw)


def bank(
    E: int = 3, wide: int = 24, out: int = 16, seed: int = 0, **kw: Any
) -> LoRAExperts:
    generator = torch.Generator().manual_seed(seed)
    settings = LoRAExperts.Config(num_experts=E, **kw)
    return LoRAExperts(
        settings, in_features=wide, out_features=out, generator=generator
    )


def peft_twin(
    ours: Any, base: PreTrainedModel, **settings: Any
) -> tuple[Any, dict[str, tuple[Tensor, Tensor]]]:
    """The same adapter in PEFT; its (A, B) by our site's path."""
    theirs = peft.get_peft_model(base, peft.LoraConfig(**settings))
    factors = {}
    for path, site in sites(ours).items():
        layer: Any = theirs.base_model.model.get_submodule(path)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            A.copy_(site.experts.A[0])  # type: ignore[union-attr, index]
            B.copy_(site.experts.Bt[0].t())  # type: ignore[union-attr, index]
        factors[path] = (A, B)
    return theirs, factors


def differences(ours: Any, factors: Any, grad: bool) -> float:
    """Largest difference of parameters or their gradients over all sites."""
    worst = 0.0
    for path, site in sites(ours).items():
        A, B = (f.grad if grad else f for f in factors[path])
        experts: Any = site.experts
        a, bt = (experts.A.grad, experts.Bt.grad) if grad else (experts.A, experts.Bt)
        worst = max(worst, float((a[0] - A).detach().abs().max()))
        worst = max(worst, float((bt[0].t() - B).detach().abs().max()))
    return worst


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_expert_trains_exactly_as_peft_does(
    kind: str, rslora: bool, tiny_llama: Factory, tiny_gpt2: Factory
) -> None:
    make = {"llama": tiny_llama, "gpt2": tiny_gpt2}[kind]
    ours: Any = molora.wrap(
        make(), config(r=4, lora_alpha=12.0, use_rslora=rslora, targets=TARGETS[kind])
    )
    g = torch.Generator().manual_seed(1)
    for name, p in adapter_parameters(ours).items():
        if name.endswith("Bt"):
            p.data.normal_(0, 0.1, generator=g)
    # every targeted layer has no bias in Llama; GPT-2's Conv1D stores [in, out]
    theirs, factors = peft_twin(
        ours,
        make(),
        r=4,
        lora_alpha=12,
        use_rslora=rslora,
        target_modules=TARGETS[kind],
        fan_in_fan_out=kind == "gpt2",
    )
    assert len(factors) == 2 * len(TARGETS[kind]) + (2 if kind == "gpt2" else 0)
    ids = torch.randint(3, 128, (3, 12), generator=g)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    optimisers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3)
        for m in (ours, theirs)
    ]
    for _ in range(5):
        outs = []
        for model, optimiser in zip((ours, theirs), optimisers, strict=True):
            optimiser.zero_grad()
            out = model(input_ids=ids, attention_mask=mask, labels=ids)
            out.loss.backward()
            outs.append(out.logits.detach())
        assert (outs[0] - outs[1]).abs().max() <= 5e-6
        assert differences(ours, factors, grad=True) <= 5e-6
        for optimiser in optimisers:
            optimiser.step()
        assert differences(ours, factors, grad=False) <= 5e-6
    # the steps did something
    start = make()(input_ids=ids, attention_mask=mask).logits
    assert (outs[0] - start).abs().max() > 1e-2


def test_initial_values_are_drawn_per_expert_with_the_fan_in_of_one() -> None:
    experts = bank(E=64, wide=100, r=8)
    # Kaiming with a = sqrt(5) over I inputs: U(-1/sqrt(I), 1/sqrt(I))
    reference = torch.nn.Linear(100, 8 * 64, bias=False)
    torch.nn.init.kaiming_uniform_(reference.weight, a=5**0.5)
    bound = float(reference.weight.detach().abs().max())
    assert bound == pytest.approx(0.1, rel=1e-3)
    by_expert = experts.A.detach().abs().amax((1, 2))
    assert by_expert.max() <= 0.1
    assert by_expert.min() >= 0.097
    assert experts.A.detach().std() == pytest.approx(0.1 / 3**0.5, rel=0.01)
    assert not torch.equal(experts.A[0], experts.A[1])
    assert torch.equal(experts.Bt, torch.zeros(64, 8, 16))


def test_peft_draws_from_the_same_range(tiny_llama: Factory) -> None:
    theirs = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(r=16, target_modules=["q_proj"])
    )
    layer: Any = theirs.base_model.model.get_submodule(
        "model.layers.0.self_attn.q_proj"
    )
    ours = molora.wrap(tiny_llama(), config(r=16))
    site: Any = sites(ours)["model.layers.0.self_attn.q_proj"]
    a = layer.lora_A["default"].weight.detach().abs()
    b = site.experts.A.detach().abs()
    assert a.max() == pytest.approx(b.max().item(), rel=0.02)
    assert a.mean() == pytest.approx(b.mean().item(), rel=0.1)


def init(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in adapter_parameters(model).items()}


def test_wrap_draws_from_the_seed_and_the_path_alone(tiny_llama: Factory) -> None:
    soft: dict[str, Any] = {"num_experts": 3, "router": {"kind": "soft"}}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = init(molora.wrap(tiny_llama(), config(**soft), seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again = init(molora.wrap(tiny_llama(), config(**soft), seed=1))
    other = init(molora.wrap(tiny_llama(), config(**soft), seed=2))
    wide = ["k_proj", "q_proj", "up_proj", "down_proj"]
    more = init(molora.wrap(tiny_llama(), config(targets=wide, **soft), seed=1))
    deep = init(molora.wrap(tiny_llama(num_hidden_layers=3), config(**soft), seed=1))
    assert len(more) > len(first)
    assert len(first) == 2 * 2 * 3
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, more[name])
        assert torch.equal(value, deep[name])
        if not name.endswith("Bt"):
            assert not torch.equal(value, other[name])
    a = [v for n, v in first.items() if n.endswith("q_proj.experts.A")]
    assert not torch.equal(a[0], a[1])


def test_scales_ranks_and_counts() -> None:
    plain = bank(E=2, r=4, lora_alpha=6.0)
    assert plain.scales() == [1.5, 1.5]
    assert bank(E=2, r=4, lora_alpha=6.0, use_rslora=True).scales() == [3.0, 3.0]
    mixed = bank(E=3, r=[1, 4, 2], lora_alpha=[1.0, 2.0, 3.0])
    assert mixed.scales() == [1.0, 0.5, 1.5]
    assert plain.count() == 2 * 4 * (24 + 16)
    assert mixed.count() == (1 + 4 + 2) * (24 + 16)
    assert bank(E=5, r=4, shared=["A"]).count() == 4 * 24 + 5 * 4 * 16
    assert bank(E=5, r=4, shared=["B"]).count() == 5 * 4 * 24 + 4 * 16


def test_delta_weight_and_factors_of_each_expert() -> None:
    for shared in ([], ["A"], ["B"]):
        experts = bank(E=3, r=4, lora_alpha=[1.0, 2.0, 3.0], shared=shared)
        torch.nn.init.normal_(experts.Bt)
        for e in range(3):
            a = experts.A[0 if shared == ["A"] else e]
            b = experts.Bt[0 if shared == ["B"] else e]
            want = (e + 1) / 4 * torch.einsum("ro,ri->oi", b, a)
            assert torch.allclose(experts.delta_weight(e), want, atol=1e-6)
            factor_a, factor_b = experts.expert_factors(e)
            assert torch.allclose(factor_b.t() @ factor_a, want, atol=1e-6)
            assert not factor_a.requires_grad


def test_padding_ranks_stay_zero_under_training() -> None:
    experts = bank(E=3, r=[1, 4, 2], lora_alpha=[1.0, 2.0, 3.0]).train()
    optimiser = torch.optim.AdamW(experts.parameters(), lr=0.1, weight_decay=0.1)
    g = torch.Generator().manual_seed(0)
    for _ in range(4):
        x = torch.randn(20, 24, generator=g)
        gates = torch.softmax(torch.randn(20, 3, generator=g), -1)
        y = experts(x, gates, torch.randn(20, 16, generator=g))
        y.square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    for e, rank in enumerate([1, 4, 2]):
        assert experts.A[e, rank:].abs().sum() == 0
        assert experts.Bt[e, rank:].abs().sum() == 0
        assert experts.Bt[e, :rank].abs().min() > 0


def test_dropout_is_one_mask_for_all_experts_and_off_in_eval() -> None:
    experts = bank(E=2, wide=200, out=200, r=200, lora_alpha=200.0, lora_dropout=0.25)
    with torch.no_grad():
        # two experts that copy their input
        experts.A.copy_(torch.eye(200))
        experts.Bt.copy_(torch.eye(200))
    x = torch.ones(50, 200)
    ones = torch.ones(50, 2)
    base = torch.zeros(50, 200)
    experts.eval()
    assert torch.equal(experts(x, ones, base), torch.full((50, 200), 2.0))
    experts.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        y = experts(x, ones, base).detach()
    # with a mask for each expert some values would be 4/3
    assert torch.allclose(y.unique(), torch.tensor([0.0, 2 / 0.75]))
    assert (y == 0).float().mean() == pytest.approx(0.25, abs=0.02)


def test_dropout_reaches_the_bank_and_not_the_router() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(30, 20))
    settings = {"num_experts": 3, "lora_dropout": 0.5, "router": {"kind": "soft"}}
    molora.wrap(layer, config(targets=["0"], **settings)).train()
    site: Any = sites(layer)["0"]
    site.experts.Bt.data.normal_(generator=generator)
    x = torch.randn(6, 30, generator=generator)
    with molora.record_routing(layer) as trace, torch.random.fork_rng(devices=[]):
        assert not torch.equal(layer(x), layer(x))
    first, second = trace.sites["0"].gates
    assert torch.equal(first, second)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_scales_survive_a_cast_of_the_model() -> None:
    experts = bank(E=3, r=3, lora_alpha=[1.0, 2.0, 0.7])
    exact = [1.0 / 3, 2.0 / 3, 0.7 / 3]
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        experts.to(dtype)
        assert experts.scales() == pytest.approx(exact, rel=1e-7)
    assert experts.to(torch.float64).scales() == exact
    assert "scale_E" not in experts.state_dict()


@pytest.mark.parametrize("shared", [[], ["A"], ["B"]])
def test_the_update_is_zero_at_the_start_and_trains(shared: list[Any]) -> None:
    experts = bank(E=3, r=2, shared=shared)
    g = torch.Generator().manual_seed(0)
    x, base = torch.randn(9, 24, generator=g), torch.randn(9, 16, generator=g)
    y = experts(x, torch.full((9, 3), 1 / 3), base)
    assert torch.equal(y, base)
    y.square().sum().backward()
    assert experts.Bt.grad is not None and experts.Bt.grad.abs().min() > 0
