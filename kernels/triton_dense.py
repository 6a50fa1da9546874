"""Backend ``triton``: the grouped low-rank matmul in rank space, for any routing.

Two launches forward (``triton_dense_forward``) and at most five backward
(``triton_dense_backward``), whatever the number of experts; every expert is computed
for every token, which costs no more than reading x while the total rank is below the
balance of the machine. Everything here declines what the kernels cannot do.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from molora.kernels.triton_dense_backward import backward as backward
from molora.kernels.triton_dense_forward import forward as forward
from molora.kernels.triton_tiles import MAX_RANK, interpreted

MAX_ROWS = 65535 * 16
"""Tokens of one call: the second axis of a grid, of tiles of at least 16."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not(
    x: Tensor,
    A: Tensor,
    Bt: Tensor,
    gates: Tensor | None,
    scale: float | Tensor,
    base: Tensor | None,
    top_k: int | None = None,
) -> list[str]:
    """Every reason against these kernels for this call."""
    given = {"x": x, "A": A, "Bt": Bt, "gates": gates, "scale": scale, "base": base}
    tensors = {name: t for name, t in given.items() if isinstance(t, Tensor)}
    return [*_placement(tensors), *_numbers(tensors), *_sizes(x, A, Bt)]


def _placement(tensors: dict[str, Tensor]) -> Iterator[str]:
    x = tensors["x"]
    device = "cpu" if interpreted() else "cuda"
    if x.device.type != device:
        yield (
            f"x is on {x.device}; the kernels run on a GPU of NVIDIA or AMD, and on "
            "the CPU only in the interpreter (TRITON_INTERPRET=1)"
        )
    for name, tensor in tensors.items():
        if tensor.device != x.device:
            yield f"{name} is on {tensor.device} and x on {x.device}"
    nvidia = x.is_cuda and torch.version.hip is None and torch.cuda.is_available()
    if nvidia and torch.cuda.get_device_capability(x.device) < (8, 0):
        yield f"{x.device} is older than compute capability 8.0"


def _numbers(tensors: dict[str, Tensor]) -> Iterator[str]:
    x, A = tensors["x"], tensors["A"]
    for name in ("x", "base"):
        if name in tensors and tensors[name].dtype not in _DTYPES:
            yield f"{name} is {tensors[name].dtype}; it must have 16 or 32 bits"
    if A.dtype not in (torch.float32, x.dtype) or tensors["Bt"].dtype != A.dtype:
        yield (
            f"A is {A.dtype} and Bt {tensors['Bt'].dtype}; both must be float32, or "
            f"both {x.dtype} like x"
        )
    if "gates" in tensors and tensors["gates"].dtype != torch.float32:
        yield f"gates are {tensors['gates'].dtype}; they must be float32"


def _sizes(x: Tensor, A: Tensor, Bt: Tensor) -> Iterator[str]:
    if A.shape[1] > MAX_RANK:
        yield f"rank {A.shape[1]} is above {MAX_RANK}"
    if 0 in (*A.shape, *Bt.shape):
        yield "a factor has a dimension of size 0"
    if max(A.numel(), Bt.numel()) >= 2**31:
        yield "A or Bt has 2**31 elements or more"
    if len(x) > MAX_ROWS:
        yield f"{len(x)} tokens are more than {MAX_ROWS}"
