"""Training step, decoding, memory, wrap, save and load on SmolLM2, against PEFT LoRA.

    .venv/bin/python tests/benchmarks/bench_smollm2.py --dtype float32 --json out.json

molora: 8 experts of rank 8, top-2, a router per site, on all 7 linears of every layer.
PEFT: LoRA of rank 8 on the same linears. Both train in one process, interleaved; the
figure is the ratio of the medians. Peak memory is that of a process of its own, on a
GPU what its tensors take there.

``--profile`` prints instead where the time of a step and of a decoded token goes, on a
GPU that of the host and then that of the device.
"""

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from turns import ran_on, settle, take_turns

import molora
from molora.base_models import load_base

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LIMITS = {"step": 1.1, "step with balance": 1.2, "decode": 1.2, "peak memory": 1.2}


def mixture(balance: bool) -> molora.AdapterConfig:
    """8 experts of rank 8, top-2."""
    return molora.AdapterConfig.from_dict(
        {
            "target_modules": LINEARS,
            "experts": {"kind": "lora", "num_experts": 8, "r": 8, "lora_alpha": 16},
            "router": {"kind": "topk", "top_k": 2},
            "balance": [{"kind": "switch", "weight": 0.01}] if balance else [],
        }
    )


def build(kind: str, options: argparse.Namespace) -> Any:
    """One adapted model, B drawn at random so that every product is real."""
    base, _ = load_base("smollm2", options.dtype, options.device)
    torch.manual_seed(0)
    if kind == "peft":
        config = LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS)
        model: Any = get_peft_model(base, config)
    else:
        model = molora.wrap(base, mixture(kind == "molora with balance"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith(".Bt"):
            torch.nn.init.normal_(parameter, std=0.01)
    return model


def train_step(model: Any, ids: torch.Tensor) -> None:
    """Forward, backward and an AdamW update of the adapter."""
    model.train()
    mask = torch.ones_like(ids)
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    if not hasattr(model, "bench_optimizer"):
        trained = [p for p in model.parameters() if p.requires_grad]
        model.__dict__["bench_optimizer"] = torch.optim.AdamW(trained, lr=1e-5)
    model.bench_optimizer.step()
    model.bench_optimizer.zero_grad()


def decode(model: Any, ids: torch.Tensor, tokens: int) -> None:
    """Greedy decoding with a KV cache after a short prompt."""
    model.eval()
    with torch.no_grad():
        model.generate(
            input_ids=ids[:1, :16],
            attention_mask=torch.ones_like(ids[:1, :16]),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )


def profile(
    models: dict[str, Any],
    action: Callable[[Any], None],
    title: str,
    device: str,
    top: int = 14,
) -> None:
    """Print the operators that take most time, with calls and self time per model."""
    where = ["cpu"] if device == "cpu" else ["cpu", "device"]
    events = {}
    for name, model in models.items():
        action(model)
        with torch.profiler.profile() as recorded:
            action(model)
            settle(device)
        events[name] = recorded.key_averages()
    for which in where:
        tabulate(events, f"{title}, {which}: self time, ms (calls)", which, top)


def tabulate(events: dict[str, Any], title: str, which: str, top: int) -> None:
    """Print one table of a profile."""
    models = [*events]
    found: dict[str, dict[str, tuple[int, float]]] = {}
    for name in models:
        for event in events[name]:
            time_us = getattr(event, f"self_{which}_time_total")
            cell = (event.count, time_us / 1e3)
            found.setdefault(event.key, {})[name] = cell
    table = Table(title=title)
    for column in ("operator", *models):
        table.add_column(column)
    none = (0, 0.0)
    totals = {n: sum(row.get(n, none)[1] for row in found.values()) for n in models}
    table.add_row("all", *(f"{total:.0f}" for total in totals.values()))
    largest = sorted(found, key=lambda key: -max(ms for _, ms in found[key].values()))
    for key in largest[:top]:
        cells = (found[key].get(name, none) for name in models)
        table.add_row(key, *(f"{ms:.1f} ({calls})" for calls, ms in cells))
    Console().print(table)


def peak_memory(kind: str, options: argparse.Namespace) -> int:
    """Peak bytes of a process that runs one training step, on a GPU those there."""
    command = [sys.executable, __file__, "--measure-memory", kind]
    for name in ("dtype", "rows", "length", "device"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def lifecycle(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of wrap, save and load of the mixture."""
    base, _ = load_base("smollm2", options.dtype, options.device)
    marks = [time.perf_counter()]
    model: Any = molora.wrap(base, mixture(False))
    marks.append(time.perf_counter())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/adapter")
        marks.append(time.perf_counter())
        molora.unwrap(model)
        start = time.perf_counter()
        molora.load(model, f"{folder}/adapter")
        load = time.perf_counter() - start
    return {"wrap": marks[1] - marks[0], "save": marks[2] - marks[1], "load": load}


def main() -> None:
    """Measure, print one table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to decode")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--measure-memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = (options.rows, options.length)
    ids = torch.randint(0, 49152, shape, generator=torch.Generator().manual_seed(0))
    ids = ids.to(options.device)
    if options.measure_memory:
        train_step(build(options.measure_memory, options), ids)
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        on_gpu = options.device == "cuda"
        print(torch.cuda.max_memory_allocated() if on_gpu else resident)
        return
    if options.profile:
        models = {name: build(name, options) for name in ("peft", "molora")}
        where = options.device
        profile(models, lambda m: train_step(m, ids), "Training step", where)
        profile(models, lambda m: decode(m, ids, options.tokens), "Decoding", where)
        return
    memory = {name: peak_memory(name, options) for name in ("peft", "molora")}
    names = ["peft", "molora", "molora with balance"]
    models = {name: build(name, options) for name in names}
    more = (options.rounds, options.device)
    steps = {n: functools.partial(train_step, m, ids) for n, m in models.items()}
    step = take_turns(steps, *more)
    del models["molora with balance"], steps
    speed = take_turns(
        {
            name: functools.partial(decode, model, ids, options.tokens)
            for name, model in models.items()
        },
        *more,
    )
    del models
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "dtype": options.dtype,
        "shape": shape,
        "machine": ran_on(options.device),
        "torch": torch.__version__,
        "seconds": {"step": step, "decode": speed},
        "peak_bytes": memory,
        "ratios": {
            "step": ratio(step, "molora"),
            "step with balance": ratio(step, "molora with balance"),
            "decode": ratio(speed, "molora"),
            "peak memory": memory["molora"] / memory["peft"],
        },
        "lifecycle_seconds": lifecycle(options),
    }
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def ratio(seconds: dict[str, list[float]], name: str) -> float:
    """Median of name over the median of PEFT."""
    return statistics.median(seconds[name]) / statistics.median(seconds["peft"])


def show(result: dict[str, Any]) -> None:
    """Print the ratios beside their limits, and the times of the lifecycle."""
    table = Table(title=f"molora / PEFT LoRA r=8, SmolLM2, {result['dtype']}")
    for column in ("figure", "measured", "limit"):
        table.add_column(column)
    for name, value in result["ratios"].items():
        table.add_row(name, f"{value:.3f}", f"{LIMITS[name]:.2f}")
    for name, value in result["lifecycle_seconds"].items():
        table.add_row(name, f"{value:.2f} s", "1 s" if name == "wrap" else "2 s")
    Console().print(table)


if __name__ == "__main__":
    main()
