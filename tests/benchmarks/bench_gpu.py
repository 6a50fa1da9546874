"""Everything about the kernels on a real GPU, in one command and one table.

    .venv/bin/python tests/benchmarks/bench_gpu.py --json gpu.json

Contenders: the base linear alone, PEFT LoRA of rank r, the torch form, a sorted form
with ``F.grouped_mm``, and the Triton backends; forward and backward for training sizes,
forward for few tokens; each also replayed from a CUDA graph, which leaves out the time
of the host. ``roofline`` is the time
that the bytes of the update must take at the datasheet's bandwidth, over the time the
update took. ``--tiny`` runs every part on small sizes, without a GPU in Triton's
interpreter: that shows that the script works, and its times mean nothing.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

if "--tiny" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from molora.kernels import BACKENDS, lowrank_mixture, machine
from molora.kernels.cost_model import Shape, concatenated


class Size(NamedTuple):
    """Sizes of a call."""

    T: int
    I: int  # noqa: E741
    O: int  # noqa: E741
    E: int
    r: int
    K: int


SIZES = [
    Size(8192, 4096, 4096, 8, 16, 2),
    Size(8192, 4096, 14336, 8, 16, 2),
    Size(8192, 14336, 4096, 8, 16, 2),
    Size(2048, 4096, 4096, 8, 16, 2),
    Size(2048, 4096, 4096, 64, 16, 2),
    Size(8192, 4096, 4096, 32, 16, 2),
    Size(8192, 4096, 4096, 128, 16, 2),
    Size(8192, 4096, 4096, 64, 16, 6),
    Size(1, 4096, 4096, 8, 16, 2),
    Size(1, 4096, 4096, 256, 16, 2),
    Size(16, 4096, 4096, 64, 16, 2),
]
TINY = [Size(20, 64, 48, 4, 8, 2), Size(1, 64, 48, 16, 8, 2)]


class Problem:
    """Tensors of one size, and the contenders as functions of x."""

    def __init__(self, size: Size, device: str, dtype: torch.dtype):
        torch.manual_seed(0)
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.size = size
        self.x = torch.randn(size.T, size.I, **kind, requires_grad=True)
        self.dy = torch.randn(size.T, size.O, **kind)
        self.base = nn.Linear(size.I, size.O, bias=False, **kind).requires_grad_(False)
        draw = torch.rand(size.T, size.E, device=device).topk(size.K)
        gates = torch.zeros(size.T, size.E, device=device)
        self.gates = gates.scatter(1, draw.indices, draw.values).requires_grad_()
        shape = (size.E, size.r)
        self.A = nn.Parameter(torch.randn(*shape, size.I, device=device) / 30)
        self.Bt = nn.Parameter(torch.randn(*shape, size.O, device=device) / 30)
        config = LoraConfig(r=size.r, lora_alpha=2 * size.r)
        self.lora = PeftLinear(
            self.base, "default", config=config, r=size.r, lora_alpha=2 * size.r
        ).to(device)
        self.leaves = [self.x, self.A, self.Bt, self.gates, *self.lora.parameters()]

    def contenders(self, trains: bool) -> dict[str, Callable[[Tensor], Tensor]]:
        """Functions of x by name; a backend that declines the call is left out."""
        made: dict[str, Callable[[Tensor], Tensor]] = {
            "base": self.base,
            "peft r": self.lora,
            "grouped_mm": self.grouped,
        }
        call = (self.x, self.A, self.Bt, self.gates, 2.0, None, self.size.K)
        for name in ("torch", "triton", "triton_grouped", "triton_gather"):
            with torch.set_grad_enabled(trains):
                reasons = BACKENDS[name].why_not(*call)
            if reasons:
                Console().print(f"{name} declined: {'; '.join(reasons)}", style="dim")
            else:
                made[name] = self.backend(name)
        return made

    def backend(self, name: str) -> Callable[[Tensor], Tensor]:
        """The op with one backend."""

        def function(x: Tensor) -> Tensor:
            return lowrank_mixture(
                x,
                self.A,
                self.Bt,
                self.gates,
                2.0,
                self.base,
                name,
                top_k=self.size.K,
            )

        return function

    def grouped(self, x: Tensor) -> Tensor:
        """Pairs sorted by expert, two grouped products, a weighted sum."""
        size = self.size
        gates_TK, experts_TK = self.gates.topk(size.K)
        order_P = experts_TK.flatten().argsort(stable=True)
        counts_E = torch.histc(experts_TK.float(), size.E, 0, size.E - 1)
        ends_E = counts_E.cumsum(0).int()
        x_PI = x[order_P // size.K]
        z_Pr = F.grouped_mm(x_PI, self.A.to(x.dtype).mT, offs=ends_E)
        y_PO = F.grouped_mm(z_Pr, self.Bt.to(x.dtype), offs=ends_E)
        back_P = torch.empty_like(order_P).scatter(0, order_P, torch.arange(
            len(order_P), device=x.device))  # fmt: skip
        y_TKO = y_PO[back_P].view(size.T, size.K, size.O)
        update = (y_TKO * (2.0 * gates_TK).unsqueeze(-1).to(x.dtype)).sum(1)
        return self.base(x) + update

    def step(self, function: Callable[[Tensor], Tensor], trains: bool) -> None:
        """One forward, and backward where it trains."""
        if not trains:
            with torch.no_grad():
                function(self.x)
            return
        function(self.x).backward(self.dy)
        for leaf in self.leaves:
            leaf.grad = None


def clock(action: Callable[[], None], device: str, calls: int) -> float:
    """Mean seconds of an action over some calls."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            action()
        return (time.perf_counter() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        action()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def graphed(action: Callable[[], None]) -> Callable[[], None]:
    """Replay of an action from a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            action()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return graph.replay


def measure(
    size: Size, device: str, dtype: torch.dtype, rounds: int, calls: int
) -> dict[str, Any]:
    """All contenders of one size, taking turns; medians in seconds."""
    problem, trains = Problem(size, device, dtype), size.T > 16
    actions: dict[str, Callable[[], None]] = {}
    for name, function in problem.contenders(trains).items():

        def action(f: Callable[[Tensor], Tensor] = function) -> None:
            problem.step(f, trains)

        action()
        actions[name] = action
        # the sorted recipe is captured too: histc and argsort stay on the device
        if device == "cuda":
            actions[f"{name}, graph"] = graphed(action)
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            seconds[name].append(clock(action, device, calls))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"size": size._asdict(), "trains": trains, "seconds": medians}


def bound(size: Size, trains: bool, device: str, itemsize: int) -> float | None:
    """Seconds that the bytes of the update take at the datasheet's bandwidth."""
    if device == "cpu":
        return None
    shape = Shape(*size, itemsize, trains)
    rates = machine.gpu(torch.device(device))
    return sum(work.bytes for work in concatenated(shape)) / rates.bandwidth


def show(results: list[dict[str, Any]], device: str, itemsize: int) -> None:
    """Print one table."""
    table = Table(title="Seconds of one linear with its update, ratios, roofline")
    for column in (
        "T, I, O, E, r, K",
        "contender",
        "us",
        "/ base",
        "/ peft r",
        "roofline",
    ):
        table.add_column(column)
    for row in results:
        seconds = row["seconds"]
        floor = bound(Size(**row["size"]), row["trains"], device, itemsize)
        for name, value in seconds.items():
            suffix = ", graph" if name.endswith(", graph") else ""
            base, peft = seconds[f"base{suffix}"], seconds[f"peft r{suffix}"]
            extra = value - base
            share = "-" if floor is None or extra <= 0 else f"{floor / extra:.0%}"
            table.add_row(
                ", ".join(str(v) for v in row["size"].values()),
                name,
                f"{value * 1e6:.1f}",
                f"{value / base:.2f}",
                f"{value / peft:.2f}",
                share,
            )
    Console(width=110).print(table)


def main() -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small sizes, no GPU")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=20, help="calls of one timing")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        sys.exit("bench_gpu.py measures a GPU and there is none; --tiny runs without")
    device = "cpu" if options.tiny else "cuda"
    dtype = torch.float32 if options.tiny else torch.bfloat16
    rounds, calls = (1, 1) if options.tiny else (options.rounds, options.calls)
    sizes = TINY if options.tiny else SIZES
    results = [
        measure(size, device, dtype, rounds, calls) for size in track(sizes, "sizes")
    ]
    show(results, device, dtype.itemsize)
    if options.json:
        name = "interpreter" if options.tiny else torch.cuda.get_device_name()
        made = {"device": name, "torch": torch.__version__, "results": results}
        options.json.write_text(json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
    main()
