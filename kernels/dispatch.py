"""One op, several backends.

Shape legend
    T tokens   E experts   I in features   O out features   r rank of one expert
"""

from collections.abc import Callable

import torch
from torch import Tensor

from molora.errors import ConfigError
from molora.kernels.autograd import Options, run, run_around
from molora.kernels.choice import choose

Layer = Callable[[Tensor], Tensor]
"""A frozen layer: [T, I] to [T, O]."""


def lowrank_mixture(
    x: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float | Tensor,
    base: Tensor | Layer | None = None,
    backend: str = "auto",
    *,
    top_k: int | None = None,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
) -> Tensor:
    """Routed low-rank update: y[t] = base[t] + sum_e gates[t,e] scale[e] B_e A_e x[t].

    Args:
        x: [T, I] inputs, any strides.
        A: [E, r, I], or [1, r, I] when all experts share it.
        Bt: [E, r, O] (B transposed), or [1, r, O] when all experts share it.
        gates: [T, E] in at least float32; None means one expert with gate 1.
        scale: alpha / r, one number or [E].
        base: [T, O] output of the frozen layer; None means zero. Or the layer itself, a
            function of x: in training its gradient of x and that of the update are
            then written once, as their sum. Its parameters must be frozen, and its
            output a differentiable function of its argument, which nothing changes in
            place.
        backend: ``auto``, or a name in ``BACKENDS``; a compiled graph chooses each time
            it runs.
        top_k: At most so many gates of a token are not zero, and nothing reads the
            gradient of a gate that is zero. Lets ``auto`` skip experts not in use;
            None promises nothing.
        dropout: Probability to zero a value of x, in the update only; one mask for all
            experts, drawn from ``seed`` and drawn again in backward.
        seed: Seed of the mask, a number or a scalar int64 tensor on the CPU. A backend
            on another device draws another mask.

    Returns:
        [T, O] in the dtype of ``base`` (of ``x`` without base); float64 from
        ``reference``. Under autocast the computation is in the autocast dtype.

    Raises:
        ConfigError: Unknown backend, shapes that do not fit, dropout out of range, or a
            named backend that declines; the message lists every reason.
    """
    if not 0 <= dropout < 1:
        raise ConfigError(f"lowrank_mixture: dropout={dropout} is not in [0, 1)")
    dropout = float(dropout)
    if isinstance(seed, Tensor) and not torch.compiler.is_compiling():
        seed = int(seed)
    if not isinstance(scale, Tensor):
        scale = float(scale)
    # like every op under autocast, leave float64 alone
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    narrow = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if base is not None and not isinstance(base, Tensor):
        if _passes_through(x, narrow):
            call = (x, A, Bt, gates, scale)
            name = choose(backend, *call, None, top_k, dropout > 0)
            options = Options(name, top_k, dropout, seed)
            return run_around(x, base, A, Bt, gates, scale, options)
        base = base(x)
    if autocast:
        x = x.to(narrow)
        with torch.autocast(x.device.type, enabled=False):
            name = choose(backend, x, A, Bt, gates, scale, base, top_k, dropout > 0)
            options = Options(name, top_k, dropout, seed)
            return run(x, base, A, Bt, gates, scale, options)
    name = choose(backend, x, A, Bt, gates, scale, base, top_k, dropout > 0)
    return run(x, base, A, Bt, gates, scale, Options(name, top_k, dropout, seed))


def form_of(
    x: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float | Tensor,
    top_k: int | None = None,
) -> str:
    """Name of the backend that ``auto`` takes for a call without dropout.

    Arguments and errors are those of ``lowrank_mixture``.
    """
    return choose("auto", x, A, Bt, gates, scale, None, top_k, False)


def _passes_through(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the gradient of x can be left to the end of the frozen layer."""
    return (
        torch.is_grad_enabled()
        and x.requires_grad
        and x.dtype == dtype
        and not torch.compiler.is_compiling()
    )
