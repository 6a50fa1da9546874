"""A given adapter per row: mixed batches against one adapter, and against PEFT.

    .venv/bin/python tests/benchmarks/bench_adapters_per_row.py --json out.json

8 adapters of rank 8 on all 7 linears, and rows of the base between them. Sides, all
on the same weights and tokens, taking turns in one process:

    base     no adapter: what no form can go below
    one      molora, one adapter and no router: what a row would cost alone
    mixed    molora, a given adapter per row
    peft     PEFT, adapter_names, the same rows

The figures are ratios of medians of mixed. By default a Llama of SmolLM2's widths with
few layers and random weights, so that nothing is loaded; --model runs another.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM
from turns import ran_on, take_turns

import molora
from molora.base_models import load_base
from molora.model import sites

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = [f"adapter_{e}" for e in range(8)]
LIMITS = {"base": None, "one": 1.3, "peft": 1 / 3}
"""Largest ratio of the time of mixed to that of another side, where one is asked."""


def base(options: argparse.Namespace) -> Any:
    """The base model: SmolLM2's widths with random weights, or a real one."""
    if options.model:
        return load_base(options.model, options.dtype, options.device)[0]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=options.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model: Any = LlamaForCausalLM(config).eval()
    return model.to(options.device, getattr(torch, options.dtype))


def adapted(options: argparse.Namespace, adapters: list[str]) -> Any:
    """A molora model of some adapters, B drawn so that every product is real."""
    router = {"kind": "adapter", "adapters": adapters}
    raw = {
        "target_modules": LINEARS,
        "experts": {"kind": "lora", "num_experts": len(adapters), "r": 8},
        "router": router if len(adapters) > 1 else {"kind": "none"},
    }
    model: Any = molora.wrap(base(options), molora.AdapterConfig.from_dict(raw))
    for number, site in enumerate(sites(model).values()):
        torch.manual_seed(number)
        experts: Any = site.experts
        torch.nn.init.normal_(experts.Bt, std=0.02)
    return model.eval()


def in_peft(options: argparse.Namespace, ours: Any) -> Any:
    """The same adapters in PEFT."""
    settings = LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS)
    model: Any = get_peft_model(base(options), settings, adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, settings)
    with torch.no_grad():
        for path, site in sites(ours).items():
            layer = model.base_model.model.get_submodule(path)
            for e, name in enumerate(NAMES):
                layer.lora_A[name].weight.copy_(site.experts.A[e])  # type: ignore
                layer.lora_B[name].weight.copy_(site.experts.Bt[e].t())  # type: ignore
    return model.eval()


def rows(options: argparse.Namespace) -> list[str]:
    """Adapter of each row: all in turn, then the base."""
    return [[*NAMES, "base"][b % 9] for b in range(options.rows)]


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Seconds of prefill and of decoding, by side."""
    plain = base(options)
    one, mixed = adapted(options, NAMES[:1]), adapted(options, NAMES)
    theirs = in_peft(options, mixed)
    names = rows(options)
    peft_names = ["__base__" if name == "base" else name for name in names]
    shape = (options.rows, options.length)
    ids = torch.randint(3, 2048, shape, generator=torch.Generator().manual_seed(0))
    ids = ids.to(options.device)
    with torch.no_grad(), molora.tasks(mixed, names):
        ours_BSV = mixed(ids).logits
        theirs_BSV = theirs(ids, adapter_names=peft_names).logits
    # the same work on both sides, or the times mean nothing
    near = 1e-3 if options.dtype == "float32" else 5e-2
    torch.testing.assert_close(ours_BSV, theirs_BSV, rtol=near, atol=near)

    def both(action: Callable[..., Any]) -> dict[str, list[float]]:
        def named() -> None:
            with molora.tasks(mixed, names):
                action(mixed)

        sides: dict[str, Callable[[], Any]] = {
            "base": lambda: action(plain),
            "one": lambda: action(one),
            "mixed": named,
            "peft": lambda: action(theirs, adapter_names=peft_names),
        }
        with torch.no_grad():
            return take_turns(sides, options.rounds, options.device)

    prompt = ids[:, :16]
    mask = torch.ones_like(prompt)
    count = options.tokens
    tokens = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    return {
        "prefill": both(lambda m, **more: m(input_ids=ids, **more)),
        "decode": both(
            lambda m, **more: m.generate(
                input_ids=prompt, attention_mask=mask, **tokens, **more
            )
        ),
    }


def main() -> None:
    """Measure, print one table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a base model instead, for example smollm2")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=9)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--tokens", type=int, default=16, help="tokens to decode")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    seconds = measure(options)
    medians = {
        phase: {name: statistics.median(times) for name, times in sides.items()}
        for phase, sides in seconds.items()
    }
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "model": options.model or f"random Llama, {options.layers} layers of 576",
        "rows": rows(options),
        "length": options.length,
        "tokens": options.tokens,
        "machine": ran_on(options.device),
        "dtype": options.dtype,
        "torch": torch.__version__,
        "seconds": seconds,
        "ratios": {
            phase: {name: times["mixed"] / times[name] for name in LIMITS}
            for phase, times in medians.items()
        },
    }
    show(result, medians)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def show(result: dict[str, Any], medians: dict[str, dict[str, float]]) -> None:
    """Print the ratios beside their limits."""
    title = f"8 adapters and base rows in one batch of {len(result['rows'])}"
    table = Table(title=f"{title}, {result['model']}")
    for column in ("phase", "against", "its ms", "mixed ms", "ratio", "asked"):
        table.add_column(column)
    for phase, ratios in result["ratios"].items():
        for name, ratio in ratios.items():
            times = medians[phase]
            numbers = (f"{1000 * times[side]:.1f}" for side in (name, "mixed"))
            limit = LIMITS[name]
            asked = "" if limit is None else f"at most {limit:.3f}"
            table.add_row(phase, name, *numbers, f"{ratio:.3f}", asked)
        own, theirs = (times[side] - times["base"] for side in ("mixed", "peft"))
        numbers = (f"{1000 * more:.1f}" for more in (theirs, own))
        table.add_row(phase, "peft, both less base", *numbers, f"{own / theirs:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
