"""Autograd around a backend's forward and backward.

An autograd function calls the backend directly, because an operator of
``torch.library`` costs tens of microseconds per call, which decoding feels; operator.py
has the operators that ``torch.compile`` needs.

Where the frozen layer itself is given, x reaches it through ``_Input`` and its output
becomes y in ``_Update``, so backward runs ``_Update``, the layer, ``_Input``:

    _Update    keeps dy, and hands it on as the gradient of the layer's output
    layer      its own backward, whatever it is (quantised, sharded)
    _Input     all gradients of the update, that of x added onto the layer's

which writes the gradient of x once, instead of twice and a sum.

Shape legend
    T tokens   E experts   I in features   O out features   R ranks together
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from molora.errors import ConfigError
from molora.kernels.backends import BACKENDS
from molora.kernels.frozen_linear import call_frozen
from molora.kernels.gradients import Needs
from molora.kernels.operator import run_compiled


class Options(NamedTuple):
    """What a call needs beside its tensors."""

    backend: str
    top_k: int | None = None
    dropout: float = 0.0
    seed: Any = 0
    """A number, or a scalar tensor under ``torch.compile``."""


def run(
    x: Tensor,
    base: Tensor | None,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float | Tensor,
    options: Options,
) -> Tensor:
    """Compute with one backend, differentiably where gradients are enabled."""
    if torch.compiler.is_compiling():
        return run_compiled(x, base, A, Bt, gates, scale, *options)
    if torch.is_grad_enabled():
        y: Tensor = _Mixture.apply(  # type: ignore[no-untyped-call]
            x, base, A, Bt, gates, scale, options
        )
        return y
    # an autograd function costs more than the products of one token
    path = BACKENDS[options.backend].load()
    return path.forward(x, base, A, Bt, gates, scale, *options[1:])[0]


class _Link:
    """What passes between the two ends of one layer, within one backward pass."""

    dy: Tensor | None = None
    z: Tensor | None = None
    task: int = -1
    """The pass that left them: another one must not find them."""


def run_around(
    x: Tensor,
    layer: Callable[[Tensor], Tensor],
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float | Tensor,
    options: Options,
) -> Tensor:
    """Compute in eager mode with gradients, around the frozen layer.

    Returns:
        [T, O] in the dtype of the layer's output.

    Raises:
        ConfigError: The layer's output has another shape.
    """
    link = _Link()
    reached: Tensor = _Input.apply(x, A, Bt, gates, scale, options, link)  # type: ignore[no-untyped-call]
    base = call_frozen(layer, reached)
    if base.shape != (x.shape[0], Bt.shape[2]):
        raise ConfigError(
            f"lowrank_mixture: the layer makes {tuple(base.shape)} of x "
            f"{tuple(x.shape)}; with Bt {tuple(Bt.shape)} it must be "
            f"{(x.shape[0], Bt.shape[2])}"
        )
    # what is computed in float32 stays so; the layer has made its own choice
    with torch.autocast(x.device.type, enabled=False):
        if not base.requires_grad:
            # nothing would come back to the other end
            return run(x, base, A, Bt, gates, scale, options)
        y: Tensor = _Update.apply(base, (x, A, Bt, gates, scale), options, link)  # type: ignore[no-untyped-call]
    return y


class _Input(torch.autograd.Function):
    """Where x enters the frozen layer; backward has all gradients of the update."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        Bt: Tensor,
        gates: Tensor | None,
        scale: float | Tensor,
        options: Options,
        link: _Link,
    ) -> Tensor:
        ctx.scale, ctx.options, ctx.link = scale, options, link
        ctx.save_for_backward(x, A, Bt, gates)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        link, needs = ctx.link, Needs(*ctx.needs_input_grad[:4])
        dy, z, link.dy, link.z = link.dy, link.z, None, None
        if dy is None or link.task != torch._C._current_graph_task_id():
            # only the layer's own output was differentiated
            return dx, *[None] * 6
        x, A, Bt, gates = ctx.saved_tensors
        path = BACKENDS[ctx.options.backend].load()
        top_k, dropout, seed = ctx.options[1:]
        grads = path.backward(
            dy, x, z, A, Bt, gates, ctx.scale, top_k, dropout, seed, needs, dx
        )
        return *grads, *[None] * 3


class _Update(torch.autograd.Function):
    """Where the update joins the output of the frozen layer."""

    @staticmethod
    def forward(
        ctx: Any, base: Tensor, call: tuple[Any, ...], options: Options, link: _Link
    ) -> Tensor:
        x, A, Bt, gates, scale = call
        path = BACKENDS[options.backend].load()
        y, z = path.forward(x, base, A, Bt, gates, scale, *options[1:])
        ctx.link = link
        ctx.save_for_backward(z)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ctx.link.dy, (ctx.link.z,) = dy, ctx.saved_tensors
        ctx.link.task = torch._C._current_graph_task_id()
        return dy, None, None, None


class _Mixture(torch.autograd.Function):
    """Eager autograd; saves x, z, the gates and the parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: Tensor | None,
        A: Tensor,
        Bt: Tensor,
        gates: Tensor | None,
        scale: float | Tensor,
        options: Options,
    ) -> Tensor:
        path = BACKENDS[options.backend].load()
        y, z = path.forward(x, base, A, Bt, gates, scale, *options[1:])
        ctx.scale, ctx.options = scale, options
        ctx.save_for_backward(x, z, A, Bt, gates)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, A, Bt, gates = ctx.saved_tensors
        need_x, need_base, *others = ctx.needs_input_grad[:5]
        path = BACKENDS[ctx.options.backend].load()
        needs = Needs(need_x, *others)
        top_k, dropout, seed = ctx.options[1:]
        grads = path.backward(
            dy, x, z, A, Bt, gates, ctx.scale, top_k, dropout, seed, needs
        )
        dbase = dy if need_base else None
        return grads.x, dbase, grads.A, grads.Bt, grads.gates, None, None
