"""One op, several backends, the reasons a backend declines a call, and the choice.

Shape legend
    T tokens   E experts   I in features   O out features   r rank of one expert
"""

import functools

import torch
from torch import Tensor

from molora.errors import ConfigError
from molora.kernels import machine
from molora.kernels.autograd import Options, run
from molora.kernels.backends import BACKENDS
from molora.kernels.cost_model import Shape, fastest
from molora.kernels.torch_path import compute_dtype

_WORTH_CHOOSING = 3e7
"""Multiplications below which a call is too short for the choice to matter."""


def lowrank_mixture(
    x: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float | Tensor,
    base: Tensor | None = None,
    backend: str = "auto",
    *,
    top_k: int | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Routed low-rank update: y[t] = base[t] + sum_e gates[t,e] scale[e] B_e A_e x[t].

    Args:
        x: [T, I] inputs, any strides.
        A: [E, r, I], or [1, r, I] when all experts share it.
        Bt: [E, r, O] (B transposed), or [1, r, O] when all experts share it.
        gates: [T, E] in at least float32; None means one expert with gate 1.
        scale: alpha / r, one number or [E].
        base: [T, O] output of the frozen layer; None means zero.
        backend: ``auto``, or a name in ``BACKENDS``.
        top_k: At most so many gates of a token are not zero, and nothing reads the
            gradient of a gate that is zero. Lets ``auto`` skip experts not in use;
            None promises nothing.
        dropout: Probability to zero a value of x, in the update only; one mask for all
            experts, drawn from ``seed`` and drawn again in backward.
        seed: Seed of the mask. A backend on another device draws another mask.

    Returns:
        [T, O] in the dtype of ``base`` (of ``x`` without base); float64 from
        ``reference``. Under autocast the computation is in the autocast dtype.

    Raises:
        ConfigError: Unknown backend, shapes that do not fit, or a named backend that
            declines; the message lists every reason.
    """
    _check(x, A, Bt, gates, scale, base)
    if not isinstance(scale, Tensor):
        scale = float(scale)
    # like every op under autocast, leave float64 alone
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            name = _pick(backend, x, A, Bt, gates, scale, base, top_k)
            options = Options(name, top_k, dropout, seed)
            return run(x, base, A, Bt, gates, scale, options)
    name = _pick(backend, x, A, Bt, gates, scale, base, top_k)
    return run(x, base, A, Bt, gates, scale, Options(name, top_k, dropout, seed))


def _pick(
    backend: str,
    x: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float | Tensor,
    base: Tensor | None,
    top_k: int | None,
) -> str:
    """Name of the backend for a call."""
    if backend == "auto":
        # the common call on a CPU is decided without looking further
        if gates is None or top_k is None or x.device.type != "cpu":
            return "torch"
        return _auto_cpu(x, A, Bt, gates, scale, base, top_k)
    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r} is unknown; choose from {[*BACKENDS]}")
    reasons = BACKENDS[backend].load().why_not(x, A, Bt, gates, scale, base, top_k)
    if reasons:
        raise ConfigError(f"backend {backend!r} declined: {'; '.join(reasons)}")
    return backend


def _auto_cpu(
    x: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor,
    scale: float | Tensor,
    base: Tensor | None,
    top_k: int,
) -> str:
    """Concatenated or sorted, whichever the cost model expects to be faster."""
    (tokens, wide_in), experts = x.shape, gates.shape[1]
    # a rank that is shared is not multiplied by the number of experts
    spared = experts - top_k if max(A.shape[0], Bt.shape[0]) > 1 else 0
    work = spared * A.shape[1] * (wide_in + Bt.shape[2]) * max(2 * tokens, 16)
    if work < _WORTH_CHOOSING or torch.compiler.is_compiling():
        return "torch"
    if BACKENDS["sorted"].load().why_not(x, A, Bt, gates, scale, base, top_k):
        return "torch"
    dtype = compute_dtype(x, A)
    shape = Shape(
        tokens,
        wide_in,
        Bt.shape[2],
        experts,
        A.shape[1],
        min(top_k, experts),
        dtype.itemsize,
        torch.is_grad_enabled(),
    )
    return _faster_on_cpu(shape, dtype, torch.get_num_threads())


@functools.lru_cache(4096)
def _faster_on_cpu(shape: Shape, dtype: torch.dtype, threads: int) -> str:
    return fastest(["torch", "sorted"], shape, machine.cpu(dtype, threads))


def _check(
    x: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float | Tensor,
    base: Tensor | None,
) -> None:
    """Refuse shapes that broadcasting would silently accept."""
    x_, a_, b_ = x.shape, A.shape, Bt.shape
    gates_ = None if gates is None else gates.shape
    ok = len(x_) == 2 and len(a_) == len(b_) == 3
    if ok:
        experts = max(a_[0], b_[0]) if gates_ is None else gates_[-1]
        ok = (
            a_[1] == b_[1]
            and a_[2] == x_[1]
            and a_[0] in (1, experts)
            and b_[0] in (1, experts)
            and (experts == 1 if gates_ is None else gates_ == (x_[0], experts))
            and (not isinstance(scale, Tensor) or scale.shape == (experts,))
            and (base is None or base.shape == (x_[0], b_[2]))
        )
    if not ok:
        shapes = {
            name: None if tensor is None else tuple(tensor.shape)
            for name, tensor in zip(
                ("x", "A", "Bt", "gates", "scale", "base"),
                (x, A, Bt, gates, scale if isinstance(scale, Tensor) else None, base),
                strict=True,
            )
        }
        raise ConfigError(
            "lowrank_mixture: shapes do not fit x[T,I] A[E|1,r,I] Bt[E|1,r,O] "
            f"gates[T,E] scale[E] base[T,O]: {shapes}"
        )
