"""Backward of a frozen layer where the CPU emulates half precision."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import molora
from molora.kernels import call_frozen, frozen_linear, lowrank_mixture
from tests.conftest import Factory

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without half-precision instructions, whatever this one has."""

    def slow(dtype: torch.dtype, device: str) -> bool:
        return dtype in HALF and device == "cpu"

    monkeypatch.setattr(frozen_linear, "slow_on_cpu", slow)


def layer_of(dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(24, 40, bias=bias, dtype=dtype).requires_grad_(False)


def is_own(y: Tensor) -> bool:
    """Whether the fast backward is what computes the gradient."""
    assert y.grad_fn is not None
    return "FrozenLinear" in type(y.grad_fn).__name__


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", HALF)
def test_gradient_is_the_product_rounded_once(dtype: torch.dtype, bias: bool) -> None:
    layer = layer_of(dtype, bias)
    x = torch.randn(2, 7, 24).to(dtype).requires_grad_()
    dy = torch.randn(2, 7, 40).to(dtype)
    y = call_frozen(layer, x)
    y.backward(dy)
    exact = dy.double() @ layer.weight.double()
    assert is_own(y)
    assert torch.equal(y, layer(x))
    assert x.grad is not None and x.grad.dtype == dtype
    rounded_once = (exact.to(dtype) - exact).norm()
    assert (x.grad - exact).norm() <= 1.001 * rounded_once


@pytest.mark.parametrize("dtype", HALF)
def test_the_op_around_a_layer(dtype: torch.dtype) -> None:
    layer, g = layer_of(dtype), torch.Generator().manual_seed(1)
    x = torch.randn(9, 24, generator=g).to(dtype).requires_grad_()
    A = torch.randn(3, 4, 24, generator=g)
    Bt = torch.randn(3, 4, 40, generator=g)
    gates, dy = torch.rand(9, 3, generator=g), torch.randn(9, 40, generator=g)
    lowrank_mixture(x, A, Bt, gates, 0.5, layer).backward(dy.to(dtype))
    dense = torch.einsum("ero,eri->eoi", Bt, A).double() * 0.5
    total = layer.weight.double() + torch.einsum("te,eoi->toi", gates.double(), dense)
    wanted = torch.einsum("to,toi->ti", dy.to(dtype).double(), total)
    assert x.grad is not None
    error = (x.grad - wanted).norm() / wanted.norm()
    # two roundings: that of the layer's gradient, and that of the sum
    assert error < 2 * torch.finfo(dtype).eps


def test_a_wrapped_model_trains_as_before(
    tiny_llama: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = molora.AdapterConfig.from_dict(
        {
            "target_modules": "all-linear",
            "experts": {"kind": "lora", "num_experts": 4, "r": 4},
            "router": {"kind": "topk", "top_k": 2},
        }
    )
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    found = []
    for fast in (True, False):
        model = molora.wrap(tiny_llama().bfloat16(), config).train()
        if not fast:
            monkeypatch.setattr(frozen_linear, "slow_on_cpu", lambda *_: False)
        model(input_ids=ids, labels=ids).loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 0
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 0.02 * other.norm() + 1e-6


def _hooked() -> nn.Module:
    layer = layer_of(torch.bfloat16)
    layer.register_forward_hook(lambda module, args, output: output)
    return layer


def _patched() -> nn.Module:
    layer = layer_of(torch.bfloat16)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight)  # type: ignore[method-assign]
    return layer


class _Own(nn.Linear):
    """A layer that computes in its own way."""


def _subclass() -> nn.Module:
    return _Own(24, 40, dtype=torch.bfloat16).requires_grad_(False)


@pytest.mark.parametrize(
    "make",
    [
        lambda: layer_of(torch.bfloat16).requires_grad_(True),
        lambda: layer_of(torch.float32),
        _hooked,
        _patched,
        _subclass,
    ],
    ids=["trained", "float32", "hooked", "patched", "subclass"],
)
def test_other_layers_are_just_called(make: Callable[[], nn.Module]) -> None:
    layer = make()
    dtype = next(layer.parameters()).dtype
    y = call_frozen(layer, torch.randn(3, 24).to(dtype).requires_grad_())
    assert not is_own(y)
    with torch.no_grad():
        assert call_frozen(layer, torch.randn(3, 24).to(dtype)).grad_fn is None
