"""One adapted linear on a CPU, forward and backward, against PEFT and other forms.

    .venv/bin/python tests/benchmarks/bench_lowrank_mixture.py --json out.json

Every contender computes base(x) plus its update for given gates: molora picks its own
backend, ``peft r`` and ``peft E*r`` are PEFT's LoRA layers, ``loop`` gathers each
expert's tokens and adds them back, ``einsum`` forms every expert's update. They take
turns within one process, the two slow forms by themselves; figures are ratios of
medians. The floor is two products of the ranks in use per pass at the measured rate of
such products, and the wide tensors once at the measured bandwidth, on top of the base
layer alone.

The share of the base layer is the profile: where it is b of molora's time, a form whose
update takes u times ours takes b + u (1 - b) times our time in all, whatever u is. On a
CPU that emulates half precision the base layer by itself takes longer than molora with
it, whose backward has the layer's input gradient in float32 (kernels/frozen_linear.py).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from turns import ran_on

from molora.kernels import lowrank_mixture, machine


class Size(NamedTuple):
    """Sizes of a call."""

    T: int
    I: int  # noqa: E741
    O: int  # noqa: E741
    E: int
    r: int
    K: int


SIZES = [
    Size(512, 576, 1536, 8, 8, 2),
    Size(512, 2048, 2048, 8, 16, 2),
    Size(512, 2048, 2048, 64, 8, 2),
    Size(2048, 1024, 1024, 8, 8, 2),
    Size(1, 2048, 2048, 8, 16, 2),
]
GROWTH = [Size(2048, 1024, 1024, e, 8, 2) for e in (8, 32, 128, 256)]


class Problem:
    """Tensors of one size, and the contenders as functions of x."""

    def __init__(self, size: Size, dtype: torch.dtype):
        torch.manual_seed(0)
        self.size = size
        self.x = torch.randn(size.T, size.I, dtype=dtype, requires_grad=True)
        self.dy = torch.randn(size.T, size.O, dtype=dtype)
        self.base = nn.Linear(size.I, size.O, bias=False, dtype=dtype)
        self.base.requires_grad_(False)
        draw = torch.rand(size.T, size.E).topk(size.K)
        gates = torch.zeros(size.T, size.E).scatter(1, draw.indices, draw.values)
        self.gates = gates.requires_grad_()
        self.A = nn.Parameter(torch.randn(size.E, size.r, size.I) / size.I**0.5)
        self.Bt = nn.Parameter(torch.randn(size.E, size.r, size.O) / 100)
        self.single = self.peft(size.r)
        self.wide = self.peft(size.E * size.r)

    def peft(self, rank: int) -> nn.Module:
        """PEFT's LoRA layer of a rank around the same base."""
        config = LoraConfig(r=rank, lora_alpha=2 * rank)
        layer = PeftLinear(
            self.base, "default", config=config, r=rank, lora_alpha=2 * rank
        )
        # as get_peft_model does for a base in half precision
        for name in ("lora_A", "lora_B"):
            getattr(layer, name).float()
        nn.init.normal_(layer.lora_B["default"].weight, std=0.01)
        return layer

    def contenders(self, are_slow: bool) -> dict[str, Callable[[Tensor], Tensor]]:
        """Functions of x by name: base and molora beside PEFT's, or the slow forms."""
        others: dict[str, Callable[[Tensor], Tensor]] = {
            "peft r": self.single,
            "peft E*r": self.wide,
        }
        if are_slow:
            others = {"loop": self.loop, "einsum": self.einsum}
        return {"base": self.base, "molora": self.molora, **others}

    def molora(self, x: Tensor) -> Tensor:
        """The op of this package."""
        return lowrank_mixture(
            x, self.A, self.Bt, self.gates, 2.0, self.base, top_k=self.size.K
        )

    def loop(self, x: Tensor) -> Tensor:
        """Each expert on its tokens, added back."""
        y = self.base(x)
        for e in range(self.size.E):
            rows = self.gates[:, e].nonzero()[:, 0]
            a, b = self.A[e].to(x.dtype), self.Bt[e].to(x.dtype)
            update = (x[rows] @ a.t()) @ b * 2.0
            gated = update * self.gates[rows, e, None].to(x.dtype)
            y = y.index_add(0, rows, gated)
        return y

    def einsum(self, x: Tensor) -> Tensor:
        """Every expert on every token, then the weighted sum."""
        a, b = self.A.to(x.dtype), self.Bt.to(x.dtype)
        z = torch.einsum("ti,eri->ter", x, a)
        updates = torch.einsum("ter,ero->teo", z, b) * 2.0
        gates = self.gates.to(x.dtype)
        return self.base(x) + torch.einsum("teo,te->to", updates, gates)

    def step(self, function: Callable[[Tensor], Tensor]) -> None:
        """Forward and backward; one token is decoded, without gradients."""
        if self.size.T == 1:
            with torch.no_grad():
                function(self.x)
            return
        function(self.x).backward(self.dy)
        for leaf in (self.x, self.A, self.Bt, self.gates):
            leaf.grad = None
        for layer in (self.single, self.wide):
            layer.zero_grad(set_to_none=True)

    def saved(self) -> int:
        """Bytes kept for backward beside x, the base and the parameters."""
        kept: dict[int, int] = {}

        def pack(value: Tensor) -> Tensor:
            kept[value.data_ptr()] = value.numel() * value.element_size()
            return value

        y = self.base(self.x).detach()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            lowrank_mixture(
                self.x, self.A, self.Bt, self.gates, 2.0, y, top_k=self.size.K
            )
        for own in (self.x, self.A, self.Bt):
            kept.pop(own.data_ptr(), None)
        return sum(kept.values())


def interleave(problem: Problem, rounds: int, are_slow: bool) -> dict[str, float]:
    """Median seconds of every contender, taking turns."""
    functions = problem.contenders(are_slow)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    # one token takes microseconds, so a turn is many calls
    calls = 100 if problem.size.T == 1 else 1
    names = [*functions]
    for turn in range(rounds + 1):
        # everyone runs after everyone: what ran before leaves its memory behind
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            function = functions[name]
            start = time.perf_counter()
            for _ in range(calls):
                problem.step(function)
            if turn:
                seconds[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


def floor(size: Size, dtype: torch.dtype, base: float) -> float:
    """Seconds of the base, the products of the ranks in use, and the wide tensors."""
    rates = machine.measure(torch.float32)
    passes = 1 if size.T == 1 else 3
    wide = size.I + size.O
    flops = 2.0 * size.T * size.K * size.r * wide * passes
    moved = size.T * (size.I + 2 * size.O) * dtype.itemsize * passes
    return base + flops / rates.gemm + moved / rates.bandwidth


def measure(size: Size, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """All figures of one size."""
    problem = Problem(size, dtype)
    seconds = interleave(problem, rounds, are_slow=False)
    ours, base = seconds["molora"], seconds["base"]
    budget = 2 * size.T * size.E * size.r + size.T * size.E
    ratios = {
        f"molora / {name}": ours / seconds[name] for name in ("peft r", "peft E*r")
    }
    ratios["molora / floor"] = ours / floor(size, dtype, base)
    ratios["base / molora"] = base / ours
    # einsum forms [T, E, O], which many experts would not leave memory for; the slow
    # forms take turns by themselves, since such tensors slow down what comes after
    if size.T * size.E * size.O <= 2**28:
        slow = interleave(problem, rounds, are_slow=True)
        again, alone = slow["molora"], slow["base"]
        for name in ("loop", "einsum"):
            seconds[name] = slow[name]
            ratios[f"{name} / molora"] = slow[name] / again
        if again > alone:
            ratios["updates: loop / molora"] = (slow["loop"] - alone) / (again - alone)
    return {
        "size": size._asdict(),
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": seconds,
        "ratios": ratios,
        "saved values / (2TR + TE)": problem.saved() / 4 / budget,
    }


def main() -> None:
    """Measure what is missing, print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="kept per size, resumes")
    options = parser.parse_args()
    done: dict[str, Any] = {
        "machine": ran_on(),
        "torch": torch.__version__,
        "rounds": options.rounds,
        "sizes": [],
        "growth": [],
    }
    if options.json and options.json.exists():
        before = json.loads(options.json.read_text())
        for name in ("machine", "torch", "rounds"):
            if before.get(name) != done[name]:
                parser.error(
                    f"{options.json} has {name} {before.get(name)!r}, this run "
                    f"{done[name]!r}; give another --json"
                )
        done = before
    names = options.dtype.split(",")
    wanted = [("sizes", size, name) for name in names for size in SIZES]
    wanted += [("growth", size, "float32") for size in GROWTH]
    for part, size, name in wanted:
        known = {(row["dtype"], *row["size"].values()) for row in done[part]}
        if (name, *size) in known:
            continue
        # a product in emulated half precision takes seconds
        rounds = options.rounds if name == "float32" else min(options.rounds, 3)
        row = measure(size, getattr(torch, name), rounds)
        done[part].append({**row, "date": time.strftime("%Y-%m-%d")})
        if options.json:
            options.json.write_text(json.dumps(done, indent=2) + "\n")
    show(done["sizes"], done["growth"])


def show(results: list[dict[str, Any]], growth: list[dict[str, Any]]) -> None:
    """Print the ratios, and the cost of more experts."""
    names = list(dict.fromkeys(name for row in results for name in row["ratios"]))
    table = Table(title="One linear, forward and backward: ratios of medians")
    for column in ("T, I, O, E, r, K", "dtype", *names, "saved"):
        table.add_column(column)
    for row in results:
        cells = [
            f"{row['ratios'][n]:.2f}" if n in row["ratios"] else "-" for n in names
        ]
        saved = f"{row['saved values / (2TR + TE)']:.2f}"
        size = ", ".join(str(v) for v in row["size"].values())
        table.add_row(size, row["dtype"], *cells, saved)
    Console(width=180).print(table)
    first = growth[0]["seconds"]["molora"]
    for row in growth:
        cost = row["seconds"]["molora"] / first
        Console().print(f"E = {row['size']['E']}: {cost:.2f} times the cost of E = 8")


if __name__ == "__main__":
    main()
