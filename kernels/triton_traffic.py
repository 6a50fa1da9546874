"""Bytes of device memory that a launch of a rank-space kernel moves, from its tensors.

A grid reads some tensors again and again. Small ones stay in the second-level cache and
count once; one larger than ``CACHED`` counts as often as the grid reads it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

CACHED = 8 * 2**20
"""Bytes that stay cached while a kernel runs; A100 and H100 have 40 and 50 MiB."""


class Traffic(NamedTuple):
    """Bytes a launch moves, and the least any launch with its result could."""

    moved: int
    floor: int


# for each kernel: tensors that programs of one grid axis all read in full
_AGAIN: dict[str, dict[str, int]] = {
    "shrink_gate": {"x": 0, "a": 1},
    "expand_add": {"zg": 0, "b": 1},
    "bwd_rank": {"dy": 0, "bt": 1},
    "wgrad": {"wide_in": 0, "narrow": 1},
    "sum_parts": {},
}


def traffic(
    kernel: str,
    grid: tuple[int, ...],
    tensors: Mapping[str, Tensor | None],
    settings: Mapping[str, Any],
) -> Traffic:
    """Count one launch, as ``molora.kernels.triton_tiles.launch`` is called.

    Args:
        kernel: Name of the kernel.
        grid: Programs along each axis.
        tensors: Its tensor arguments by name, inputs and outputs.
        settings: Its other arguments by name.

    Returns:
        Bytes moved; and the floor, which is every input once and every result once,
        where partial sums count as the one result they become.
    """
    moved = floor = 0
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        size = tensor.numel() * tensor.element_size()
        passes = grid[_AGAIN[kernel][name]] if name in _AGAIN[kernel] else 1
        passes *= _inside(kernel, name, settings)
        moved += size * (passes if size > CACHED else 1)
        shared = kernel == "wgrad" and name == "out"
        floor += size // settings["SPLIT"] if shared else size
    return Traffic(moved, floor)


def _inside(kernel: str, name: str, settings: Mapping[str, Any]) -> int:
    """Times that one program reads the same part of a tensor."""
    tiles: int = settings.get("NC", 1)
    match kernel, name:
        case ("shrink_gate", "x") if not settings["A_SHARED"]:
            return tiles
        case ("bwd_rank", "dy") if not settings["B_SHARED"]:
            return tiles
        case ("expand_add", "zg") if tiles > 1:
            columns: int = settings["NT"]
            return columns
    return 1
