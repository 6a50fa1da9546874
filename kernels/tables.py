"""Tile sizes of the Triton kernels by architecture: what ``configs.pick`` chooses from.

Those of an H100 were measured (``molora.kernels.tune``); the others follow from the
sizes of registers and shared memory, and are compiled ahead of time for their device.
"""

from typing import NamedTuple


class Config(NamedTuple):
    """How one kernel is launched.

    BM counts rows of tokens and BN columns of the wide dimension in one tile; split
    is the number of programs that share the experts of the same tokens
    (``shrink_gate``, ``bwd_rank``), the sum over the tokens (``wgrad``) or
    over the wide dimension (``gather_shrink``); columns is the number of column tiles
    that one program writes (``expand_add``).
    """

    BM: int
    BN: int
    warps: int
    stages: int
    split: int = 1
    columns: int = 1


Tile = tuple[int, int, int, int]

# kernel -> rank bucket -> BM, BN, warps, stages for many tokens and 16-bit inputs;
# the factors are float32, which is what fills the shared memory
_Tiles = dict[str, tuple[Tile, Tile, Tile, Tile, Tile]]

_GATHER: _Tiles = dict.fromkeys(
    ("gather_shrink", "gather_expand"),
    ((1, 256, 4, 2), (1, 128, 4, 2), (1, 128, 4, 2), (1, 64, 8, 2), (1, 32, 8, 2)),
)

_AMPERE: _Tiles = {
    "shrink_gate": (
        (128, 64, 4, 3),
        (128, 64, 4, 3),
        (128, 64, 8, 3),
        (128, 64, 8, 3),
        (64, 64, 8, 2),
    ),
    "expand_add": (
        (128, 128, 8, 2),
        (128, 128, 8, 2),
        (128, 128, 8, 2),
        (64, 128, 8, 2),
        (64, 64, 8, 2),
    ),
    "bwd_rank": (
        (128, 64, 4, 3),
        (128, 64, 4, 3),
        (128, 64, 8, 3),
        (128, 64, 8, 3),
        (64, 64, 8, 2),
    ),
    "wgrad": (
        (64, 128, 4, 3),
        (64, 128, 4, 3),
        (64, 128, 8, 3),
        (64, 128, 8, 3),
        (64, 64, 8, 2),
    ),
    "grouped_shrink": (
        (64, 64, 4, 3),
        (64, 64, 4, 3),
        (64, 64, 4, 3),
        (64, 64, 8, 3),
        (64, 64, 8, 2),
    ),
    "grouped_expand": (
        (64, 64, 4, 2),
        (64, 64, 4, 2),
        (64, 64, 4, 2),
        (64, 64, 8, 2),
        (64, 64, 8, 2),
    ),
    "grouped_wgrad": (
        (64, 128, 8, 3),
        (64, 128, 8, 3),
        (64, 128, 8, 3),
        (64, 128, 8, 3),
        (64, 64, 8, 2),
    ),
    **_GATHER,
}

_HOPPER: _Tiles = {
    "shrink_gate": (
        (128, 64, 4, 4),
        (128, 64, 4, 4),
        (128, 64, 8, 4),
        (128, 64, 8, 4),
        (128, 64, 8, 2),
    ),
    "expand_add": (
        (128, 128, 8, 3),
        (128, 128, 8, 3),
        (128, 128, 8, 3),
        (128, 128, 8, 2),
        (64, 64, 8, 2),
    ),
    "bwd_rank": (
        (128, 64, 4, 4),
        (128, 64, 4, 4),
        (128, 64, 8, 4),
        (128, 64, 8, 4),
        (64, 64, 8, 3),
    ),
    "wgrad": (
        (64, 128, 4, 4),
        (64, 128, 4, 4),
        (64, 128, 8, 4),
        (64, 128, 8, 4),
        (64, 128, 8, 3),
    ),
    "grouped_shrink": (
        (64, 64, 4, 4),
        (64, 64, 4, 4),
        (64, 64, 4, 4),
        (64, 64, 8, 4),
        (64, 64, 8, 3),
    ),
    "grouped_expand": (
        (64, 128, 8, 2),
        (64, 128, 8, 2),
        (64, 128, 8, 2),
        (64, 128, 8, 2),
        (64, 32, 8, 2),
    ),
    "grouped_wgrad": (
        (64, 128, 4, 3),
        (64, 128, 4, 3),
        (64, 128, 8, 3),
        (64, 128, 8, 3),
        (64, 64, 8, 2),
    ),
    **_GATHER,
}

# less shared memory than the others
_ADA: _Tiles = _AMPERE | {
    "expand_add": (
        (128, 128, 8, 2),
        (128, 128, 8, 2),
        (128, 64, 8, 2),
        (64, 64, 8, 2),
        (64, 32, 8, 2),
    ),
    "wgrad": (
        (64, 128, 4, 3),
        (64, 128, 4, 3),
        (64, 128, 8, 2),
        (64, 128, 8, 2),
        (64, 64, 8, 2),
    ),
    "grouped_expand": (
        (64, 64, 4, 2),
        (64, 64, 4, 2),
        (64, 64, 4, 2),
        (64, 64, 8, 2),
        (64, 32, 8, 2),
    ),
}

_CDNA: _Tiles = {
    "shrink_gate": (
        (128, 64, 4, 2),
        (128, 64, 4, 2),
        (128, 64, 8, 2),
        (128, 64, 8, 2),
        (64, 32, 8, 2),
    ),
    "expand_add": (
        (128, 128, 8, 2),
        (128, 128, 8, 2),
        (128, 64, 8, 2),
        (64, 64, 8, 2),
        (64, 32, 8, 1),
    ),
    "bwd_rank": (
        (128, 64, 4, 2),
        (128, 64, 4, 2),
        (128, 64, 8, 2),
        (128, 64, 8, 2),
        (64, 32, 8, 2),
    ),
    "wgrad": (
        (64, 128, 4, 2),
        (64, 128, 4, 2),
        (64, 128, 8, 2),
        (64, 128, 8, 2),
        (64, 64, 8, 2),
    ),
    "grouped_shrink": (
        (64, 64, 4, 2),
        (64, 64, 4, 2),
        (64, 64, 4, 2),
        (64, 64, 8, 2),
        (64, 32, 8, 2),
    ),
    "grouped_expand": (
        (64, 64, 4, 2),
        (64, 64, 4, 2),
        (64, 64, 4, 2),
        (64, 64, 8, 1),
        (64, 32, 8, 2),
    ),
    "grouped_wgrad": (
        (64, 128, 4, 2),
        (64, 128, 4, 2),
        (64, 128, 8, 2),
        (64, 128, 8, 2),
        (64, 64, 8, 2),
    ),
    **_GATHER,
}

# fastest of the candidates of molora.kernels.tune on an H100, for 4096 features:
# kernel -> rank bucket -> configurations for 129 to 2048 tokens, and for more
_H100: dict[str, dict[int, tuple[Config, Config]]] = {
    "shrink_gate": {
        64: (Config(64, 64, 8, 4, 2), Config(64, 128, 4, 4)),
        128: (Config(64, 64, 8, 4, 2), Config(64, 128, 8, 4)),
        256: (Config(64, 32, 8, 4, 2), Config(64, 64, 4, 4)),
    },
    "bwd_rank": {
        64: (Config(64, 64, 4, 4, 2), Config(64, 128, 4, 4)),
        128: (Config(64, 64, 8, 4, 2), Config(64, 128, 8, 4)),
        256: (Config(64, 64, 8, 4, 2), Config(64, 64, 8, 4)),
    },
    "expand_add": {
        64: (Config(64, 64, 4, 3, columns=4), Config(64, 128, 8, 4)),
        128: (Config(64, 64, 4, 2, columns=4), Config(128, 64, 8, 4, columns=8)),
        256: (Config(64, 64, 4, 2, columns=8), Config(64, 64, 4, 2, columns=4)),
    },
    "wgrad": {
        64: (Config(64, 64, 4, 4, 2), Config(128, 64, 4, 4, 2)),
        128: (Config(128, 64, 4, 3, 2), Config(128, 64, 4, 4, 2)),
        256: (Config(64, 64, 4, 4, 2), Config(64, 64, 4, 4, 2)),
    },
    "grouped_shrink": {16: (Config(64, 128, 4, 4), Config(64, 128, 4, 3))},
    "grouped_expand": {16: (Config(32, 256, 4, 4), Config(32, 256, 4, 3))},
    "grouped_wgrad": {16: (Config(32, 256, 4, 2), Config(32, 128, 4, 2))},
}

# a mask or a shared factor would spill in the largest tiles of Hopper
_BLACKWELL: _Tiles = _HOPPER | {
    "expand_add": (*_HOPPER["expand_add"][:-1], (64, 32, 8, 2)),
    "grouped_expand": (*_HOPPER["grouped_expand"][:-1], (64, 64, 8, 2)),
}

MEASURED = {"sm_90": _H100}
"""Measured configurations, which go before the table of an architecture."""

TABLES: dict[str, _Tiles] = {
    "sm_80": _AMPERE,
    "sm_89": _ADA,
    "sm_90": _HOPPER,
    "sm_100": _BLACKWELL,
    "gfx942": _CDNA,
}
"""Tiles of every kernel for many tokens and 16-bit inputs, by rank bucket."""
