"""``molora kernels tune``: measure the tiles of the Triton kernels on this GPU."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table

from molora.commands.session import notes, out
from molora.errors import ConfigError
from molora.kernels.backends import BACKENDS
from molora.kernels.configs import KERNELS, RANKS, TOKENS, WIDTHS, table_path


def tune(
    path: Path | None, kernels: Sequence[str], ranks: Sequence[int], jobs: int
) -> None:
    """Measure, write the table, and say what became faster.

    Raises:
        ConfigError: There is no GPU, Triton is missing, or an unknown kernel or rank.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "molora kernels tune times kernels on a GPU of NVIDIA or AMD, and torch "
            "finds none here. Run it on the machine that will train; without it the "
            "built-in table is used"
        )
    _known("--kernel", kernels, KERNELS)
    _known("--rank", ranks, RANKS)
    if not BACKENDS["triton"].is_installed():
        raise ConfigError("molora kernels tune needs triton: pip install triton")
    # imports triton
    from molora.kernels import tune as tuning
    from molora.kernels.triton_tiles import arch_of

    arch = arch_of(torch.device("cuda", torch.cuda.current_device()))
    path = path or table_path(arch)
    found = tuning.tune(path, kernels or KERNELS, ranks or RANKS, jobs=jobs)
    table = Table(title=f"Microseconds on {torch.cuda.get_device_name()}")
    for column in ("kernel", "rank", "tokens", "features", "tile", "before", "now"):
        table.add_column(column)
    for bucket, (config, before, now) in found.items():
        table.add_row(
            bucket.kernel,
            str(bucket.rank),
            _range(TOKENS, bucket.tokens),
            _range(WIDTHS, bucket.wide),
            ", ".join(f"{k} {v}" for k, v in config._asdict().items()),
            f"{before:.1f}",
            f"{now:.1f}",
        )
    out.print(table)
    notes.print(f"Written to {path}", style="dim")
    if path != table_path(arch):
        notes.print(f"Read by runs with MOLORA_KERNEL_TABLE={path}", style="dim")


def _known(option: str, given: Sequence[object], known: Sequence[object]) -> None:
    for value in given:
        if value not in known:
            names = ", ".join(str(name) for name in known)
            raise ConfigError(f"{option} {value}: choose from {names}")


def _range(ends: Sequence[int], place: int) -> str:
    if place == len(ends):
        return f"above {ends[-1]}"
    return f"up to {ends[place]}"
