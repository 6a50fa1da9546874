"""Layers of a block that read one tensor share a shrink: exact, and only then."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import molora
from molora.errors import ConfigError
from molora.kernels import expand, lowrank_mixture, reference, shrink
from molora.model import adapter_parameters, sites

Factory = Callable[..., PreTrainedModel]
MODES = {"eager": None, "reentrant": True, "non-reentrant": False}


def build(make: Factory, dropout: float = 0.0) -> Any:
    raw = {
        "target_modules": "all-linear",
        "experts": {"kind": "lora", "num_experts": 4, "r": 2, "lora_dropout": dropout},
        "router": {"kind": "topk", "scope": "block"},
    }
    model: Any = molora.wrap(make(), molora.AdapterConfig.from_dict(raw)).double()
    g = torch.Generator().manual_seed(3)
    for name, p in adapter_parameters(model).items():
        p.data.normal_(0, 1.0 if "router" in name else 0.3, generator=g)
    return model


def ids(seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (2, 5), generator=torch.Generator().manual_seed(seed))


def step(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids(), labels=ids()).loss.backward()
    return {n: p.grad.clone() for n, p in adapter_parameters(model).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    # Llama's norms round to float32
    return all((a[n] - b[n]).abs().max() <= 1e-6 * (1 + b[n].abs().max()) for n in b)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of layers that shared a shrink, call by call."""
    calls: list[int] = []

    def counted(x: Tensor, factors: Any) -> Any:
        calls.append(len(factors))
        return shrink(x, factors)

    monkeypatch.setattr("molora.shared_shrink.shrink", counted)
    return calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_expert", [False, True])
def test_it_is_the_definition(dtype: torch.dtype, per_expert: bool) -> None:
    """Against the float64 definition of each linear, gradients included."""
    g = torch.Generator().manual_seed(1)
    T, wide, E, K = 7, 12, 4, 2

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    sizes = [(3, 8), (2, 5), (3, 9)]
    x, gates = draw(T, wide), draw(T, E).softmax(-1)
    gates = gates * torch.zeros(T, E).scatter(1, gates.topk(K).indices, 1.0)
    As = [draw(E, r, wide) for r, _ in sizes]
    Bts = [draw(E, r, out) for r, out in sizes]
    bases, c = [draw(T, out) for _, out in sizes], [draw(T, out) for _, out in sizes]
    scale: Any = torch.tensor([0.5, 1.0, 2.0, 3.0]).double() if per_expert else 1.5

    def run(dtype: torch.dtype, ours: bool) -> list[Tensor]:
        factor = torch.float32 if dtype == torch.bfloat16 else dtype
        leaves = [t.detach().to(factor).clone().requires_grad_() for t in (*As, *Bts)]
        a, b = leaves[:3], leaves[3:]
        v = x.to(dtype).clone().requires_grad_()
        w = gates.to(factor).clone().requires_grad_()
        base = [t.to(dtype) for t in bases]
        if ours:
            z = shrink(v, a)
            ys = [
                expand(zi, bi, w, scale if per_expert else float(scale), yi)
                for zi, bi, yi in zip(z, b, base, strict=True)
            ]
        else:
            ys = [
                reference(v, ai, bi, w, scale, yi)
                for ai, bi, yi in zip(a, b, base, strict=True)
            ]
        torch.autograd.backward(ys, [t.to(y.dtype) for t, y in zip(c, ys, strict=True)])
        found = [*ys, v.grad, w.grad, *(p.grad for p in leaves)]
        return [t.detach().double() for t in found if t is not None]

    want = run(torch.float64, ours=False)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
    for got, right in zip(run(dtype, ours=True), want, strict=True):
        assert (got - right).abs().max() <= tolerance[dtype] * (1 + right.abs().max())


def test_factors_that_do_not_fit_are_refused() -> None:
    x = torch.zeros(3, 4)
    with pytest.raises(ConfigError, match="they must agree"):
        shrink(x, [torch.zeros(2, 1, 4), torch.zeros(2, 1, 5)])
    with pytest.raises(ConfigError, match="they must agree"):
        shrink(x, [torch.zeros(2, 1, 4), torch.zeros(2, 1, 4).double()])


@pytest.mark.parametrize("mode", list(MODES))
def test_training_is_that_of_each_layer_by_itself(
    mode: str, tiny_llama: Factory, shared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(tiny_llama).train()
    if MODES[mode] is not None:
        model.activation_checkpointing_enable({"use_reentrant": MODES[mode]})
    first = step(model)
    # the first forward notes who reads what, and its recomputation does the same
    assert shared == []
    second = step(model)
    layers = 2 * (1 if mode == "eager" else 2)
    assert sorted(shared) == [2] * layers + [3] * layers
    assert same(second, first)
    monkeypatch.setattr("molora.shared_shrink.update", lambda *args: None)
    assert same(step(model), first) and len(shared) == 2 * layers


def test_inference_and_decoding(tiny_llama: Factory, shared: list[int]) -> None:
    model = build(tiny_llama).eval()
    with torch.no_grad():
        first = model(ids()).logits
        assert torch.allclose(model(ids()).logits, first, atol=1e-10)
        assert sorted(shared) == [2, 2, 3, 3]
        out = model(ids()[:, :4], use_cache=True)
        out = model(ids()[:, 4:], past_key_values=out.past_key_values)
        assert torch.allclose(out.logits[:, 0], first[:, -1], atol=1e-10)


def test_a_layer_that_reads_another_tensor_computes_its_own(
    tiny_llama: Factory, shared: list[int]
) -> None:
    model = build(tiny_llama).eval()
    attention = model.model.layers[0].self_attn
    found = sites(model)
    with torch.no_grad():
        model(ids())
        model(ids())
        before = len(shared)
        hook = attention.k_proj.register_forward_pre_hook(lambda m, a: (a[0] * 2,))
        seen: dict[str, Tensor] = {}
        attention.k_proj.register_forward_hook(lambda m, a, y: seen.update(x=a[0], y=y))
        with molora.record_routing(model) as trace:
            model(ids())
        path = "model.layers.0.self_attn.k_proj"
        gates = trace.sites[path].gates[0].double().flatten(0, 1)
        A, Bt, scale = found[path].experts.factors()  # type: ignore[operator]
        x = seen["x"].flatten(0, 1)
        want = lowrank_mixture(x, A, Bt, gates, scale, found[path].base(x))
        # recorded gates are float32
        assert (seen["y"].flatten(0, 1) - want).abs().max() < 1e-5
        # and from then on it is left out
        model(ids())
        hook.remove()
        assert sorted(shared[before + 4 :]) == [2, 2, 2, 3]


def test_masks_of_dropout_are_not_shared(
    tiny_llama: Factory, shared: list[int]
) -> None:
    model = build(tiny_llama, dropout=0.3).train()
    step(model)
    step(model)
    assert shared == []
    with torch.no_grad():
        model.eval()(ids())
    assert len(shared) == 4
