"""Read the machine code of a kernel, and what its device asks of it.

Registers and stack come from the machine code (by NVIDIA's ``cuobjdump``, which Triton
brings; AMD's compiler prints them), instructions from PTX or AMD's assembly, shared
memory from Triton, whose compiler rejects no amount of it.
"""

import collections
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget

from molora.kernels.configs import Config


class Target(NamedTuple):
    """A device as the compiler sees it."""

    target: GPUTarget
    shared: int
    """Bytes of shared memory that one program may use."""
    registers: int
    """Registers that one thread may have."""
    mma: str
    """Its matrix instruction."""


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 166912, 255, "mma"),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 101376, 255, "mma"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 232448, 255, "wgmma"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 232448, 255, "tcgen05"),
    # vector and accumulation registers together
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 65536, 512, "mfma"),
}


class Numbers(NamedTuple):
    """What the compiler made of one kernel; instructions in a loop count once."""

    registers: int
    spills: int
    """Bytes of stack on NVIDIA; spilled vector registers on AMD."""
    shared: int
    """Bytes."""
    mma: str
    """Kind of matrix instruction, empty without any."""
    mmas: int
    wide: int
    """Loads and stores of global memory of 16 bytes in a thread."""
    middle: int
    """Those of 8 bytes."""
    narrow: int
    """Those of 4 bytes: indices, or elements of a float32 matrix one by one."""
    tiny: int
    """Those of 1 or 2 bytes: elements of a 16-bit matrix one by one."""
    atomics: int
    """Atomic operations on global memory."""


def faults(
    kernel: str,
    arch: str,
    itemsize: int,
    config: Config,
    found: Numbers,
    variant: str = "",
) -> list[str]:
    """What makes a configuration unfit for its device.

    Matrix instructions are asked of 16-bit inputs: float32 is multiplied exactly, on
    the ordinary units. Accesses of 1, 2 and 4 bytes are held against kernels whose
    narrow tensors are all read in rows; others load one index or gate at a time, and
    those that sort tokens nothing else. The rank of a shared factor is a few columns,
    of which a thread has a few bytes to load and store, once.
    """
    limit = TARGETS[arch]
    few = 4 if variant.startswith("shared") else 0
    reasons = []
    if found.shared > limit.shared:
        reasons.append(f"shared memory {found.shared} > {limit.shared}")
    if found.registers > limit.registers:
        reasons.append(f"registers {found.registers} > {limit.registers}")
    if found.spills:
        reasons.append(f"spills {found.spills}")
    if found.atomics:
        reasons.append(f"atomics {found.atomics}")
    if not found.wide and not kernel.startswith("route"):
        reasons.append("no access of 16 bytes")
    if itemsize == 2 and kernel in PRODUCTS:
        # a warp group multiplies 64 rows; fewer go to the instruction of one warp
        wanted = limit.mma if _rows(kernel, config) >= 64 else WARP_MMA[arch]
        if found.mma != wanted:
            reasons.append(f"{found.mma or 'no matrix instruction'}, not {wanted}")
    if kernel in PRODUCTS and itemsize == 2 and found.tiny > few:
        reasons.append(f"accesses of 2 bytes: {found.tiny}")
    if kernel in GATES_AT_MOST and found.narrow > GATES_AT_MOST[kernel] + few:
        reasons.append(f"accesses of 4 bytes: {found.narrow}")
    return reasons


DENSE = ("shrink_gate", "expand_add", "bwd_rank", "wgrad")
"""Kernels of the concatenated form."""

PRODUCTS = (*DENSE, "grouped_shrink", "grouped_expand", "grouped_wgrad")
"""Kernels that multiply matrices."""

GATES_AT_MOST = {"shrink_gate": 1, "expand_add": 0, "bwd_rank": 2, "wgrad": 0}
"""Accesses of 4 bytes: the load of the gates of a short tile, the store of theirs."""

WARP_MMA = {arch: "mfma" if arch == "gfx942" else "mma" for arch in TARGETS}


def _rows(kernel: str, config: Config) -> int:
    """Rows of the left side of a kernel's product."""
    return config.BN if kernel.endswith("wgrad") else config.BM


def read(made: Any) -> Numbers:
    """Registers, spills, shared memory and instructions of a compiled kernel."""
    if "cubin" in made.asm:
        return _read_nvidia(made.asm["cubin"], made.asm["ptx"], made.metadata.shared)
    return _read_amd(made.asm["amdgcn"], made.metadata.shared)


_TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_PTX_MEMORY = re.compile(
    r"^\s+(?:@%\w+ )?(?:ld|st)\.global[.\w:]*?(?:\.v(\d))?\.[bfus](\d+) ", re.MULTILINE
)
_PTX_COPY = re.compile(r"^\s+(?:@%\w+ )?cp\.async\.c[ag][^;]*\], 0x(\w+)", re.MULTILINE)
_PTX_ATOMIC = re.compile(r"^\s+(?:@%\w+ )?(?:atom|red)\.(?!\S*shared)", re.MULTILINE)
_PTX_MMA = {
    "wgmma": re.compile(r"\bwgmma\.mma_async"),
    "mma": re.compile(r"(?<!w)\bmma\.sync"),
    "tcgen05": re.compile(r"\btcgen05\.mma"),
}


def _read_nvidia(cubin: bytes, ptx: str, shared: int) -> Numbers:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOL), "--dump-resource-usage", file.name]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", run.stdout)[0]
    sizes: collections.Counter[int] = collections.Counter()
    for vector, bits in _PTX_MEMORY.findall(ptx):
        sizes[_floor(int(vector or 1) * int(bits) // 8)] += 1
    for size in _PTX_COPY.findall(ptx):
        sizes[int(size, 16)] += 1
    mma = {kind: len(name.findall(ptx)) for kind, name in _PTX_MMA.items()}
    atomics = len(_PTX_ATOMIC.findall(ptx))
    return _numbers(int(registers), int(stack), shared, mma, sizes, atomics)


def _floor(size: int) -> int:
    """Size of an access in the classes that ``Numbers`` counts."""
    return next(limit for limit in (16, 8, 4, 2, 1) if size >= limit)


_AMD_MEMORY = re.compile(r"^\s+(?:global|buffer)_(?:load|store)_(\w+)", re.MULTILINE)
_AMD_BYTES = {"dwordx4": 16, "dwordx3": 8, "dwordx2": 8, "dword": 4}


def _read_amd(text: str, shared: int) -> Numbers:
    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[0])

    sizes: collections.Counter[int] = collections.Counter()
    for width in _AMD_MEMORY.findall(text):
        sizes[_AMD_BYTES.get(width, 2)] += 1
    mma = {"mfma": len(re.findall(r"^\s+v_mfma_", text, re.M))}
    atomics = len(re.findall(r"^\s+(?:global|buffer|flat)_atomic", text, re.M))
    spills = field("vgpr_spill_count")
    return _numbers(field("vgpr_count"), spills, shared, mma, sizes, atomics)


def _numbers(
    registers: int,
    spills: int,
    shared: int,
    mma: dict[str, int],
    sizes: collections.Counter[int],
    atomics: int,
) -> Numbers:
    kinds = "+".join(kind for kind, count in mma.items() if count)
    widths = (sizes[16], sizes[8], sizes[4], sizes[2] + sizes[1])
    return Numbers(
        registers, spills, shared, kinds, sum(mma.values()), *widths, atomics
    )
