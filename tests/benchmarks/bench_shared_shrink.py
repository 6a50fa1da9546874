"""Layers that read one tensor, with one shrink for all of them and with their own.

    .venv/bin/python tests/benchmarks/bench_shared_shrink.py --json out.json

One block whose layers follow one routing (``router.scope: block``), 8 experts of rank
8, top-2, forward and backward; the two take turns in one process. ``updates`` leaves
the time of the frozen layers alone out of both.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from turns import ran_on

import molora

SIZES = [
    (512, 576, (576, 192, 192)),
    (512, 576, (1536, 1536)),
    (512, 2048, (2048, 512, 512)),
]
"""T, I and O of each layer; the first two are those of SmolLM2-135M."""


class Block(nn.Module):
    """Linears that read the same tensor."""

    def __init__(self, wide: int, outs: tuple[int, ...]):
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(wide, o, bias=False) for o in outs])

    def forward(self, x: Tensor) -> Tensor:
        """Outputs side by side."""
        return torch.cat([linear(x) for linear in self.linears], -1)


def build(wide: int, outs: tuple[int, ...]) -> Any:
    """A block with its banks, B drawn at random so that every product is real."""
    raw = {
        "target_modules": r"linears\.\d+",
        "experts": {"kind": "lora", "num_experts": 8, "r": 8, "lora_alpha": 16},
        "router": {"kind": "topk", "scope": "block"},
    }
    model: Any = molora.wrap(Block(wide, outs), molora.AdapterConfig.from_dict(raw))
    for name, parameter in model.named_parameters():
        if name.endswith(".Bt"):
            nn.init.normal_(parameter, std=0.01)
    return model


def measure(
    tokens: int, wide: int, outs: tuple[int, ...], rounds: int
) -> dict[str, Any]:
    """Median seconds of both, and of the frozen layers alone."""
    torch.manual_seed(0)
    model, plain = build(wide, outs), Block(wide, outs).requires_grad_(False)
    x = torch.randn(1, tokens, wide, requires_grad=True)
    dy = torch.randn(1, tokens, sum(outs))

    def step(module: nn.Module) -> None:
        module(x).backward(dy)
        x.grad = None
        module.zero_grad(set_to_none=True)

    def apart() -> None:
        with mock.patch("molora.shared_shrink.update", lambda *_: None):
            step(model)

    turns: dict[str, Callable[[], None]] = {
        "one shrink": lambda: step(model),
        "apart": apart,
        "frozen": lambda: step(plain),
    }
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for turn in range(rounds + 2):
        for name, function in turns.items():
            start = time.perf_counter()
            function()
            if turn > 1:
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    one, own, base = (median[name] for name in turns)
    return {
        "size": [tokens, wide, list(outs)],
        "seconds": median,
        "ratios": {"whole": one / own, "updates": (one - base) / (own - base)},
    }


def main() -> None:
    """Measure, print one table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = [measure(*size, options.rounds) for size in SIZES]
    table = Table(title="One shrink / a shrink for each layer")
    for column in ("T, I, outputs", "whole", "updates"):
        table.add_column(column)
    for row in results:
        tokens, wide, outs = row["size"]
        cells = (f"{row['ratios'][name]:.2f}" for name in ("whole", "updates"))
        table.add_row(f"{tokens}, {wide}, {'+'.join(map(str, outs))}", *cells)
    Console().print(table)
    if options.json:
        result = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": ran_on(),
            "torch": torch.__version__,
            "sizes": results,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
