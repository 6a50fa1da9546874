"""The mixtures of configs/ and one LoRA, at equally many trained values, on one model.

    .venv/bin/python tests/benchmarks/bench_systems.py --json out.json

All see the same rows in the same order for the same steps with the same learning rate,
on all linear layers; each keeps the experts, router, objectives and scale alpha / r of
its YAML, and its rank is set so that it trains as many values as the quickstart's
mixture. Each run has a process of its own, whose peak memory is noted, on a GPU that of
its tensors there; ``--jobs`` runs some at a time. Results are kept per run, so a
stopped benchmark goes on. The time of a step is taken at the end, for each system and
the LoRA by turns.

A GPU, where there is one, is used; its results go into a file of their own.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from turns import ran_on, settle

import molora
from molora.base_models import load_base
from molora.config import read_yaml
from molora.demo import CONFIG
from molora.model import adapter_parameters
from molora.run_config import load_run_config
from molora.training import MoloraTrainer
from molora.training.arguments import build_arguments
from molora.training.data import Collator, build_eval_sets, build_mixture
from molora.training.evaluation import evaluate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SYSTEMS = {
    "lora": "one LoRA",
    "quickstart": "top-2 of 8",
    "molora": "MoLORA",
    "mola": "MoLA, inverted triangle",
    "mola_triangle": "MoLA, triangle",
    "mola_hourglass": "MoLA, hourglass",
    "mola_rectangle": "MoLA, rectangle",
    "hydralora": "HydraLoRA",
    "loramoe": "LoRAMoE",
    "mixlora": "MixLoRA",
    "topp": "top-p",
}
"""Files in configs/, and what they are called in the table."""
SHORT = [
    "training.max_steps=32",
    "training.warmup_steps=5",
    "data.tasks.0.eval_limit=20",
    "data.tasks.1.eval_limit=20",
    "data.tasks.2.eval_limit=20",
    "data.tasks.3.eval_limit=20",
    "data.tasks.2.max_new_tokens=40",
    'training.save_strategy="no"',
    "training.report_to=[]",
]
"""What makes a run short enough for a CPU; other overrides replace it."""


def run_one(job: tuple[str, int, list[str]]) -> tuple[str, int, dict[str, Any]]:
    """One run of a pool, with what it is."""
    return job[0], job[1], run(*job)


def trained_values(model: Any) -> int:
    """How many values the adapter trains."""
    return sum(parameter.numel() for parameter in adapter_parameters(model).values())


def with_rank(raw: dict[str, Any], rank: int) -> molora.AdapterConfig:
    """Settings of a system on all linear layers, with its scale alpha / r."""
    experts = raw["experts"]
    scale = experts["lora_alpha"] / experts["r"]
    sized = {**experts, "r": rank, "lora_alpha": scale * rank}
    return molora.AdapterConfig.from_dict(
        {**raw, "experts": sized, "target_modules": "all-linear"}
    )


def equal_size(model: Any, name: str, seed: int) -> molora.AdapterConfig:
    """Settings of a system at the size of the quickstart's mixture."""
    reference = read_yaml(CONFIG)["adapter"]
    raw = read_yaml(CONFIG.parent / f"{name}.yaml")["adapter"]
    if name == "lora":
        raw = {"experts": {"kind": "lora", "r": 8, "lora_alpha": 16}}
    sizes = []
    for config in (
        molora.AdapterConfig.from_dict(reference),
        with_rank(raw, 1),
        with_rank(raw, 2),
    ):
        sizes.append(trained_values(molora.wrap(model, config, seed=seed)))
        molora.unwrap(model)
    wanted, one, two = sizes
    return with_rank(raw, 1 + round((wanted - one) / (two - one)))


def run(name: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Train one adapter and evaluate it."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_run_config(
            CONFIG, [f"training.output_dir={folder}", f"seed={seed}", *overrides]
        )
        model, tokenizer = load_base(config.model.name, config.model.dtype)
        mixture = build_mixture(config.data, tokenizer, base_dir=CONFIG.parent)
        eval_sets = build_eval_sets(config.data, tokenizer, base_dir=CONFIG.parent)
        molora.wrap(model, equal_size(model, name, seed), seed=seed)
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
        scores = evaluate(
            model,
            tokenizer,
            eval_sets,
            task_context=lambda names: molora.tasks(model, names),
        )
        return {
            "values": trained_values(model),
            "train_seconds": seconds,
            "peak_mb": peak_bytes() >> 20,
            "scores": {task: result.to_dict() for task, result in scores.items()},
        }


def peak_bytes() -> int:
    """Most bytes that this process, or its tensors on a GPU, have taken."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step_ratio(name: str, rounds: int = 3) -> float:
    """Median time of a training step, 4 x 128 tokens, over that of one LoRA, by turns.

    Two models at a time: where many are held, the later ones lie in worse memory.
    """
    ids = torch.randint(3, 40000, (4, 128), generator=torch.Generator().manual_seed(0))
    ids = ids.to(DEVICE)
    steps, times = [], []
    for which in ("lora", name):
        model, _ = load_base("smollm2", "float32", DEVICE)
        molora.wrap(model, equal_size(model, which, 0)).train()
        optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-5)
        steps.append((model, optimizer))
    for _ in range(1 + rounds):
        for model, optimizer in steps:
            settle(DEVICE)
            start = time.perf_counter()
            with molora.tasks(model, ["sentiment"] * len(ids)):
                model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            settle(DEVICE)
            times.append(time.perf_counter() - start)
    lora, own = (statistics.median(times[2 + at :: 2]) for at in (0, 1))
    return own / lora


def main() -> None:
    """Run what is missing, print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("runs/bench_systems.json"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--systems", nargs="*", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument("overrides", nargs="*", default=SHORT, help="key.path=value")
    options = parser.parse_args()
    done: dict[str, Any] = {}
    if options.json.exists():
        done = json.loads(options.json.read_text())
    if done.setdefault("overrides", options.overrides) != options.overrides:
        parser.error(f"{options.json} holds runs with other overrides")
    here = ran_on(DEVICE)
    if not options.show and done.setdefault("machine", here) != here:
        parser.error(f"{options.json} holds runs of {done['machine']}")
    runs = done.setdefault("runs", {})
    missing = [
        (name, seed)
        for seed in range(options.seeds)
        for name in options.systems
        if f"{name}-{seed}" not in runs
    ]
    own = multiprocessing.get_context("spawn")
    jobs = [] if options.show else [(*which, options.overrides) for which in missing]
    # a process ends after its run: its peak is its own
    with own.Pool(options.jobs, maxtasksperchild=1) as pool:
        for name, seed, found in pool.imap_unordered(run_one, jobs):
            runs[f"{name}-{seed}"] = {**found, "date": time.strftime("%Y-%m-%d")}
            _write(options.json, done)
    ratios = done.setdefault("step / LoRA", {})
    for name in options.systems if not options.show else ():
        if name not in ratios:
            with own.Pool(1) as pool:
                ratios[name] = pool.apply(step_ratio, (name,))
            _write(options.json, done)
    show(done)


def _write(path: Path, done: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(done, indent=2) + "\n")


def show(done: dict[str, Any]) -> None:
    """Mean and standard deviation over seeds of loss and score per task."""
    runs, steps = done["runs"], done.get("step / LoRA", {})
    table = Table(title="Mean over seeds (standard deviation of the loss)")
    tasks = list(next(iter(runs.values()))["scores"])
    for column in (
        *("system", "seeds", "trained", "mean loss", "mean score", *tasks),
        *("step / LoRA", "peak, MiB"),
    ):
        table.add_column(column)
    for name, title in SYSTEMS.items():
        mine = [one for key, one in runs.items() if key.rpartition("-")[0] == name]
        if not mine:
            continue
        scores = [[_score(one["scores"][task]) for task in tasks] for one in mine]
        losses = [[s["loss"] for s in one["scores"].values()] for one in mine]
        peaks = [one["peak_mb"] for one in mine if "peak_mb" in one]
        table.add_row(
            title,
            str(len(mine)),
            f"{mine[0]['values'] / 1e6:.2f} M",
            spread([statistics.mean(values) for values in losses]),
            f"{statistics.mean(map(statistics.mean, scores)):.1%}",
            *(
                f"{spread([values[i] for values in losses])}, "
                f"{statistics.mean(values[i] for values in scores):.1%}"
                for i in range(len(tasks))
            ),
            f"{steps[name]:.2f}" if name in steps else "-",
            str(max(peaks)) if peaks else "-",
        )
    Console(width=200).print(table)


def _score(result: dict[str, Any]) -> float:
    """Accuracy, or the part of exact matches where there is no accuracy."""
    exact: float = result["exact_match"] or 0.0
    return exact if result["accuracy"] is None else float(result["accuracy"])


def spread(values: list[float]) -> str:
    """Mean, with the standard deviation where there are several."""
    deviation = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


if __name__ == "__main__":
    main()
