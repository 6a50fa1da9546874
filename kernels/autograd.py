"""Autograd around a backend's forward and backward, in eager mode and as an operator.

In eager mode an autograd function calls the backend directly, because an operator of
``torch.library`` costs tens of microseconds per call, which decoding feels. Under
``torch.compile`` the operator ``molora::lowrank_mixture`` keeps the backend whole.

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
from molora.kernels.gradients import Needs
from molora.kernels.torch_path import dtype_of


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
        flat, scale_E = (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
        seed = options.seed if options.dropout else None
        if isinstance(seed, int):
            seed = torch.full((), seed)
        args = (flat, scale_E, *options[:3], seed)
        return lowrank_mixture_op(x, base, A, Bt, gates, *args)[0]  # type: ignore[no-any-return]
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
    base = layer(reached)
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


@torch.library.custom_op("molora::lowrank_mixture", mutates_args=())
def lowrank_mixture_op(
    x: Tensor,
    base: Tensor | None,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float,
    scale_E: Tensor | None,
    backend: str,
    top_k: int | None,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Result and z; see ``molora.kernels.lowrank_mixture``."""
    path = BACKENDS[backend].load()
    factor = scale if scale_E is None else scale_E
    number = 0 if seed is None else int(seed)
    return path.forward(x, base, A, Bt, gates, factor, top_k, dropout, number)


@lowrank_mixture_op.register_fake
def _(
    x: Tensor,
    base: Tensor | None,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float,
    scale_E: Tensor | None,
    backend: str,
    top_k: int | None,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    ranks = A.shape[0] * A.shape[1]
    y = (x if base is None else base).new_empty(x.shape[0], Bt.shape[2])
    dtype = x.dtype if backend.startswith("triton") else dtype_of(x, A)
    return y, x.new_empty(x.shape[0], ranks, dtype=dtype)


@torch.library.custom_op("molora::lowrank_mixture_backward", mutates_args=())
def lowrank_mixture_backward_op(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float,
    scale_E: Tensor | None,
    backend: str,
    top_k: int | None,
    dropout: float,
    seed: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, A, Bt and the gates; an empty tensor where not needed."""
    path = BACKENDS[backend].load()
    factor = scale if scale_E is None else scale_E
    number = 0 if seed is None else int(seed)
    options = (top_k, dropout, number, Needs(*needs))
    grads = path.backward(dy, x, z, A, Bt, gates, factor, *options)
    # an operator returns no None, and nothing that is a view of its inputs
    made = [dy.new_empty(0) if g is None else g.contiguous() for g in grads]
    return made[0], made[1], made[2], made[3]


@lowrank_mixture_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float,
    scale_E: Tensor | None,
    backend: str,
    top_k: int | None,
    dropout: float,
    seed: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = (x, A, Bt, gates)
    made = [
        dy.new_empty(0)
        if tensor is None or not needed
        else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        for tensor, needed in zip(given, needs, strict=True)
    ]
    return made[0], made[1], made[2], made[3]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, A, Bt, gates, scale, scale_E, *options, seed = inputs
    ctx.scale, ctx.options = scale, options
    ctx.save_for_backward(x, output[1], A, Bt, gates, scale_E, seed)


def _backward(ctx: Any, dy: Tensor, dz: Tensor) -> tuple[Any, ...]:
    x, z, A, Bt, gates, scale_E, seed = ctx.saved_tensors
    need = ctx.needs_input_grad
    needs = [need[0], need[2], need[3], need[4]]
    grads = lowrank_mixture_backward_op(
        dy, x, z, A, Bt, gates, ctx.scale, scale_E, *ctx.options, seed, needs
    )
    dx, dA, dBt, dgates = (
        g if needed else None for g, needed in zip(grads, needs, strict=True)
    )
    return dx, dy if need[1] else None, dA, dBt, dgates, *[None] * 6


lowrank_mixture_op.register_autograd(_backward, setup_context=_setup)
