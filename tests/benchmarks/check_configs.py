"""Every YAML of configs/ on the real model, from the command line.

    .venv/bin/python tests/benchmarks/check_configs.py --jobs 2

Each is trained for a few steps, evaluated, asked a prompt, collapsed where it has
several experts, merged and exported; then the logits of the merged model, and of what
PEFT reads from the export, are compared with those of the adapter. A GPU is used where
there is one. A command may refuse (exit code 2): its message is printed. Exits with 1
if anything fails otherwise, or where logits differ by more than ``NEAR``.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM

import molora
from molora.commands import session
from molora.run_config import load_run_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MOLORA = [sys.executable, "-P", "-c", "from molora.cli import main; main()"]
COLUMNS = ("train", "evaluate", "generate", "collapse", "merge", "export", "compare")
NEAR = {"torch.float32": 1e-3, "torch.bfloat16": 5e-2}
"""Largest difference of logits over the largest of them, by the model's dtype."""
SHORT = [
    "training.max_steps=2",
    "training.per_device_train_batch_size=2",
    "training.per_device_eval_batch_size=4",
    "training.warmup_steps=0",
    'training.save_strategy="no"',
    "training.report_to=[]",
    *(f"data.tasks.{task}.eval_limit=4" for task in range(4)),
    *(f"data.tasks.{task}.max_new_tokens=8" for task in (2, 3)),
]
SHORTER = {
    "alora": [
        "training.max_steps=3",
        'adapter.target_modules=["layers.0.self_attn.q_proj", "layers.9.mlp.up_proj"]',
        "training.recipe={kind: alora, init_r: 2, warmup: 1, interval: 1, rounds: 2}",
    ],
    "aflora": ["training.max_steps=4", "training.recipe.deltaT=1"],
    "rosa": ["training.recipe.warmup_steps=0"],
}
"""What the recipes of some files need to have a step of every kind."""
PROMPT = "jump twice and walk left Actions:"


def commands(file: Path, folder: Path) -> dict[str, list[str]]:
    """The commands of one file, in order."""
    config = load_run_config(file)
    run = [str(file), f"training.output_dir={folder}", *SHORT]
    run += SHORTER.get(file.stem, [])
    if torch.cuda.is_available():
        run.append("model.device=cuda")
    made = {name: [*MOLORA, name, *run] for name in COLUMNS[:-1]}
    made["generate"] += ["--prompt", PROMPT, "--max-new-tokens", "8"]
    made["generate"] += ["--task", config.data.tasks[0].name]
    made["collapse"] += ["collapse.calibration_rows=8"]
    if config.adapter.experts.num_experts == 1:
        del made["collapse"]
    if config.model.quantization != "none":
        made["merge"] += ["--base", "dequantised"]
    made["compare"] = [sys.executable, __file__, "--compare", str(file), str(folder)]
    return made


def check(file: Path, output: Path, limit: int) -> dict[str, Any]:
    """Run the commands of one file; what each gave."""
    folder = output / file.stem
    shutil.rmtree(folder, ignore_errors=True)
    found: dict[str, Any] = {}
    for name, command in commands(file, folder).items():
        start = time.perf_counter()
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=limit, check=False
            )
            code, out, err = done.returncode, done.stdout, done.stderr
        except subprocess.TimeoutExpired:
            code, out, err = 124, "", f"longer than {limit} s"
        seconds = time.perf_counter() - start
        found[name] = {"code": code, "seconds": round(seconds, 1)}
        if code:
            found[name]["message"] = err[-1500:]
        elif name == "compare":
            found["logits"] = json.loads(out.splitlines()[-1])
        if code and name == "train":
            break
    shutil.rmtree(folder, ignore_errors=True)
    return found


@torch.no_grad()
def compare(file: Path, folder: Path) -> dict[str, float]:
    """Largest differences of logits over the largest logit, by what was written."""
    config = load_run_config(file)
    adapter = folder / "collapsed"
    if not adapter.is_dir():
        adapter = folder / "adapter"
    model, tokenizer = session.trained(config, adapter)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"].to(model.device)
    task = [config.data.tasks[0].name]

    def logits(of: Any) -> torch.Tensor:
        found: torch.Tensor = of(input_ids=ids).logits.float()
        return found

    with molora.tasks(model, task):
        ours = logits(model)
    found = {}
    kind = model.dtype
    if (folder / "merged").is_dir():
        merged = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=kind)
        found["merged"] = logits(merged.to(model.device))
    molora.unwrap(model)
    found["base"] = logits(model)
    if (folder / "peft").is_dir():
        found["PEFT"] = logits(PeftModel.from_pretrained(model, str(folder / "peft")))
    largest = ours.abs().max()
    off = {k: float((v - ours).abs().max() / largest) for k, v in found.items()}
    return {**off, "limit": NEAR[str(kind)]}


def wrong(found: dict[str, Any]) -> bool:
    """Whether a command failed, or what was written computes something else."""
    codes = [found[name]["code"] for name in COLUMNS if name in found]
    logits = found.get("logits", {})
    written = [name for name in ("merged", "PEFT") if name in logits]
    far = [logits[name] > logits["limit"] for name in written]
    return any(code not in (0, 2) for code in codes) or any(far)


def show(results: dict[str, dict[str, Any]]) -> None:
    """Print one table, and why anything did not run."""
    table = Table(title="seconds; differences of logits from those of the adapter")
    for column in ("config", *COLUMNS[:-1], "base", "merged", "PEFT"):
        table.add_column(column)
    console = Console(width=150)
    for name, found in results.items():
        cells = []
        for step in COLUMNS[:-1]:
            code = found.get(step, {}).get("code")
            said = {None: "", 0: f"{found.get(step, {}).get('seconds')}", 2: "refused"}
            cells.append(said.get(code, f"failed ({code})"))
        logits = found.get("logits", {})
        cells += [f"{logits[k]:.1e}" if k in logits else "" for k in
                  ("base", "merged", "PEFT")]  # fmt: skip
        table.add_row(name, *cells, style="red" if wrong(found) else "")
    for name, found in results.items():
        for step in COLUMNS:
            if message := found.get(step, {}).get("message"):
                console.print(f"{name} {step}: {message.strip()}", markup=False)
    console.print(table)


def main() -> None:
    """Run, print one table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="files of configs/, all by default")
    parser.add_argument("--jobs", type=int, default=1, help="files at a time")
    parser.add_argument("--limit", type=int, default=600, help="seconds of a command")
    parser.add_argument("--output", type=Path, default=Path("runs/check_configs"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--compare", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compare:
        print(json.dumps(compare(*options.compare)))
        return
    names = options.names or sorted(file.stem for file in CONFIGS.glob("*.yaml"))
    files = [CONFIGS / f"{name}.yaml" for name in names]
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    results: dict[str, dict[str, Any]] = {}

    def one(file: Path) -> tuple[str, dict[str, Any]]:
        return file.stem, check(file, options.output, options.limit)

    with ThreadPoolExecutor(options.jobs) as pool:
        for name, found in track(pool.map(one, files), "configs", len(files)):
            results[name] = found
            if options.json:
                options.json.write_text(json.dumps(results, indent=1) + "\n")
    show(results)
    sys.exit(any(wrong(found) for found in results.values()))


if __name__ == "__main__":
    main()
