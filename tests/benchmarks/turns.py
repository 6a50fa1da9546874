"""What the benchmarks share: sides that take turns, and what they ran on."""

import platform
import time
from collections.abc import Callable
from typing import Any

import torch


def take_turns(
    sides: dict[str, Callable[[], Any]], rounds: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each side, taking turns after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, action in sides.items():
            settle(device)
            start = time.perf_counter()
            action()
            settle(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def settle(device: str) -> None:
    """Wait for the work that a GPU was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def ran_on(device: str = "cpu") -> str:
    """What ran the benchmark, in words."""
    threads = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {threads}"
    return f"{threads}, {torch.backends.cpu.get_cpu_capability()}"
