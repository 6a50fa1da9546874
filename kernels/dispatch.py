"""One op, several backends, and the reasons a backend declines a call.

Shape legend
    T tokens   E experts   I in features   O out features   r rank of one expert
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from molora.errors import ConfigError
from molora.kernels.reference import reference
from molora.kernels.torch_path import torch_mixture


class Backend(NamedTuple):
    """One way to compute the op, and the reasons it may decline a call."""

    run: Callable[..., Tensor]
    why_not: Callable[..., list[str]]


def _accepts(*_: object) -> list[str]:
    return []


BACKENDS: dict[str, Backend] = {
    "torch": Backend(torch_mixture, _accepts),
    "reference": Backend(reference, _accepts),
}
"""Fastest first: ``auto`` takes the first one that gives no reason against itself."""


def lowrank_mixture(
    x: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float | Tensor,
    base: Tensor | None = None,
    backend: str = "auto",
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
            return _pick(backend, x, A, Bt, gates, scale, base)
    return _pick(backend, x, A, Bt, gates, scale, base)


def _pick(
    backend: str,
    x: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float | Tensor,
    base: Tensor | None,
) -> Tensor:
    args = (x, A, Bt, gates, scale, base)
    if backend == "auto":
        for candidate in BACKENDS.values():
            if not candidate.why_not(*args):
                return candidate.run(*args)
        raise AssertionError("the torch backend accepts every call")
    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r} is unknown; choose from {[*BACKENDS]}")
    elif reasons := BACKENDS[backend].why_not(*args):
        raise ConfigError(f"backend {backend!r} declined: {'; '.join(reasons)}")
    return BACKENDS[backend].run(*args)


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
