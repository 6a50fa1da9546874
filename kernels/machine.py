"""What the device at hand can do, for the cost model: looked up or measured once.

A CPU is measured when a call first has so many experts that the choice matters (about
a tenth of a second), and the result is kept in the cache folder: the same machine then
chooses the same way in every run. ``MOLORA_CPU_MACHINE`` replaces the measurement: JSON
with the fields of ``Machine``.
"""

import functools
import json
import math
import os
import platform
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from molora.cache import cache_root
from molora.errors import ConfigError
from molora.kernels.cost_model import Machine

_VARIABLE = "MOLORA_CPU_MACHINE"

_DATASHEET = {
    "sm_80": (312e12, 2.0e12),
    "sm_89": (165e12, 1.0e12),
    "sm_90": (989e12, 3.35e12),
    "sm_100": (2250e12, 8.0e12),
    "gfx942": (1307e12, 5.3e12),
}
"""FLOP per second of bf16 products, and bytes per second, by architecture."""

GPUS = {
    arch: Machine(0.7 * rate, 0.28 * rate, 0.84 * bandwidth, 3e-6)
    for arch, (rate, bandwidth) in _DATASHEET.items()
}
"""Datasheet rates times the shares of them that calls reached on an H100: products with
a narrow side in the library and in the Triton kernels, and memory."""


def gpu(device: torch.device) -> Machine:
    """Rates of a GPU; those of the nearest older architecture where it has none."""
    properties = torch.cuda.get_device_properties(device)
    arch = getattr(properties, "gcnArchName", "").split(":")[0]
    if arch:
        return GPUS.get(arch, GPUS["gfx942"])
    number = properties.major * 10 + properties.minor
    known = sorted(int(name[3:]) for name in GPUS if name.startswith("sm_"))
    older = [n for n in known if n <= number] or known[:1]
    return GPUS[f"sm_{older[-1]}"]


@functools.cache
def cpu(dtype: torch.dtype, threads: int) -> Machine:
    """Rates of this CPU with so many threads: set, remembered, or measured now.

    Raises:
        ConfigError: MOLORA_CPU_MACHINE or the remembered file holds no machine.
    """
    given = os.environ.get(_VARIABLE)
    if given:
        return _parse(given, _VARIABLE)
    name = f"{_name()}-{threads}-threads-{dtype}-torch-{torch.__version__}"
    try:
        path = cache_root() / "cpu" / (re.sub(r"[^\w.+-]+", "-", name) + ".json")
        if not path.is_file():
            _keep(measure(dtype), path)
        # what is kept, also where another process was first: all choose alike
        text = path.read_text("utf-8")
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"the measured speed of this CPU cannot be kept ({error}); another run may "
            "choose another backend and round differently. Set MOLORA_CACHE to a "
            f"folder that can be written, or {_VARIABLE}",
            stacklevel=2,
        )
        return measure(dtype)
    return _parse(text, f"{path} (delete it to measure again)")


def _keep(machine: Machine, path: Path) -> None:
    """Write a file whole, unless another process has written it meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(machine._asdict(), indent=2) + "\n", "utf-8")
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def measure(dtype: torch.dtype) -> Machine:
    """Time one narrow product, one grouped product, one gather, one small operation."""
    tokens, wide, ranks, groups = 2048, 1024, 128, 32
    # its own generator and device: it runs inside somebody's forward
    g = torch.Generator().manual_seed(0)
    kind: dict[str, Any] = {"dtype": dtype, "device": "cpu"}
    x = torch.randn(tokens, wide, generator=g, **kind)
    factor = torch.randn(groups, ranks // 16, wide, generator=g, **kind)
    flat = torch.randn(ranks, wide, generator=g, **kind)
    order = torch.randperm(tokens, generator=g, device="cpu")
    ends = torch.arange(1, groups + 1, dtype=torch.int32, device="cpu")
    ends *= tokens // groups
    tiny = torch.ones(4, **kind)
    flops, bytes_ = 2.0 * tokens * wide, 2.0 * x.numel() * x.element_size()
    actions: list[Callable[[], object]] = [
        lambda: F.linear(x, flat),
        lambda: F.grouped_mm(x, factor.mT, offs=ends),
        lambda: x.index_select(0, order),
    ]
    with torch.no_grad():
        narrow, grouped, gather = _fastest(actions)
        (launch,) = _fastest([lambda: tiny + tiny])
    return Machine(
        gemm=flops * ranks / narrow,
        grouped=flops * factor.shape[1] / grouped,
        bandwidth=bytes_ / gather,
        launch=launch,
    )


def _fastest(actions: list[Callable[[], object]], rounds: int = 15) -> list[float]:
    """Least seconds of each action, by turns: what else runs only takes time away."""
    seconds = [math.inf] * len(actions)
    for _ in range(rounds):
        for at, action in enumerate(actions):
            start = time.perf_counter()
            action()
            seconds[at] = min(seconds[at], time.perf_counter() - start)
    return seconds


def _name() -> str:
    """Model of the processor, as far as the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line for line in file if line.startswith("model name")]
    except FileNotFoundError:
        lines = []
    named = lines[0].split(":", 1)[1].strip() if lines else platform.processor()
    return f"{named} {torch.backends.cpu.get_cpu_capability()}"


def _parse(text: str, where: str) -> Machine:
    fields = ", ".join(Machine._fields)
    try:
        raw = json.loads(text)
        machine = Machine(**{name: float(value) for name, value in raw.items()})
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{where}: expected JSON with the numbers {fields}: {error}"
        ) from None
    if not all(value > 0 for value in machine):
        raise ConfigError(f"{where}: {fields} must be above zero")
    return machine
