"""Tile sizes of the Triton kernels, chosen by a table and never by autotuning.

A configuration depends on shapes only, so the launch grid of a call is fixed. The
table is keyed by architecture, kernel and bucket of the padded total rank; buckets of
the tokens and of the wide dimension refine an entry (``pick``). Every configuration
that ``pick`` can return is compiled ahead of time for its architecture
(``molora.kernels.aot``) and held to the limits of the device.
"""

import contextlib
import functools
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from molora.cache import cache_root
from molora.errors import ConfigError
from molora.kernels.tables import MEASURED, TABLES
from molora.kernels.tables import Config as Config

_VARIABLE = "MOLORA_KERNEL_TABLE"

RANKS = (16, 32, 64, 128, 256)
"""Buckets of the padded total rank; a longer rank goes in chunks of the last."""

TOKENS = (16, 128, 2048)
"""Upper ends of the token buckets; a fourth bucket holds everything above."""

WIDTHS = (1024, 4096)
"""Upper ends of the buckets of the wide dimension; a third holds everything above."""

ARCHES = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
"""Architectures that have a table."""

KERNELS = tuple(TABLES[ARCHES[0]])
"""Kernels that have a table."""

_PER_TOKEN = ("shrink_gate", "expand_add", "bwd_rank")
WITH_FACTOR = (*_PER_TOKEN, "grouped_shrink", "grouped_expand")
"""Kernels that read a factor which may have been cast."""

VARIANTS: dict[str, tuple[str, ...]] = {
    "dropout": (
        "shrink_gate",
        "expand_add",
        "wgrad",
        "grouped_shrink",
        "grouped_expand",
        "grouped_wgrad",
        "gather_shrink",
    ),
    "shared A": (
        "shrink_gate",
        "bwd_rank",
        "grouped_shrink",
        "grouped_expand",
        "gather_shrink",
    ),
    "shared B": (
        "shrink_gate",
        "bwd_rank",
        "grouped_shrink",
        "grouped_expand",
        "gather_expand",
    ),
}
"""Kernels whose code differs with a mask, or where all experts share a factor."""

# kernel -> token bucket -> width bucket -> programs per reduction
_SPLITS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "shrink_gate": ((8, 8, 8), (4, 4, 4), (2, 2, 2), (1, 1, 1)),
    "bwd_rank": ((8, 8, 8), (4, 4, 4), (2, 2, 2), (1, 1, 1)),
    "wgrad": ((1, 1, 1), (1, 1, 1), (4, 2, 1), (8, 4, 1)),
    "gather_shrink": ((2, 8, 16), (1, 2, 4), (1, 1, 1), (1, 1, 1)),
}

# column tiles per program, by token bucket
_COLUMNS = (1, 1, 4, 4)

_FORCED: dict[str, Config] = {}


def pick(
    kernel: str, arch: str, rank: int, tokens: int, wide: int, itemsize: int = 2
) -> Config:
    """Configuration of one launch.

    Args:
        kernel: A name in ``KERNELS``.
        arch: ``sm_`` and the compute capability, or the name AMD gives. One without a
            table takes that of its family: AMD's ``gfx942``, NVIDIA's ``sm_100`` from
            there on in the same generation, otherwise ``sm_89``, which needs least.
        rank: Padded total rank of one tile, at most 256; of one expert for the
            gather and grouped kernels.
        tokens: Number of tokens T.
        wide: I or O, the wide dimension the kernel walks.
        itemsize: Bytes of one element of the inputs: 2 or 4.
    """
    if kernel in _FORCED:
        return _FORCED[kernel]
    return _pick(kernel, arch, rank, tokens, wide, itemsize)


@functools.lru_cache(4096)
def _pick(
    kernel: str, arch: str, rank: int, tokens: int, wide: int, itemsize: int
) -> Config:
    bucket = bucket_of(kernel, rank, tokens, wide, itemsize)
    return measured(arch).get(bucket) or _config(kernel, table_of(arch), *bucket[1:])


class Bucket(NamedTuple):
    """Calls that share a configuration."""

    kernel: str
    rank: int
    """One of ``RANKS``."""
    tokens: int
    """Place in ``TOKENS``."""
    wide: int
    """Place in ``WIDTHS``."""
    itemsize: int


def bucket_of(kernel: str, rank: int, tokens: int, wide: int, itemsize: int) -> Bucket:
    """Bucket of a launch; arguments as in ``pick``."""
    row = RANKS[_bucket(RANKS[:-1], rank)]
    return Bucket(kernel, row, _bucket(TOKENS, tokens), _bucket(WIDTHS, wide), itemsize)


def table_path(arch: str) -> Path:
    """File of the measured table of an architecture: MOLORA_KERNEL_TABLE, or cached."""
    given = os.environ.get(_VARIABLE)
    return Path(given) if given else cache_root() / "kernels" / f"{arch}.json"


@functools.cache
def measured(arch: str) -> dict[Bucket, Config]:
    """What ``molora kernels tune`` found for an architecture; it goes before the table.

    Raises:
        ConfigError: The file is no such table, or one of another architecture, or
            MOLORA_KERNEL_TABLE names none.
    """
    path = table_path(arch)
    if path.is_file():
        return read_table(path, arch)
    if os.environ.get(_VARIABLE):
        raise ConfigError(f"{_VARIABLE}: {path} is no file")
    return {}


def read_table(path: Path, arch: str) -> dict[Bucket, Config]:
    """Read what ``molora kernels tune`` wrote.

    Raises:
        ConfigError: The file is no such table, or one of another architecture.
    """
    try:
        raw = json.loads(path.read_text("utf-8"))
        found = {Bucket(*row["bucket"]): Config(*row["config"]) for row in raw["rows"]}
        made_for = raw["arch"]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: no table of kernel configurations ({error}); delete it, or make "
            "it again with: molora kernels tune"
        ) from None
    if made_for != arch:
        raise ConfigError(
            f"{path}: measured on {made_for}, and this device is {arch}; name another "
            "file"
        )
    return found


def table_of(arch: str) -> str:
    """Architecture whose table an architecture takes."""
    if arch in ARCHES:
        return arch
    if arch.startswith("gfx"):
        return "gfx942"
    return "sm_100" if arch in ("sm_101", "sm_103") else "sm_89"


def _bucket(ends: tuple[int, ...], size: int) -> int:
    return sum(size > end for end in ends)


@functools.cache
def _config(
    kernel: str, arch: str, row: int, tokens: int, wide: int, itemsize: int
) -> Config:
    """Configuration of one set of buckets."""
    timed = MEASURED.get(arch, {}).get(kernel, {}).get(row)
    if timed and itemsize == 2 and tokens >= 2:
        return timed[tokens - 2]
    BM, BN, warps, stages = TABLES[arch][kernel][RANKS.index(row)]
    if itemsize == 4 and BM > 1:
        # products of float32 run on the ordinary units, whose operands sit in registers
        BM, BN, warps, stages = 32, 32, 4 if arch == "gfx942" else 8, 2
        if kernel == "grouped_wgrad":
            BM = 16
    elif kernel in _PER_TOKEN:
        # fewer tokens: more programs; kernels that walk the tokens mask instead
        if tokens == 0:
            # a warp of AMD is twice as wide, and half of one would load narrowly
            BM, warps = 16, 2 if arch == "gfx942" else 4
        BM = min(BM, 64) if tokens < len(TOKENS) else BM
    split = _SPLITS[kernel][tokens][wide] if kernel in _SPLITS else 1
    columns = _COLUMNS[tokens] if kernel == "expand_add" else 1
    return Config(BM, BN, warps, stages, split, columns)


def experts_of(kernel: str, rank: int) -> tuple[int, int]:
    """Experts, and rank of one, that make a tile of a padded rank."""
    if kernel.startswith(("gather", "grouped")):
        return 64, rank
    r = 8 if rank <= 64 else 16
    return rank // r, r


class Entry(NamedTuple):
    """A configuration that ``pick`` gives, and what it is compiled for."""

    kernel: str
    arch: str
    rank: int
    itemsize: int
    is_cast: bool
    """Whether 32-bit factors are cast to the 16 bits of the inputs, see ``casts``."""
    config: Config
    variant: str = ""
    """A name in ``VARIANTS``, or empty for separate factors without a mask."""

    @property
    def key(self) -> str:
        """Name in the table of compiled kernels."""
        c = self.config
        return (
            f"{self.kernel} {self.arch} rank {self.rank} {8 * self.itemsize}-bit "
            f"{c.BM}x{c.BN} warps {c.warps} stages {c.stages} columns {c.columns}"
            f"{' cast' if self.is_cast else ''}"
            f"{' ' if self.variant else ''}{self.variant}"
        )


def casts(tokens: int) -> bool:
    """Whether casting a factor once beats casting it in every program."""
    return tokens > TOKENS[1]


def entries() -> Iterator[Entry]:
    """Every distinct entry.

    Ranks that share a tile count once, as the largest of them; so do splits, which
    change the grid, and make a tile no larger.
    """
    for kernel, arch, itemsize in itertools.product(KERNELS, ARCHES, (2, 4)):
        ranks: dict[tuple[Config, bool], int] = {}
        for rank, tokens in itertools.product(RANKS, range(len(TOKENS) + 1)):
            config = _config(kernel, arch, rank, tokens, 1, itemsize)._replace(split=1)
            last = kernel in WITH_FACTOR and tokens >= 2 and itemsize == 2
            ranks[config, last] = max(rank, ranks.get((config, last), 0))
        for (config, is_cast), rank in ranks.items():
            yield Entry(kernel, arch, rank, itemsize, is_cast, config)


def variants() -> Iterator[Entry]:
    """The largest tile of each kernel in each of its variants, for 16-bit inputs."""
    arches = [arch for arch in ARCHES if arch != "sm_89"]
    for variant, kernels in VARIANTS.items():
        for kernel, arch in itertools.product(kernels, arches):
            config = _config(kernel, arch, RANKS[-1], len(TOKENS), 1, 2)
            is_cast = kernel in WITH_FACTOR
            one = config._replace(split=1)
            yield Entry(kernel, arch, RANKS[-1], 2, is_cast, one, variant)


@contextlib.contextmanager
def forced(kernel: str, config: Config) -> Iterator[None]:
    """Make ``pick`` return config for kernel: to compile or to measure a candidate."""
    _FORCED[kernel] = config
    try:
        yield
    finally:
        del _FORCED[kernel]
