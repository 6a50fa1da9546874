"""Time of a generated token under X-LoRA, with a cache, against PEFT.

    .venv/bin/python tests/benchmarks/bench_xlora_decode.py --json out.json

molora: 8 adapters of rank 8 under one classifier, a key-value cache for either pass.
PEFT LoRA: one adapter of rank 8 with its cache. PEFT X-LoRA: the same 8 adapters, and
no cache. All decode greedily in one process, interleaved; figures are ratios of
medians. The model has the sizes of SmolLM2-135M and random weights, or is the real one.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, XLoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM
from turns import ran_on, settle

import molora
from molora.base_models import load_base

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LIMIT = 2.2
"""Asked of molora's X-LoRA over PEFT's LoRA."""


def base(options: argparse.Namespace, **more: Any) -> Any:
    """SmolLM2-135M, or a model of its sizes."""
    if options.real:
        model, _ = load_base("smollm2", options.dtype, options.device)
        model.config.use_cache = more.get("use_cache", True)
        return model
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        **more,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(options.device, getattr(torch, options.dtype))


def lora(model: Any, seed: int) -> Any:
    """A PEFT LoRA of rank 8, B drawn at random."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS)
    made = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            values = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(0.01 * values)
    return made


def build(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The three models."""
    folders = [str(folder / str(e)) for e in range(options.adapters)]
    for e, path in enumerate(folders):
        lora(base(options), e).save_pretrained(path)
    settings = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=576,
        adapters={str(e): path for e, path in enumerate(folders)},
    )
    models = {
        "peft lora": lora(base(options), 0),
        "molora x-lora": molora.import_peft(
            base(options), folders, router={"kind": "xlora"}, train="router"
        ),
        "peft x-lora": get_peft_model(base(options, use_cache=False), settings),
    }
    return {n: model.to(options.device).eval() for n, model in models.items()}


def decode(model: Any, prompt: torch.Tensor, tokens: int) -> float:
    """Seconds of tokens greedy steps after a prompt."""
    start = time.perf_counter()
    with torch.no_grad():
        model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
    settle(prompt.device.type)
    return time.perf_counter() - start


def measure(
    models: dict[str, Any], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Milliseconds per new token, the prompt's part taken off, after one warm-up."""
    shape = (1, options.prompt)
    prompt = torch.randint(0, 49152, shape, generator=torch.Generator().manual_seed(0))
    prompt = prompt.to(options.device)
    found: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(options.rounds + 1):
        for name, model in models.items():
            first = decode(model, prompt, 1)
            rest = decode(model, prompt, 1 + options.tokens) - first
            if turn:
                found[name].append(1000 * rest / options.tokens)
    return found


def main() -> None:
    """Measure, print one table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--real", action="store_true", help="the real SmolLM2-135M")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=24, help="tokens to decode")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = build(options, Path(folder))
    times = measure(models, options)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: value / medians["peft lora"] for name, value in medians.items()}
    title = f"decoding, {options.adapters} adapters, {options.dtype}"
    table = Table(title=title)
    for column in ("model", "ms per token", "over peft lora", "limit"):
        table.add_column(column)
    for name, value in medians.items():
        limit = f"{LIMIT:.2f}" if name == "molora x-lora" else ""
        table.add_row(name, f"{value:.1f}", f"{ratios[name]:.2f}", limit)
    Console().print(table)
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k != "json"}
        result = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": ran_on(options.device),
            "torch": torch.__version__,
            "settings": settings,
            "ms_per_token": times,
            "over_peft_lora": ratios,
        }
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
