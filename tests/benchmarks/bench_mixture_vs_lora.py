"""A mixture against one LoRA with equally many trained values, on the quickstart tasks.

    .venv/bin/python tests/benchmarks/bench_mixture_vs_lora.py --json out.json

Both see the same rows in the same order for the same steps, with the same learning rate
and the same scale alpha / r. Results are kept per run, so a stopped run goes on.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import molora
from molora.base_models import load_base
from molora.demo import CONFIG
from molora.model import adapter_parameters, sites
from molora.run_config import load_run_config
from molora.training import MoloraTrainer
from molora.training.arguments import build_arguments
from molora.training.data import Collator, build_eval_sets, build_mixture
from molora.training.evaluation import evaluate


def trained_values(model: Any) -> int:
    """How many values the adapter trains."""
    return sum(parameter.numel() for parameter in adapter_parameters(model).values())


def equal_lora(model: Any, mixture: molora.AdapterConfig) -> molora.AdapterConfig:
    """One LoRA on the same layers whose size is nearest to the mixture's."""
    per_rank = sum(s.in_features + s.out_features for s in sites(model).values())
    rank = round(trained_values(model) / per_rank)
    scale = mixture.experts.scales()[0]  # type: ignore[attr-defined]
    experts = {"kind": "lora", "r": rank, "lora_alpha": scale * rank}
    return molora.AdapterConfig.from_dict(
        {"target_modules": mixture.target_modules, "experts": experts}
    )


def run(kind: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Train one adapter and evaluate it."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_run_config(
            CONFIG, [f"training.output_dir={folder}", f"seed={seed}", *overrides]
        )
        model, tokenizer = load_base(config.model.name, config.model.dtype)
        mixture = build_mixture(config.data, tokenizer, base_dir=CONFIG.parent)
        eval_sets = build_eval_sets(config.data, tokenizer, base_dir=CONFIG.parent)
        molora.wrap(model, config.adapter, seed=seed)
        if kind == "lora":
            single = equal_lora(model, config.adapter)
            molora.wrap(molora.unwrap(model), single, seed=seed)
        raw = {**config.training, "seed": seed}
        arguments, settings = build_arguments(raw)
        start = time.perf_counter()
        MoloraTrainer(
            model=model,
            args=arguments,
            settings=settings,
            train_dataset=mixture,
            data_collator=Collator(tokenizer.pad_token_id),
            processing_class=tokenizer,
        ).train()
        seconds = time.perf_counter() - start
        model.eval()
        scores = evaluate(model, tokenizer, eval_sets)
        return {
            "values": trained_values(model),
            "train_seconds": seconds,
            "scores": {task: result.to_dict() for task, result in scores.items()},
        }


def main() -> None:
    """Run what is missing, print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    options = parser.parse_args()
    done: dict[str, Any] = {}
    if options.json.exists():
        done = json.loads(options.json.read_text())
    if done.setdefault("overrides", options.overrides) != options.overrides:
        parser.error(f"{options.json} holds runs with other overrides")
    done["date"] = time.strftime("%Y-%m-%d")
    runs = done.setdefault("runs", {})
    for seed in range(options.seeds):
        for kind in ("mixture", "lora"):
            if f"{kind}-{seed}" not in runs:
                runs[f"{kind}-{seed}"] = run(kind, seed, options.overrides)
                options.json.write_text(json.dumps(done, indent=2) + "\n")
    show(runs, options.seeds)


def show(runs: dict[str, Any], seeds: int) -> None:
    """Mean and standard deviation over seeds of loss and score per task."""
    table = Table(title=f"Mean over {seeds} seeds (standard deviation)")
    tasks = list(runs["mixture-0"]["scores"])
    for column in ("adapter", "trained", *tasks, "mean loss"):
        table.add_column(column)
    for kind in ("mixture", "lora"):
        mine = [runs[f"{kind}-{seed}"] for seed in range(seeds)]
        cells = []
        for task in tasks:
            scores = [one["scores"][task] for one in mine]
            metric = "exact_match" if scores[0]["accuracy"] is None else "accuracy"
            loss = spread([score["loss"] for score in scores])
            cells.append(f"{loss}, {statistics.mean(s[metric] for s in scores):.1%}")
        means = [
            statistics.mean(score["loss"] for score in one["scores"].values())
            for one in mine
        ]
        table.add_row(kind, f"{mine[0]['values'] / 1e6:.2f} M", *cells, spread(means))
    Console().print(table)


def spread(values: list[float]) -> str:
    """Mean with standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ({deviation:.3f})"


if __name__ == "__main__":
    main()
