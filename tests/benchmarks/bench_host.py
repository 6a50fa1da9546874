"""What a layer costs the host in eager mode, with its router: few tokens on a GPU.

    .venv/bin/python tests/benchmarks/bench_host.py

A linear of SmolLM2's up projection alone, under PEFT LoRA, under one expert and under
8 experts with top-2, all of rank 8; forward, forward and backward, and forward without
gradients, by turns. With so few tokens a GPU waits for the host.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from turns import ran_on, settle

import molora

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDE = (576, 1536)
WAYS = ("forward", "step", "inference")


class One(nn.Module):
    """A model of one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(*WIDE)

    def forward(self, x: Tensor) -> Tensor:
        """The layer."""
        y: Tensor = self.lin(x)
        return y


def build(name: str) -> Any:
    """One side."""
    model: Any = One().to(DEVICE, torch.bfloat16)
    if name == "base":
        return model.requires_grad_(False)
    if name == "PEFT":
        return get_peft_model(model, LoraConfig(r=8, target_modules=["lin"]))
    experts = 8 if name == "8 experts, top-2" else 1
    router = {"kind": "topk", "top_k": 2} if experts > 1 else {"kind": "none"}
    raw = {
        "target_modules": ["lin"],
        "experts": {"kind": "lora", "num_experts": experts, "r": 8},
        "router": router,
    }
    return molora.wrap(model, molora.AdapterConfig.from_dict(raw))


def work(model: Any, way: str, x: Tensor, dy: Tensor) -> None:
    """One call."""
    if way == "inference":
        with torch.no_grad():
            model(x)
        return
    y = model(x)
    if way == "step":
        y.backward(dy)


def microseconds(action: Callable[[], None], calls: int) -> float:
    """Mean of some calls, after a few to warm up."""
    for _ in range(10):
        action()
    settle(DEVICE)
    start = time.perf_counter()
    for _ in range(calls):
        action()
    settle(DEVICE)
    return 1e6 * (time.perf_counter() - start) / calls


def main() -> None:
    """Measure, print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=100, help="calls of one timing")
    options = parser.parse_args()
    names = ("base", "PEFT", "one expert", "8 experts, top-2")
    models = {name: build(name) for name in names}
    table = Table(title=f"microseconds of one layer, {ran_on(DEVICE)}")
    for column in ("tokens", "layer", *WAYS):
        table.add_column(column)
    for tokens in options.tokens:
        kind: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}
        x = torch.randn(tokens, WIDE[0], **kind).requires_grad_()
        dy = torch.randn(tokens, WIDE[1], **kind)
        found: dict[tuple[str, str], list[float]] = {}
        for _ in range(options.rounds):
            for name, model in models.items():
                for way in WAYS:
                    model.train(way != "inference")
                    action = functools.partial(work, model, way, x, dy)
                    taken = microseconds(action, options.calls)
                    found.setdefault((name, way), []).append(taken)
        for name in names:
            cells = (f"{statistics.median(found[name, way]):.0f}" for way in WAYS)
            table.add_row(str(tokens), name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
