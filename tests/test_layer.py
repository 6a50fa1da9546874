"""One wrapped layer: shapes, dtypes, gradients, merging into the base weight."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import molora
from molora.context import ForwardContext
from molora.errors import RoutingError, WrapError
from molora.model import adapter_parameters, sites

WIDE, OUT = 12, 10


def site(
    kind: str = "topk",
    base: str = "linear",
    E: int = 4,
    dtype: torch.dtype = torch.float32,
    **kw: Any,
) -> Any:
    """A layer inside a wrapped model, with random values everywhere."""
    g = torch.Generator().manual_seed(0)
    layer = nn.Linear(WIDE, OUT) if base == "linear" else Conv1D(OUT, WIDE)
    for p in layer.parameters():
        p.data.normal_(0, 0.3, generator=g)
    raw = {
        "target_modules": ["0"],
        "experts": {"kind": "lora", "num_experts": E, "r": 3, "lora_alpha": 6.0} | kw,
        "router": {"kind": kind if E > 1 else "none"},
    }
    model = nn.Sequential(layer.to(dtype))
    molora.wrap(model, molora.AdapterConfig.from_dict(raw))
    for p in adapter_parameters(model).values():
        p.data.normal_(0, 0.5, generator=g)
    return sites(model)["0"]


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, WIDE, generator=torch.Generator().manual_seed(seed))


def expected(layer: Any, x: Tensor) -> Tensor:
    """The layer in float64, expert by expert, from its parameters alone."""
    W = layer.base.weight.double()
    W = W.t() if isinstance(layer.base, Conv1D) else W
    flat = x.double().reshape(-1, WIDE)
    y = flat @ W.t() + layer.base.bias.double()
    E = layer.experts.A.shape[0]
    g = torch.ones(len(flat), 1).double()
    if E > 1:
        g = torch.softmax(flat @ layer.router.gate.weight.double().t(), -1)
        if type(layer.router).__name__ == "TopKRouter":
            g = g * torch.zeros_like(g).scatter(-1, g.topk(2).indices, 1.0)
            g = g / g.sum(-1, keepdim=True)
    for e in range(E):
        A, Bt = layer.experts.A[e].double(), layer.experts.Bt[e].double()
        y = y + g[:, e : e + 1] * 2.0 * (flat @ A.t() @ Bt)
    return y.view(*x.shape[:-1], OUT)


@pytest.mark.parametrize("base", ["linear", "conv1d"])
@pytest.mark.parametrize(("kind", "E"), [("topk", 4), ("soft", 4), ("none", 1)])
def test_output_and_gradients_against_float64(base: str, kind: str, E: int) -> None:
    layer = site(kind, base, E)
    x = inputs(3, 5).requires_grad_()
    layer(x).square().sum().backward()
    got = {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}
    twin = site(kind, base, E).double()
    x64 = x.detach().double().requires_grad_()
    y64 = expected(twin, x64)
    assert (layer(x).double() - y64).abs().max() < 1e-4
    y64.square().sum().backward()
    want = {n: p.grad for n, p in twin.named_parameters() if p.requires_grad}
    assert len(got) == (3 if E > 1 else 2)
    assert got.keys() == want.keys()
    for name, grad in [*got.items(), ("x", x.grad)]:
        exact = x64.grad if name == "x" else want[name]
        assert grad is not None and exact is not None
        assert (grad.double() - exact).abs().max() < 1e-5 * exact.abs().max(), name
    assert layer.base.weight.grad is None


SHAPES: list[tuple[int, ...]] = [
    (),
    (1,),
    (7,),
    (2, 3),
    (2, 3, 2),
    (0,),
    (2, 0),
    (1, 1),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("E", [1, 4])
def test_inputs_of_any_shape(shape: tuple[int, ...], E: int) -> None:
    layer = site(E=E).train()
    x = inputs(*shape).requires_grad_()
    y = layer(x)
    assert y.shape == (*shape, OUT)
    assert torch.allclose(y.double(), expected(layer, x), atol=1e-5)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    for name, p in layer.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            assert torch.isfinite(p.grad).all()
            assert 0 not in shape or p.grad.abs().sum() == 0


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda x: x[:1].expand(3, -1, -1),
    "sliced": lambda x: torch.cat([x, x], -1)[..., :WIDE],
    "flipped": lambda x: torch.stack([x, x], -1)[..., 0],
}


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("E", [1, 4])
def test_inputs_of_any_strides_are_left_as_they_are(stride: str, E: int) -> None:
    layer = site(E=E)
    x = STRIDES[stride](inputs(3, 5))
    assert not x.is_contiguous()
    before = x.clone()
    y = layer(x)
    assert torch.equal(x, before)
    # the products may take another path through the matrix library
    assert torch.allclose(y, layer(before), atol=1e-5)


@pytest.mark.parametrize("E", [1, 4])
def test_half_precision_base_with_float32_experts(E: int) -> None:
    layer = site(E=E, dtype=torch.bfloat16)
    assert layer.base.weight.dtype == torch.bfloat16
    assert {p.dtype for p in adapter_of(layer)} == {torch.float32}
    x = inputs(9, 8).bfloat16().requires_grad_()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    exact = expected(layer, x)
    assert (y.double() - exact).norm() < 2**-7 * exact.norm()
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert {p.grad.dtype for p in adapter_of(layer)} == {torch.float32}


def adapter_of(layer: Any) -> list[Any]:
    return [p for p in layer.parameters() if p.requires_grad]


def test_autocast_and_inference_mode() -> None:
    layer = site()
    x = inputs(9, 8)
    exact = expected(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).norm() < 2**-6 * exact.norm()
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in adapter_of(layer))


def test_an_expert_nobody_chose_has_a_zero_gradient() -> None:
    layer = site("topk").train()
    with torch.no_grad():
        # expert 3 is never among the two likeliest of a positive input
        layer.router.gate.weight[3] = -10.0
    layer(inputs(6).abs()).sum().backward()
    for factor in (layer.experts.A, layer.experts.Bt):
        assert factor.grad is not None
        assert torch.equal(factor.grad[3], torch.zeros_like(factor[3]))
        assert factor.grad[:3].abs().sum() > 0


def test_it_shows_the_base_layer_to_code_that_looks_for_it() -> None:
    layer = site()
    assert layer.weight is layer.base.weight
    assert layer.bias is layer.base.bias
    assert (layer.in_features, layer.out_features) == (WIDE, OUT)
    conv = site(base="conv1d")
    assert (conv.in_features, conv.out_features) == (WIDE, OUT)


@pytest.mark.parametrize("base", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_folds_and_unmerge_restores_the_bytes(
    base: str, dtype: torch.dtype
) -> None:
    layer = site(base=base, E=1, dtype=dtype)
    before = layer.base.weight.detach().clone()
    x = inputs(20).to(dtype)
    y = layer(x)
    delta = layer.experts.delta_weight(0)
    layer.merge()
    assert layer.merged
    assert torch.equal(layer.base_weight(), before)
    folded = before.float() + (delta.t() if base == "conv1d" else delta)
    assert torch.equal(layer.base.weight, folded.to(dtype))
    eps = torch.finfo(dtype).eps
    assert (layer(x) - y).float().norm() < 3 * eps * y.float().norm() + 1e-5
    layer.unmerge()
    assert not layer.merged
    assert torch.equal(layer.base.weight.view(torch.uint8), before.view(torch.uint8))
    assert torch.equal(layer(x), y)


def test_several_experts_have_no_single_update() -> None:
    layer = site()
    with pytest.raises(WrapError, match="routes among 4 experts .*molora.collapse"):
        layer.merge()
    assert not layer.merged


def test_a_merge_that_overflows_is_refused() -> None:
    layer = site(E=1, dtype=torch.float16)
    with torch.no_grad():
        layer.experts.Bt.fill_(1e5)
    before = layer.base.weight.detach().clone()
    with pytest.raises(WrapError, match="site '0': the merged weight is not finite"):
        layer.merge()
    assert torch.equal(layer.base.weight, before)
    assert not layer.merged


def test_a_mask_that_does_not_fit_is_only_an_error_where_it_is_read() -> None:
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(WIDE, OUT)

        def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
            y: Tensor = self.lin(inputs_embeds.transpose(0, 1))
            return y

    raw = {
        "target_modules": ["lin"],
        "experts": {"kind": "lora", "num_experts": 4},
        "router": {"kind": "soft"},
    }
    x, mask = inputs(2, 3), torch.ones(2, 3)
    plain = molora.wrap(Swapped(), molora.AdapterConfig.from_dict(raw))
    assert plain.train()(x, mask).shape == (3, 2, OUT)
    raw["balance"] = [{"kind": "switch", "weight": 1.0}]
    model = molora.wrap(Swapped(), molora.AdapterConfig.from_dict(raw))
    assert model.eval()(x, mask).shape == (3, 2, OUT)
    with pytest.raises(RoutingError, match=r"'lin': its input \(3, 2, 12\)"):
        model.train()(x, mask)


def test_every_choice_of_shared_factors_has_its_own_update() -> None:
    x = inputs(6)
    for kind, shared in itertools.product(("soft", "topk"), ([], ["A"], ["B"])):
        layer = site(kind, shared=shared)
        gates = layer.router(x, None).gates
        y = layer.base(x)
        for e in range(4):
            y = y + gates[:, e : e + 1] * (x @ layer.experts.delta_weight(e).t())
        assert torch.allclose(layer(x), y, atol=1e-5)


def test_a_later_layer_may_work_in_place_on_the_output() -> None:
    raw = {
        "target_modules": ["0"],
        "experts": {"kind": "lora", "num_experts": 4},
        "router": {"kind": "topk"},
        "balance": [{"kind": "switch", "weight": 0.5}],
    }
    found = []
    for inplace in (False, True):
        model = nn.Sequential(nn.Linear(WIDE, OUT), nn.ReLU(inplace=inplace))
        nn.init.ones_(model[0].weight)
        nn.init.ones_(model[0].bias)
        molora.wrap(model, molora.AdapterConfig.from_dict(raw)).train()
        g = torch.Generator().manual_seed(0)
        for p in adapter_parameters(model).values():
            p.data.normal_(generator=g)
        x = inputs(7).requires_grad_()
        model(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in adapter_parameters(model).values())])
    for plain, in_place in zip(*found, strict=True):
        assert plain is not None and plain.abs().sum() > 0
        assert torch.equal(plain, in_place)


def test_sites_with_one_expert_do_not_thin_out_the_balance() -> None:
    grads = []
    for targets in (["0"], ["0", "1"]):
        one = {
            "match": targets[-1],
            "experts": {"num_experts": 1},
            "router": {"kind": "none"},
        }
        raw = {
            "target_modules": targets,
            "experts": {"kind": "lora", "num_experts": 4},
            "router": {"kind": "topk"},
            "balance": [{"kind": "switch", "weight": 1.0}],
            "overrides": [one] if len(targets) > 1 else [],
        }
        model = nn.Sequential(nn.Linear(WIDE, OUT), nn.Linear(OUT, 2))
        molora.wrap(model, molora.AdapterConfig.from_dict(raw)).train()
        (model(inputs(5)) * 0).sum().backward()
        router: Any = sites(model)["0"].router
        grads.append(router.gate.weight.grad)
    assert grads[0].abs().max() > 0
    assert torch.equal(grads[0], grads[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_objectives_are_exact_under_autocast(dtype: torch.dtype) -> None:
    """Sums over thousands of tokens overflow in half precision, or lose the count."""
    raw = {
        "target_modules": ["0"],
        "experts": {"kind": "lora", "num_experts": 4, "r": 2},
        "router": {"kind": "topk", "top_k": 2, "init_range": 1.0},
        "balance": [{"kind": "switch", "weight": 1.0}],
    }
    model: Any = molora.wrap(
        nn.Sequential(nn.Linear(8, 8)), molora.AdapterConfig.from_dict(raw)
    )
    site = model[0]
    site.runtime.stats = {}
    mask = torch.ones(2, 4001, dtype=torch.bool)
    mask[1, 3000:] = False
    site.runtime.current = ForwardContext(mask, mask_source="attention_mask", rows=2)
    x = torch.randn(2, 4001, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype):
        y = site.train()(x)
    # nothing flows from y, so the router's gradient is that of the objective alone
    (y.float() * 0).sum().backward()
    weight = site.router.gate.weight
    got = weight.grad.clone()
    probs = torch.softmax(x[mask].double() @ weight.double().t(), -1)
    chosen = torch.zeros_like(probs).scatter(-1, probs.topk(2).indices, 1.0)
    value = 4 * (chosen.mean(0) / 2 * probs.mean(0)).sum()
    (want,) = torch.autograd.grad(value, weight)
    stats = site.runtime.stats["0"]
    assert stats.tokens == mask.sum()
    assert torch.equal(stats.chosen_sum_E.double(), chosen.sum(0))
    assert abs(stats.balance["switch"].double() - value) < 1e-5
    assert (got - want).abs().max() < 1e-5 * want.abs().max() + 1e-9
