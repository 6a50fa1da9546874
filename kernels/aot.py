"""Compile the Triton kernels for any target, without a GPU.

The launchers run on tensors without memory while Triton's driver is one that names the
target and never launches: what is compiled is exactly what a call would launch on that
device, with the same specialisation of its arguments.

This cannot run with TRITON_INTERPRET set. It says that no configuration is broken on a
device; it says nothing about speed.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from molora.kernels import (
    triton_dense,
    triton_gather,
    triton_grouped,
    triton_topk,
)
from molora.kernels.configs import (
    ARCHES,
    TOKENS,
    WITH_FACTOR,
    Entry,
    experts_of,
    forced,
    pick,
)
from molora.kernels.gradients import Needs
from molora.kernels.machine_code import TARGETS, Numbers, read
from molora.kernels.triton_traffic import Traffic, traffic


class Launch(NamedTuple):
    """One launch of a call."""

    name: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    compiled: Any
    """Triton's compiled kernel; None where it was not asked for."""


class _Driver:
    """A driver that names its target and launches nothing."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return ARCHES.index(self.arch)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.arch].target


_SETTINGS: dict[str, tuple[str, ...]] = {
    "": (),
    "dropout": ("DROP",),
    "shared A": ("SHARED", "A_SHARED"),
    "shared B": ("SHARED", "B_SHARED"),
}
"""Settings of a kernel, one of which is on in a variant."""


@contextlib.contextmanager
def recorded(arch: str, only: str | None, variant: str = "") -> Iterator[list[Launch]]:
    """Record launches instead of making them, and compile one of the kernels.

    Args:
        arch: Target to compile for.
        only: Name of a kernel to compile, at its first launch; None compiles nothing.
        variant: Of that kernel.
    """
    launches: list[Launch] = []
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled = None
        settings = _SETTINGS[variant]
        is_wanted = not settings or any(kwargs.get(name) for name in settings)
        first = self.__name__ == only and not any(one.compiled for one in launches)
        if first and is_wanted:
            compiled = original(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append(Launch(self.__name__, grid, kwargs, compiled))

    driver = mock.patch.object(triton.runtime.driver, "_active", _Driver(arch))
    with driver, mock.patch.object(JITFunction, "run", run):
        yield launches


def compiled(entry: Entry) -> Numbers:
    """Compile one configuration of one kernel and read its machine code."""
    kernel, arch, rank, itemsize, is_cast, config, variant = entry
    uncast = kernel in WITH_FACTOR and itemsize == 2 and not is_cast
    tokens = TOKENS[1] if uncast else 8192
    tokens = 1 if kernel == "topk_gates" and config.BM == 1 else tokens
    with forced(kernel, config), recorded(arch, kernel, variant) as made:
        call(kernel, rank, itemsize, tokens, variant=variant)
    return read(next(launch.compiled for launch in made if launch.compiled))


def launches(kernel: str) -> int:
    """Launches of the pass, forward or backward, that a kernel belongs to."""
    forward = {"grouped_wgrad": "grouped_shrink"}
    with recorded(ARCHES[0], None) as made:
        call(kernel, 128)
    return len(made) - (launches(forward[kernel]) if kernel in forward else 0)


def traffic_of(entry: Entry) -> Traffic | None:
    """Bytes that one launch of a dense kernel moves, and the least it could.

    Counted for 8192 tokens of 4096 features; None if those have another configuration.
    """
    kernel, arch, rank, itemsize, _, config, _ = entry
    used = pick(kernel, arch, rank, 8192, 4096, itemsize)
    if used._replace(split=1) != config:
        return None
    with forced(kernel, used), recorded(arch, None) as made:
        call(kernel, rank, itemsize)
    launch = next(launch for launch in made if launch.name == kernel)
    tensors: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for name, value in launch.arguments.items():
        into = tensors if value is None or isinstance(value, Tensor) else settings
        into[name] = value
    return traffic(kernel, launch.grid, tensors, settings)


def call(
    kernel: str,
    rank: int,
    itemsize: int = 2,
    tokens: int = 8192,
    wide: int = 4096,
    variant: str = "",
) -> None:
    """Make the call that launches a kernel, on tensors without memory.

    Args:
        kernel: Name of the kernel.
        rank: Padded rank of its tile.
        itemsize: Bytes of an element of x; the factors are float32.
        tokens: Number of tokens.
        wide: Both wide dimensions.
        variant: Of the kernel.
    """
    experts, r = experts_of(kernel, rank)
    dtype = {2: torch.bfloat16, 4: torch.float32}[itemsize]
    x = torch.empty(tokens, wide, device="meta", dtype=dtype)
    A = torch.empty(1 if variant == "shared A" else experts, r, wide, device="meta")
    Bt = torch.empty(1 if variant == "shared B" else experts, r, wide, device="meta")
    gates = torch.empty(tokens, experts, device="meta")
    routed = (A, Bt, gates, 2.0)
    mask = (0.1, 1) if variant == "dropout" else (0.0, 0)
    if kernel.startswith("topk"):
        weight = torch.empty(rank, wide, device="meta")
        rows = torch.empty(tokens, rank, device="meta")
        if kernel == "topk_gates":
            flag = torch.empty((), device="meta", dtype=torch.uint8)
            triton_topk.gates_of(x, weight, flag, 2, 1.0, True)
        else:
            # gates that are not renormalised need more
            pair, needed = (rows, rows), (True, True)
            triton_topk.backward(x, weight, *pair, *pair, 1.0, False, *needed)
    elif kernel.startswith("gather"):
        triton_gather.forward(x, x, *routed, 2, *mask)
    elif kernel.startswith(("grouped", "route")):
        z = triton_grouped.forward(x, x, *routed, 2, *mask)[1]
        if kernel == "grouped_wgrad" or variant:
            triton_grouped.backward(x, x, z, *routed, 2, *mask, Needs(*[True] * 4))
    elif kernel == "shrink_gate" or (kernel == "expand_add" and not variant):
        triton_dense.forward(x, x, *routed, None, *mask)
    else:
        z = torch.empty(tokens, A.shape[0] * r, device="meta", dtype=dtype)
        triton_dense.backward(x, x, z, *routed, None, *mask)
