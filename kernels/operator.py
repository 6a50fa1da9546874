"""The op as operators of ``torch.library``, which a compiled graph keeps whole.

A graph is made for sizes that may still be unknown, and runs with sizes that are known:
the operator chooses its backend when it runs, just as eager mode does. What the backend
keeps for backward differs from one to the other, so it leaves as bytes, together with
the number of the backend. Without gradients nothing is kept.

Shape legend
    T tokens   E experts   I in features   O out features   r rank of one expert
"""

from typing import Any

import torch
from torch import Tensor

from molora.kernels.backends import BACKENDS
from molora.kernels.choice import choose
from molora.kernels.gradients import Needs
from molora.kernels.torch_path import dtype_of

_NAMES = [*BACKENDS]


def run_compiled(
    x: Tensor,
    base: Tensor | None,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float | Tensor,
    backend: str,
    top_k: int | None,
    dropout: float,
    seed: int | Tensor,
) -> Tensor:
    """Put the operator into the graph that is being made; see ``lowrank_mixture``."""
    number, scale_E = (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
    drawn = seed if isinstance(seed, Tensor) else torch.full((), seed)
    trained = [t is not None and t.requires_grad for t in (x, base, A, Bt, gates)]
    args = (x, base, A, Bt, gates, number, scale_E, backend, top_k, dropout)
    rest = (drawn if dropout else None, trained)
    y: Tensor
    if torch.is_grad_enabled() and any(trained):
        y = lowrank_mixture_op(*args, *rest)[0]
    else:
        y = lowrank_mixture_inference_op(*args, *rest)
    return y


def _chosen(
    backend: str,
    x: Tensor,
    base: Tensor | None,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float | Tensor,
    top_k: int | None,
    masked: bool,
    trained: list[bool],
) -> str:
    """The choice of eager mode, for tensors that no longer say what is trained."""
    flags: list[Any] = [
        None if t is None else t.detach().requires_grad_(is_trained)
        for t, is_trained in zip((x, base, A, Bt, gates), trained, strict=True)
    ]
    x, base, A, Bt, gates = flags
    return choose(backend, x, A, Bt, gates, scale, base, top_k, masked)


@torch.library.custom_op("molora::lowrank_mixture_inference", mutates_args=())
def lowrank_mixture_inference_op(
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
    trained: list[bool],
) -> Tensor:
    """Result without gradients; see ``molora.kernels.lowrank_mixture``.

    ``trained`` says which of x, base, A, Bt and gates ask for a gradient elsewhere.
    """
    factor = scale if scale_E is None else scale_E
    with torch.no_grad():
        call = (x, base, A, Bt, gates, factor, top_k)
        name = _chosen(backend, *call, dropout > 0, trained)
        return BACKENDS[name].load().forward(*call, dropout, _number(seed))[0]


@lowrank_mixture_inference_op.register_fake
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
    trained: list[bool],
) -> Tensor:
    return _result(x, base, Bt)


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
    trained: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Result, the bytes kept for backward, and the number of the backend on the CPU."""
    factor = scale if scale_E is None else scale_E
    call = (x, base, A, Bt, gates, factor, top_k)
    with torch.enable_grad():
        name = _chosen(backend, *call, dropout > 0, trained)
    y, z = BACKENDS[name].load().forward(*call, dropout, _number(seed))
    kept = z.contiguous().view(-1).view(torch.uint8)
    return y, kept, torch.tensor(_NAMES.index(name))


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
    trained: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    kept = x.new_empty(size, dtype=torch.uint8)
    number = torch.empty((), dtype=torch.int64, device="cpu")
    return _result(x, base, Bt), kept, number


@torch.library.custom_op("molora::lowrank_mixture_backward", mutates_args=())
def lowrank_mixture_backward_op(
    dy: Tensor,
    x: Tensor,
    kept: Tensor,
    number: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float,
    scale_E: Tensor | None,
    top_k: int | None,
    dropout: float,
    seed: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, A, Bt and the gates; an empty tensor where not needed."""
    name = _NAMES[int(number)]
    z = _restored(kept, name, x, A, top_k)
    factor = scale if scale_E is None else scale_E
    options = (top_k, dropout, _number(seed), Needs(*needs))
    grads = BACKENDS[name].load().backward(dy, x, z, A, Bt, gates, factor, *options)
    # an operator returns no None, and nothing that is a view of its inputs
    made = [dy.new_empty(0) if g is None else g.contiguous() for g in grads]
    return made[0], made[1], made[2], made[3]


@lowrank_mixture_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    kept: Tensor,
    number: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float,
    scale_E: Tensor | None,
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


def _number(seed: Tensor | None) -> int:
    return 0 if seed is None else int(seed)


def _result(x: Tensor, base: Tensor | None, Bt: Tensor) -> Tensor:
    return (x if base is None else base).new_empty(x.shape[0], Bt.shape[2])


def _restored(
    kept: Tensor, name: str, x: Tensor, A: Tensor, top_k: int | None
) -> Tensor:
    """What the forward of a backend left, from its bytes."""
    tokens, r = x.shape[0], A.shape[1]
    shape: tuple[int, ...] = (tokens, A.shape[0] * r)
    if name == "sorted":
        shape = (-1, r)
    elif name == "triton_grouped":
        assert top_k is not None
        shape = (tokens, top_k, r)
    dtype = x.dtype if name.startswith("triton") else dtype_of(x, A)
    return kept.view(dtype).view(shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, A, Bt, gates, scale, scale_E, _, top_k, dropout, seed, _ = inputs
    ctx.scale, ctx.options = scale, (top_k, dropout)
    ctx.save_for_backward(x, *output[1:], A, Bt, gates, scale_E, seed)


def _backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
    x, kept, number, A, Bt, gates, scale_E, seed = ctx.saved_tensors
    need = ctx.needs_input_grad
    needs = [need[0], need[2], need[3], need[4]]
    args = (dy, x, kept, number, A, Bt, gates, ctx.scale, scale_E, *ctx.options, seed)
    grads = lowrank_mixture_backward_op(*args, needs)
    dx, dA, dBt, dgates = (
        g if needed else None for g, needed in zip(grads, needs, strict=True)
    )
    return dx, dy if need[1] else None, dA, dBt, dgates, *[None] * 7


lowrank_mixture_op.register_autograd(_backward, setup_context=_setup)
