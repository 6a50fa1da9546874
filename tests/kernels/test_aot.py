"""The kernels compiled for devices that are not here, against a committed table."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from molora.errors import ConfigError
from molora.kernels import (
    report,
    triton_dense_backward,
    triton_dense_forward,
    triton_gather,
    triton_grouped_kernels,
)
from molora.kernels.configs import (
    ARCHES,
    KERNELS,
    VARIANTS,
    Config,
    entries,
    pick,
    table_of,
    variants,
)
from molora.kernels.machine_code import TARGETS, Numbers, faults

TABLE = Path(__file__).with_name("aot_table.json")

GOOD = Numbers(
    registers=118,
    spills=0,
    shared=131072,
    mma="wgmma",
    mmas=4,
    wide=49,
    middle=0,
    narrow=0,
    tiny=0,
    atomics=0,
)
CONFIG = Config(128, 64, 8, 4)


@pytest.fixture(scope="module")
def table() -> dict[str, Numbers]:
    return report.load(TABLE)


def test_table_has_every_configuration_that_is_shipped(
    table: dict[str, Numbers],
) -> None:
    assert table.keys() == {row.key for row in report.rows()}, (
        "run: make kernels, or python -m molora.kernels.report TABLE --update"
    )


def test_every_configuration_fits_its_device(table: dict[str, Numbers]) -> None:
    for row in report.rows():
        numbers = table[row.key]
        what = (row.kernel, row.arch, row.itemsize, row.config, numbers, row.variant)
        reasons = faults(*what)
        assert not reasons, row.key


def test_every_setting_that_changes_a_kernel_has_its_variants() -> None:
    modules = (
        triton_dense_forward,
        triton_dense_backward,
        triton_gather,
        triton_grouped_kernels,
    )
    shared, dropped = set(), set()
    for kernel in KERNELS:
        (made,) = [getattr(m, kernel) for m in modules if hasattr(m, kernel)]
        names = inspect.signature(made.fn).parameters
        if "DROP" in names:
            dropped.add(kernel)
        if {"SHARED", "A_SHARED", "B_SHARED"} & names.keys():
            shared.add(kernel)
    assert dropped == set(VARIANTS["dropout"]) and len(dropped) == 7
    assert shared == {*VARIANTS["shared A"], *VARIANTS["shared B"]}
    keys = {row.key for row in variants()}
    assert len(keys) == 4 * sum(len(kernels) for kernels in VARIANTS.values()) == 68


def test_pick_gives_nothing_that_was_not_compiled() -> None:
    shipped = {(e.kernel, e.arch, e.itemsize, e.config) for e in entries()}
    sizes = [1, 16, 17, 128, 129, 2048, 2049, 9999]
    for kernel in KERNELS:
        for arch in ARCHES:
            for rank in (16, 32, 64, 128, 256):
                for tokens in sizes:
                    for wide in (8, 1024, 4096, 14336):
                        for size in (2, 4):
                            config = pick(kernel, arch, rank, tokens, wide, size)
                            one = config._replace(split=1)
                            assert (kernel, arch, size, one) in shipped


def test_other_architectures_take_the_table_of_their_family() -> None:
    assert table_of("sm_86") == table_of("sm_120") == "sm_89"
    assert table_of("sm_103") == "sm_100"
    assert table_of("gfx950") == "gfx942"
    assert set(TARGETS) == set(ARCHES)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"shared": 232449}, "shared memory"),
        ({"registers": 256}, "registers"),
        ({"spills": 8}, "spills"),
        ({"atomics": 1}, "atomics"),
        ({"wide": 0}, "no access of 16 bytes"),
        ({"mma": "mma"}, "not wgmma"),
        ({"mma": ""}, "no matrix instruction"),
        ({"narrow": 2}, "4 bytes"),
        ({"tiny": 1}, "2 bytes"),
    ],
)
def test_what_is_unfit(change: dict[str, int | str], reason: str) -> None:
    assert faults("shrink_gate", "sm_90", 2, CONFIG, GOOD) == []
    bad = GOOD._replace(**change)  # type: ignore[arg-type]
    found = faults("shrink_gate", "sm_90", 2, CONFIG, bad)
    assert any(reason in one for one in found)
    few = faults("shrink_gate", "sm_90", 2, CONFIG, bad, "shared A")
    assert (few == []) == (reason in ("4 bytes", "2 bytes"))


def test_differences_name_row_and_number() -> None:
    other = {"a": GOOD._replace(spills=4), "b": GOOD}
    found = report.differences({"a": GOOD, "c": GOOD}, other, is_whole=True)
    assert found == [
        "a: spills is 4, in the table 0",
        "b: not in the table",
        "c: in the table, but not shipped",
    ]


def test_table_is_written_as_it_is_read(tmp_path: Path) -> None:
    report.save(tmp_path / "table.json", {"a": GOOD, "b": GOOD._replace(mma="")})
    found = report.load(tmp_path / "table.json")
    assert found == {"a": GOOD, "b": GOOD._replace(mma="")}
    text = (tmp_path / "table.json").read_text()
    (tmp_path / "table.json").write_text(text.replace('"triton": "', '"triton": "0'))
    with pytest.raises(ConfigError, match="--update"):
        report.load(tmp_path / "table.json")


def test_compiled_code_equals_the_table(tmp_path: Path) -> None:
    # one configuration of each kernel for Hopper, one kernel for each other device
    chosen = ["sm_90 rank 128 16-bit"]
    chosen += [
        f"shrink_gate {arch} rank 128 16-bit 128x64"
        for arch in ("sm_80", "sm_100", "gfx942")
    ]
    command = [sys.executable, "-m", "molora.kernels.report", str(TABLE)]
    for part in chosen:
        command += ["--only", part]
    environment = dict(os.environ, TRITON_CACHE_DIR=str(tmp_path))
    del environment["TRITON_INTERPRET"]
    run = subprocess.run(
        [*command, "--jobs", "1"], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    for kernel in KERNELS:
        assert kernel in run.stdout


def test_the_interpreter_is_refused() -> None:
    with pytest.raises(ConfigError, match="TRITON_INTERPRET"):
        report.main([str(TABLE)])
