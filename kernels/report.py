"""Print what the compilers make of every Triton kernel, and hold it to a table.

    python -m molora.kernels.report TABLE.json            compile, print, compare
    python -m molora.kernels.report TABLE.json --update   and write the table anew
    python -m molora.kernels.report TABLE.json --only X   only rows that contain X

It needs no GPU. It fails if a configuration does not fit its device, or if the code
that was made differs from the table.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
from pathlib import Path

import triton
from rich.console import Console
from rich.table import Table
from triton import knobs

from molora.errors import ConfigError
from molora.kernels.aot import compiled, launches, traffic_of
from molora.kernels.configs import ARCHES, RANKS, Entry, entries, variants
from molora.kernels.machine_code import DENSE, TARGETS, Numbers, faults
from molora.kernels.triton_dense_backward import SUM
from molora.kernels.triton_route import LAUNCH as ROUTE
from molora.kernels.triton_topk import ONE, TILES

FIXED = [
    ("sum_parts", RANKS[-1], SUM),
    ("route_count", 16, ROUTE),
    ("route_place", 16, ROUTE),
    ("topk_gates", 16, ONE),
    *((kernel, EP, way) for kernel, ways in TILES.items() for EP, way in ways.items()),
]
"""Kernels without a table of their own: name, rank or experts, how it is launched."""


def rows() -> list[Entry]:
    """Every configuration that is shipped."""
    others = [
        Entry(kernel, arch, rank, 2, False, way)
        for kernel, rank, way in FIXED
        for arch in ARCHES
    ]
    return [*entries(), *variants(), *others]


def load(path: Path) -> dict[str, Numbers]:
    """Read a table.

    Raises:
        ConfigError: The table is of another version of Triton.
    """
    table = json.loads(path.read_text())
    if table["triton"] != triton.__version__:
        raise ConfigError(
            f"{path} was made with Triton {table['triton']} and this is "
            f"{triton.__version__}; look at the differences and use --update"
        )
    return {key: Numbers(**numbers) for key, numbers in table["rows"].items()}


def save(path: Path, found: dict[str, Numbers]) -> None:
    """Write a table, one row a line."""
    lines = [
        f"    {json.dumps(key)}: {json.dumps(numbers._asdict())}"
        for key, numbers in found.items()
    ]
    head = f'{{\n  "triton": "{triton.__version__}",\n  "rows": {{\n'
    path.write_text(head + ",\n".join(lines) + "\n  }\n}\n")


def differences(
    wanted: dict[str, Numbers], found: dict[str, Numbers], is_whole: bool
) -> list[str]:
    """How what was compiled differs from the table."""
    reasons = [f"{key}: not in the table" for key in found.keys() - wanted.keys()]
    if is_whole:
        missing = wanted.keys() - found.keys()
        reasons += [f"{key}: in the table, but not shipped" for key in missing]
    for key in found.keys() & wanted.keys():
        for name, was, now in zip(
            Numbers._fields, wanted[key], found[key], strict=True
        ):
            if was != now:
                reasons.append(f"{key}: {name} is {now}, in the table {was}")
    return sorted(reasons)


def compile_all(chosen: list[Entry], jobs: int) -> dict[str, Numbers]:
    """Compile rows, several at a time."""
    if jobs == 1:
        return {row.key: compiled(row) for row in chosen}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        made = pool.map(compiled, chosen, chunksize=4)
        return dict(zip((row.key for row in chosen), made, strict=True))


def render(chosen: list[Entry], found: dict[str, Numbers]) -> Table:
    """The one table of all rows.

    Launches are those of the pass that a kernel belongs to, with every gradient.
    """
    table = Table(title=f"Triton {triton.__version__}, compiled without a GPU")
    head = ("kernel", "target", "rank", "bits", "tile", "warps", "stages", "registers")
    tail = ("spills", "shared / limit", "matrix", "16 B", "8 B", "4 B", "1-2 B")
    for name in (*head, *tail, "atomics", "launches", "bytes / floor"):
        table.add_column(name, no_wrap=True)
    passes = {kernel: launches(kernel) for kernel in {row.kernel for row in chosen}}
    for row in chosen:
        n, c = found[row.key], row.config
        columns = f"x{c.columns}" if c.columns > 1 else ""
        bits = f"{8 * row.itemsize}{' cast' if row.is_cast else ''}"
        kernel = f"{row.kernel} {row.variant}".strip()
        place = (kernel, row.arch, row.rank, bits)
        tile = (f"{c.BM}x{c.BN}{columns}", c.warps, c.stages, n.registers, n.spills)
        shared = f"{n.shared} / {TARGETS[row.arch].shared}"
        memory = (shared, f"{n.mmas} {n.mma}".strip(), n.wide, n.middle, n.narrow)
        counts = (n.tiny, n.atomics, passes[row.kernel], _ratio(row))
        table.add_row(*(str(cell) for cell in (*place, *tile, *memory, *counts)))
    return table


def _ratio(row: Entry) -> str:
    """Bytes moved over the least possible, of kernels whose reads shapes decide."""
    counted = traffic_of(row) if row.kernel in DENSE and not row.variant else None
    return "" if counted is None else f"{counted.moved / counted.floor:.2f}"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Raises:
        ConfigError: The interpreter is switched on, so nothing can be compiled.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    if knobs.runtime.interpret:
        raise ConfigError("TRITON_INTERPRET is set: unset it to compile the kernels")
    # numbers must not change with the default of a later Triton
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    is_whole = not options.only
    chosen = [
        row
        for row in rows()
        if is_whole or any(part in row.key for part in options.only)
    ]
    found = compile_all(chosen, options.jobs)
    Console(width=210).print(render(chosen, found))
    reasons = [
        f"{row.key}: {reason}"
        for row in chosen
        for reason in faults(
            row.kernel, row.arch, row.itemsize, row.config, found[row.key], row.variant
        )
    ]
    if options.update:
        kept = {} if is_whole else load(options.table)
        save(options.table, kept | found)
    else:
        reasons += differences(load(options.table), found, is_whole)
    sys.exit("\n".join(reasons) or None)


if __name__ == "__main__":
    main()
