"""A frozen linear layer in training on a CPU that emulates half precision.

Without matrix instructions for it, a CPU multiplies bfloat16 and float16 many times
slower than float32, and slowest in the gradient of the input,

    dx = dy W         [T, O] x [O, I]

which is the largest product of the backward pass of an adapted layer. Here that one is
computed in float32 and rounded once; the forward pass is the layer's own.

Shape legend
    T tokens   I in features   O out features
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from molora.kernels.torch_path import slow_on_cpu


def call_frozen(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Call a frozen layer, with a fast backward where its own is emulated.

    Args:
        layer: Any function; one other than a plain ``nn.Linear`` is just called, and so
            is one with hooks or with parameters that are trained.
        x: [..., I].

    Returns:
        ``layer(x)``. Its gradient of x is at least as exact as the layer's.

    Limitations: backward makes a float32 copy of the weight, for as long as it runs.
    """
    if not (isinstance(layer, nn.Linear) and _is_emulated(layer, x)):
        return layer(x)
    y: Tensor = _FrozenLinear.apply(x, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    return y


def _is_emulated(layer: nn.Linear, x: Tensor) -> bool:
    """Whether the layer's own backward is slow, and is no more than a product."""
    if torch.compiler.is_compiling() or not (
        x.requires_grad and torch.is_grad_enabled()
    ):
        return False
    weight, device = layer.weight, x.device.type
    if weight.dtype != x.dtype or not slow_on_cpu(x.dtype, device):
        return False
    watched = _has_any_global_hook() or any(
        (
            layer._forward_hooks,
            layer._forward_pre_hooks,
            layer._backward_hooks,
            layer._backward_pre_hooks,
        )
    )
    changed = type(layer) is not nn.Linear or "forward" in vars(layer)
    trained = any(p.requires_grad for p in layer.parameters())
    # a subclass of parameters computes in its own way (sharded, quantised)
    plain = type(weight) is nn.Parameter and not torch.is_autocast_enabled(device)
    return plain and not (watched or changed or trained)


class _FrozenLinear(torch.autograd.Function):
    """x W^T + b, with dx = dy W in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (weight_OI,) = ctx.saved_tensors
        dx = dy.float() @ weight_OI.float()
        return dx.to(weight_OI.dtype), None, None
