"""Tensors of low Tucker or CP rank, of which parts are read.

    T = C x_1 A_1 x_2 A_2 ... x_M A_M    C [r, ..., r] or ones on its diagonal

In every function the tensors have one leading axis N of their own (experts or groups):
core [N, r, ..., r] or None, factors A_m [N, n_m, r].

Shape legend: see base.py; M axes, n sides, R rank of a layer's factors.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def side(entries: int, order: int) -> int:
    """Smallest n with n^order >= entries."""
    n = int(entries ** (1 / order))
    while n**order < entries:
        n += 1
    while n > 1 and (n - 1) ** order >= entries:
        n -= 1
    return n


def divided(size: int, parts: int) -> list[int]:
    """Factors of a number, so many of them, near each other, the larger ones last."""
    if parts == 1:
        return [size]
    first = max(d for d in range(1, size + 1) if d**parts <= size and size % d == 0)
    return [first, *divided(size // first, parts - 1)]


def rows(
    factors: Sequence[Tensor], core: Tensor | None, first: int, end: int
) -> Tensor:
    """Entries of the first axis from ``first`` to ``end``, [N, end - first, rest].

    Nothing of the other rows is computed.
    """
    leading, others = factors[0][:, first:end], factors[1:]
    return leading @ (_columns(others) if core is None else _grown(core, others))


class Split(NamedTuple):
    """How a slice of the flattened tensor is a matrix [O, I] between two factors."""

    rows: list[int]
    """Row of each of the leading axes in which the slice lies whole."""
    out: int
    """How many of the axes that are left are those of O."""


def split(
    sides: Sequence[int], start: int, wide_out: int, wide_in: int
) -> Split | None:
    """The factors of a slice as a matrix; None where it runs across the axes.

    Args:
        sides: n_1 to n_M.
        start: Where the slice begins.
        wide_out: O.
        wide_in: I.
    """
    picked: list[int] = []
    left = list(sides)
    while len(left) > 2:
        row, within = divmod(start, math.prod(left[1:]))
        if within + wide_out * wide_in > math.prod(left[1:]):
            break
        picked, left, start = [*picked, row], left[1:], within
    fits = [k for k in range(1, len(left)) if math.prod(left[k:]) == wide_in]
    return Split(picked, fits[0]) if fits and start == 0 else None


def matrices(
    factors: Sequence[Tensor], core: Tensor | None, split: Split
) -> tuple[Tensor, Tensor]:
    """A [N, R, I] and Bt [N, R, at least O] of a slice, whose update is Bt^T A.

    R is r for a diagonal core, and else the smaller of the ranks of the two sides.
    """
    N, _, r = factors[0].shape
    picked = [A[:, i : i + 1] for A, i in zip(factors, split.rows, strict=False)]
    others = list(factors[len(picked) :])
    outs, ins = others[: split.out], others[split.out :]
    if core is None:
        return _columns(ins), _columns([*picked, *outs])
    for row in picked:
        core = (row @ core.reshape(N, r, -1)).view(N, *[r] * (core.dim() - 2))
    middle = core.reshape(N, r ** len(outs), -1)
    if len(ins) < len(outs):
        return _grown(_one(ins), ins), _grown(middle.mT, outs)
    return _grown(middle, ins), _grown(_one(outs), outs)


def _one(factors: Sequence[Tensor]) -> Tensor:
    """Identity between the ranks of some factors, [N, r^m, r^m]."""
    first = factors[0]
    rank = first.shape[2] ** len(factors)
    one = torch.eye(rank, dtype=first.dtype, device=first.device)
    return one.expand(len(first), rank, rank)


def _grown(core: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """The last axes of a core times the factors: [N, what is left of it, rest]."""
    N, rest = len(core), 1
    for A_Nnr in reversed(factors):
        core = A_Nnr.unsqueeze(1) @ core.reshape(N, -1, A_Nnr.shape[2], rest)
        rest *= A_Nnr.shape[1]
    return core.reshape(N, -1, rest)


def _columns(factors: Sequence[Tensor]) -> Tensor:
    """Products of the columns with the same number, [N, r, rest]."""
    found = factors[-1].mT
    for A_Nnr in reversed(factors[:-1]):
        found = (A_Nnr.mT.unsqueeze(3) * found.unsqueeze(2)).flatten(2)
    return found
