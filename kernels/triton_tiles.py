"""Parts of the Triton kernels: tiles of rank space, the mask of dropout, launches.

A tile of rank space is ``EC`` whole experts, each padded to ``RP`` columns inside the
tile only: in memory rank space is [T, E * r] without padding. More experts than one
tile holds go in chunks. Factors are master parameters and are cast as they are loaded.

Shape legend
    T tokens   E experts   r rank of one expert   BM rows of a tile
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from molora.kernels.configs import Config, casts, pick

MAX_RANK = 256
"""Rank columns that one tile holds, and so the longest rank of one expert."""


class Tile(NamedTuple):
    """A tile of rank space: EC experts of RP columns, and how many tiles there are."""

    EC: int
    RP: int
    chunks: int


# triton's own helpers of these names cost microseconds, which a launch feels
def cdiv(a: int, b: int) -> int:
    """Quotient, rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """Least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@functools.cache
def tile(experts: int, r: int, limit: int = MAX_RANK, least: int = 1) -> Tile:
    """Cut experts into tiles of at most limit columns, padded to powers of two.

    Args:
        experts: Experts in rank space.
        r: Rank of one of them, at most ``MAX_RANK``.
        limit: Columns of a tile; one expert is never cut.
        least: Fewest columns of one expert.

    Returns:
        The tile; it has at least the 16 columns that a matrix instruction needs.
    """
    columns = max(power_of_2(r), least)
    held = min(power_of_2(experts), max(1, max(limit, 16) // columns))
    return Tile(held, max(columns, 16 // held), cdiv(experts, held))


@functools.cache
def arch_of(device: torch.device) -> str:
    """Architecture of a device in the words of the table of configurations."""
    if device.type != "cuda":
        # the interpreter and shape inference have none; any will do
        return "sm_90"
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def interpreted() -> bool:
    """Whether kernels run in the interpreter, on tensors of the CPU."""
    return bool(knobs.runtime.interpret)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: dict[str, Tensor | None],
    config: Config,
    **settings: Any,
) -> None:
    """Launch a kernel on the device of its tensors."""
    device = next(t.device for t in tensors.values() if t is not None)
    if device.type != "cuda":
        _first_launch(kernel, grid, tensors | settings, config)
    elif device.index == torch.cuda.current_device():
        _launch(kernel, grid, tensors, settings, config, device.index)
    else:
        # triton launches on the current device, not on that of the tensors
        with torch.cuda.device(device):
            _launch(kernel, grid, tensors, settings, config, device.index)


_FREE = {"T", "seed", "slot", "blocks", "pairs", "p", "scale", "heat"}
"""Arguments whose value has no part in what is compiled."""

_REMEMBERED = 4096
"""Compiled kernels kept at hand; triton keeps all of them."""

_compiled: dict[tuple[object, ...], Any] = {}


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: dict[str, Tensor | None],
    settings: dict[str, Any],
    config: Config,
    device: int,
) -> None:
    """Launch what was compiled for such arguments, past triton's own look at each.

    That look takes several times as long as a launch. The key holds what it reads:
    dtypes, whether pointers are multiples of 16 and, on AMD, whether they reach beyond
    2 GiB, sizes, and constants.
    """
    # a jitted function makes its hash anew each time, the function in it does not
    parts = [kernel.fn, config, device, settings.get("seed", 0) >> 31 > 0]
    parts += [t if t is None else _pointer(t) for t in tensors.values()]
    parts += [value for name, value in settings.items() if name not in _FREE]
    key = tuple(parts)
    given = tensors | settings
    known = _compiled.get(key)
    if known is None:
        if len(_compiled) >= _REMEMBERED:
            _compiled.clear()
        _compiled[key] = _first_launch(kernel, grid, given, config)
    else:
        known[(*grid, 1, 1)[:3]](*[given[name] for name in kernel.arg_names])


def _pointer(t: Tensor) -> tuple[torch.dtype, int, bool]:
    far = torch.version.hip is not None and t.untyped_storage().nbytes() >= 2**31
    return t.dtype, t.data_ptr() % 16, far


def _first_launch(
    kernel: Any, grid: tuple[int, ...], given: dict[str, Any], config: Config
) -> Any:
    return kernel[grid](**given, num_warps=config.warps, num_stages=config.stages)


def configure(kernel: str, wide_in: Tensor, cut: Tile) -> Config:
    """Configuration of a kernel that walks the rows of wide_in."""
    rows, wide = wide_in.shape
    arch = arch_of(wide_in.device)
    return pick(kernel, arch, cut.EC * cut.RP, rows, wide, wide_in.element_size())


def unit_stride(x: Tensor) -> Tensor:
    """Rows that are contiguous in themselves, at any distance of each other."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def ready(factor: Tensor, narrow: Tensor) -> Tensor:
    """A contiguous factor, in the dtype of rank space where many tokens share the cast.

    Every program of a kernel reads the whole factor, from the second-level cache: half
    the bytes, and no conversion on the way to the matrix units.
    """
    if factor.dtype != narrow.dtype and casts(narrow.shape[0]):
        factor = factor.to(narrow.dtype)
    return factor.contiguous()


@triton.jit  # type: ignore[untyped-decorator]
def rank_columns(first, E: tl.constexpr, r: tl.constexpr, EC, RP):  # type: ignore[no-untyped-def]
    """Place of every rank column of a tile in memory, and whether it exists."""
    column = tl.arange(0, EC * RP)
    if r == RP:
        # without a division the compiler sees that columns are contiguous
        place = first * r + column
        exists = place < E * r
    else:
        place = (first + column // RP) * r + column % RP
        exists = (first + column // RP < E) & (column % RP < r)
    return place, exists


@triton.jit
def keep(seed, p, rows, columns, wide):  # type: ignore[no-untyped-def]
    """Dropout mask of a tile; 64-bit offsets, so that none repeats."""
    return tl.rand(seed, rows[:, None] * wide + columns[None, :]) >= p


@triton.jit  # type: ignore[untyped-decorator]
def gate_tile(gates, rows, live, first, E: tl.constexpr, EC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gates of a tile as [BM, EC]: one row load, spread over the ranks by reshape."""
    expert = first + tl.arange(0, EC)
    exists = live[:, None] & (expert < E)[None, :]
    if gates is None:
        tile = tl.where(exists, 1.0, 0.0)
    else:
        tile = tl.load(gates + rows[:, None] * E + expert[None, :], exists, other=0.0)
    return tile


@triton.jit  # type: ignore[untyped-decorator]
def scale_tile(scales, scale, first, E: tl.constexpr, EC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scale of each expert of a tile, [EC]."""
    expert = first + tl.arange(0, EC)
    if scales is None:
        tile = tl.full((EC,), 1.0, tl.float32) * scale
    else:
        tile = tl.load(scales + expert, expert < E, other=0.0)
    return tile


@triton.jit  # type: ignore[untyped-decorator]
def project(  # type: ignore[no-untyped-def]
    wide_in,
    stride,
    factor,
    wide,
    rows,
    live,
    first,
    seed,
    p,
    DTYPE: tl.constexpr,
    E: tl.constexpr,
    r: tl.constexpr,
    EC: tl.constexpr,
    RP: tl.constexpr,
    EVEN: tl.constexpr,
    DROP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Rows of a wide matrix times the factors of one tile of experts, [BM, EC * RP]."""
    place, exists = rank_columns(first, E, r, EC, RP)
    step = tl.arange(0, BN)
    in_at = wide_in + rows[:, None] * stride + step[None, :]
    factor_at = factor + place[:, None] * wide + step[None, :]
    acc = tl.zeros((BM, EC * RP), dtype=tl.float32)
    for at in range(0, wide, BN):
        if EVEN:
            values = tl.load(in_at, live[:, None], other=0.0)
            factors = tl.load(factor_at, exists[:, None], other=0.0)
        else:
            inside = (at + step < wide)[None, :]
            values = tl.load(in_at, live[:, None] & inside, other=0.0)
            factors = tl.load(factor_at, exists[:, None] & inside, other=0.0)
        if DROP:
            values = tl.where(keep(seed, p, rows, at + step, wide), values, 0.0)
        acc = tl.dot(
            values.to(DTYPE),
            tl.trans(factors.to(DTYPE)),
            acc,
            input_precision="ieee",
        )
        in_at += BN
        factor_at += BN
    if DROP:
        acc = acc / (1.0 - p)
    return acc


@triton.jit  # type: ignore[untyped-decorator]
def put(out, value, rows, live, first, E: tl.constexpr, r: tl.constexpr, EC, RP):  # type: ignore[no-untyped-def]
    """Store one tile of rank space, [BM, EC * RP], without its padding."""
    place, exists = rank_columns(first, E, r, EC, RP)
    at = out + rows[:, None] * (E * r) + place[None, :]
    tl.store(at, value.to(out.dtype.element_ty), live[:, None] & exists[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def get(source, rows, live, first, E: tl.constexpr, r: tl.constexpr, EC, RP):  # type: ignore[no-untyped-def]
    """Load one tile of rank space; zero where there is none."""
    place, exists = rank_columns(first, E, r, EC, RP)
    at = source + rows[:, None] * (E * r) + place[None, :]
    return tl.load(at, live[:, None] & exists[None, :], other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def emit(  # type: ignore[no-untyped-def]
    out,
    product,
    total,
    rows,
    live,
    first,
    SHARED: tl.constexpr,
    E: tl.constexpr,
    r: tl.constexpr,
    EC: tl.constexpr,
    RP: tl.constexpr,
    BM: tl.constexpr,
):
    """Store a tile [BM, EC, RP]; where all experts share the factor, sum it."""
    if out is not None:
        if SHARED:
            total += tl.sum(product, axis=1)
        else:
            flat = tl.reshape(product, (BM, EC * RP))
            put(out, flat, rows, live, first, E, r, EC, RP)
    return total
