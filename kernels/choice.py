"""Which backend computes a call: the choice of ``auto``, and what a named one declines.

Shape legend
    T tokens   E experts   I in features   O out features   r rank of one expert
"""

import functools

import torch
from torch import Tensor

from molora.errors import ConfigError
from molora.kernels import machine, sorted_path
from molora.kernels.backends import BACKENDS
from molora.kernels.cost_model import Shape, fastest
from molora.kernels.torch_path import compute_dtype

_REMEMBERED = 4096
"""Choices kept."""

_WORTH_SORTING = 3e7
"""Multiplications below which a call is too short for sorting to matter."""

_WORTH_GATHERING = 3e4
"""Values of unused factors below which leaving them out does not matter."""


def choose(
    backend: str,
    x: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float | Tensor,
    base: Tensor | None,
    top_k: int | None,
    masked: bool,
) -> str:
    """Check a call and name its backend; remembered per sizes.

    Decoding repeats one size, and looking at everything anew costs a quarter of a site.
    """
    call = (x, A, Bt, gates, scale, base, top_k)
    if torch.compiler.is_compiling():
        # the operator chooses when the graph runs, see operator.py
        check(*(_size(value) for value in call[:-1]))
        _require_known(backend)
        if backend == "reference":
            raise ConfigError(
                "backend 'reference' declined: its backward is autograd, which an "
                "operator inside torch.compile cannot use"
            )
        return backend
    if x.device.type == "cpu" and backend == "auto":
        return _known_on_cpu(
            x.shape,
            A.shape,
            Bt.shape,
            None if gates is None else gates.shape,
            scale.shape if isinstance(scale, Tensor) else None,
            None if base is None else base.shape,
            top_k,
            x.dtype,
            A.dtype,
            # not the grad mode: reentrant checkpointing runs its forward without
            A.requires_grad or Bt.requires_grad,
            # but for the few tokens of decoding, where it decides what is read
            not torch.is_grad_enabled(),
            torch.get_num_threads(),
        )
    if x.is_cuda:
        signs = [_sign(value) for value in call[:-1]]
        key = (backend, top_k, masked, torch.is_grad_enabled(), *signs)
        name = _known_on_gpu.get(key)
        if name is None:
            check(*(_size(value) for value in call[:-1]))
            name = _pick(backend, *call, masked)
            if len(_known_on_gpu) >= _REMEMBERED:
                _known_on_gpu.clear()
            _known_on_gpu[key] = name
        return name
    check(*(_size(value) for value in call[:-1]))
    return _pick(backend, *call, masked)


_known_on_gpu: dict[tuple[object, ...], str] = {}


def _sign(value: Tensor | float | None) -> object:
    """What the choice of a backend may read of an argument."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device, value.requires_grad
    return value is None


def _size(value: Tensor | float | None) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None


@functools.lru_cache(_REMEMBERED)
def _known_on_cpu(
    x: torch.Size,
    A: torch.Size,
    Bt: torch.Size,
    gates: torch.Size | None,
    scale: torch.Size | None,
    base: torch.Size | None,
    top_k: int | None,
    dtype: torch.dtype,
    expert_dtype: torch.dtype,
    trained: bool,
    inference: bool,
    threads: int,
) -> str:
    """The form that the cost model expects to be fastest, of those worth a look."""
    check(x, A, Bt, gates, scale, base)
    if gates is None or top_k is None:
        return "torch"
    # a factor that is shared is not multiplied by the number of experts
    wide = sum(factor[2] for factor in (A, Bt) if factor[0] > 1)
    unused = gates[1] - x[0] * top_k
    names = ["torch"]
    decodes = inference and unused > 0
    if decodes and unused * A[1] * wide >= _WORTH_GATHERING:
        names.append("gather")
    spared = gates[1] - top_k if wide else 0
    dtype = compute_dtype(x[0], dtype, "cpu", A[0] * A[1], expert_dtype)
    work = spared * A[1] * (A[2] + Bt[2]) * max(2 * x[0], 16)
    if work >= _WORTH_SORTING and not sorted_path.unfit(dtype, A[1], A[2], Bt[2]):
        names.append("sorted")
    if len(names) == 1:
        return "torch"
    shape = Shape(
        x[0],
        x[1],
        Bt[2],
        gates[1],
        A[1],
        min(top_k, gates[1]),
        dtype.itemsize,
        trained and not decodes,
    )
    # the grouped product, which is measured, has no float64
    rated = torch.float32 if dtype == torch.float64 else dtype
    return fastest(names, shape, machine.cpu(rated, threads))


def _pick(
    backend: str,
    x: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float | Tensor,
    base: Tensor | None,
    top_k: int | None,
    masked: bool,
) -> str:
    """Name of the backend for a call."""
    _require_known(backend)
    call = (x, A, Bt, gates, scale, base, top_k)
    if backend == "auto":
        return _auto_gpu(*call, masked) if x.device.type == "cuda" else "torch"
    if reasons := BACKENDS[backend].why_not(*call):
        raise ConfigError(f"backend {backend!r} declined: {'; '.join(reasons)}")
    return backend


def _require_known(backend: str) -> None:
    if backend != "auto" and backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r} is unknown; choose from {[*BACKENDS]}")


def _auto_gpu(
    x: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float | Tensor,
    base: Tensor | None,
    top_k: int | None,
    masked: bool,
) -> str:
    """The form that the cost model expects to be fastest, of those that can."""
    names = ["triton", "triton_grouped", "triton_gather"]
    able = [
        name
        for name in names
        if not BACKENDS[name].why_not(x, A, Bt, gates, scale, base, top_k)
    ]
    if not able:
        return "torch"
    experts = 1 if gates is None else gates.shape[1]
    trained = A.requires_grad or Bt.requires_grad
    if masked:
        # forms draw different masks, and reentrant checkpointing runs its forward
        # without grad mode: only what does not read it may choose
        able = [name for name in able if name != "triton_gather"]
    else:
        trained = (trained or x.requires_grad) and torch.is_grad_enabled()
    shape = Shape(
        tokens=x.shape[0],
        wide_in=x.shape[1],
        wide_out=Bt.shape[2],
        experts=experts,
        rank=A.shape[1],
        top_k=min(top_k or experts, experts),
        itemsize=x.dtype.itemsize,
        training=trained,
    )
    best = fastest([*able, "torch on a GPU"], shape, machine.gpu(x.device))
    return best.split()[0]


def check(
    x: torch.Size | None,
    A: torch.Size | None,
    Bt: torch.Size | None,
    gates: torch.Size | None,
    scale: torch.Size | None,
    base: torch.Size | None,
) -> None:
    """Refuse shapes that broadcasting would silently accept."""
    assert x is not None and A is not None and Bt is not None
    ok = len(x) == 2 and len(A) == len(Bt) == 3
    if ok:
        experts = max(A[0], Bt[0]) if gates is None else gates[-1]
        ok = (
            A[1] == Bt[1]
            and A[2] == x[1]
            and A[0] in (1, experts)
            and Bt[0] in (1, experts)
            and (experts == 1 if gates is None else gates == (x[0], experts))
            and scale in (None, (experts,))
            and base in (None, (x[0], Bt[2]))
        )
    if not ok:
        given = {"x": x, "A": A, "Bt": Bt, "gates": gates, "scale": scale, "base": base}
        shapes = {k: None if size is None else tuple(size) for k, size in given.items()}
        raise ConfigError(
            "lowrank_mixture: shapes do not fit x[T,I] A[E|1,r,I] Bt[E|1,r,O] "
            f"gates[T,E] scale[E] base[T,O]: {shapes}"
        )
