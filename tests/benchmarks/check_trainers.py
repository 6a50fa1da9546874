"""Whole runs of both trainers, on a GPU where there is one: train, save, load back.

    .venv/bin/python tests/benchmarks/check_trainers.py

A small Llama is written to a folder and read as a run reads it: as stored, in NF4 and
in 8 bits. MoloraTrainer and transformers' own train QLoRA (paged AdamW) and a top-2
mixture on it, and MoloraTrainer every recipe. The loss must fall, what was trained must
come back from its folder with the same logits, and a run that is resumed half-way must
end as the one that was not stopped. Exits with 1 if anything is wrong.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

import molora
from molora.base_models import load_base
from molora.model import adapter_parameters
from molora.training import Collator, MoloraTrainer, MoloraTrainingSettings, TaskMixture
from molora.training.mixture import TaskRows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS = 24
LORA = {"experts": {"kind": "lora", "r": 8}}
TOP2 = {
    "experts": {"kind": "lora", "num_experts": 4, "r": 8},
    "router": {"kind": "topk", "top_k": 2},
    "balance": [{"kind": "switch", "weight": 0.01}],
}
SUM = {"kind": "sum", "parts": [{"kind": "lora"}, {"kind": "sparse", "density": 0.05}]}
MASKED = {"kind": "lora", "trainability": {"A": "frozen", "B": "masked"}}
RECIPES: dict[str, dict[str, Any]] = {
    "adalora": {"experts": {"kind": "adalora", "init_r": 6}, "target_r": 4},
    "sora": {"experts": {"kind": "sora"}, "gate_learning_rate": 0.05},
    "alora": {"experts": {"kind": "alora", "r": 2}, "rounds": 2},
    "aflora": {"experts": {"kind": "aflora"}, "tfinal": 0.3, "deltaT": 2},
    "bilora": {"experts": {"kind": "bilora"}},
    "lori": {"experts": MASKED},
    "rosa": {"experts": SUM, "warmup_steps": 6},
}
"""Experts and settings of each, made to have a step of every kind."""


def write_base(folder: Path) -> None:
    """A Llama of two layers and a tokenizer, as save_pretrained writes them."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 128,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    words = {f"w{i}": i for i in range(128)}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0").save_pretrained(
        folder
    )


def rows() -> TaskMixture:
    """Two tasks, each of one row many times, which are soon learned."""
    parts = []
    for task, name in enumerate(["even", "odd"]):
        part = TaskRows(name)
        for i in range(16):
            ids = [10 + task] * (8 + i % 4)
            part.add({"input_ids": ids, "labels": [-100, *ids[1:]], "task_id": task})
        parts.append(part)
    return TaskMixture(parts, [0.5, 0.5], 32)


def trainer_for(base: Path, run: Path, case: dict[str, Any]) -> Trainer:
    """A trainer of one case, on a new model."""
    model, _ = load_base(str(base), case["dtype"], DEVICE, case["scheme"])
    raw = {"target_modules": "all-linear", **case["adapter"]}
    molora.wrap(model, molora.AdapterConfig.from_dict(raw), seed=0)
    arguments = TrainingArguments(
        output_dir=str(run),
        per_device_train_batch_size=8,
        max_steps=STEPS,
        learning_rate=2e-2,
        logging_steps=1,
        save_steps=STEPS // 2,
        optim="paged_adamw_32bit",
        remove_unused_columns=False,
        bf16=case["dtype"] == "bfloat16",
        use_cpu=DEVICE == "cpu",
        report_to="none",
        disable_tqdm=True,
    )
    common = {
        "model": model,
        "args": arguments,
        "train_dataset": rows(),
        "data_collator": Collator(0),
    }
    if case["plain"]:
        return Trainer(**common | {"data_collator": _without_tasks})
    settings = MoloraTrainingSettings.from_dict({"recipe": case["recipe"]})
    return MoloraTrainer(**common, settings=settings)


def _without_tasks(batch: Any) -> dict[str, Any]:
    found: dict[str, Any] = Collator(0)(batch)
    found.pop("task_ids")
    return found


def check(base: Path, run: Path, case: dict[str, Any]) -> tuple[float, float, str]:
    """First and last loss of a case, and what is wrong."""
    trainer = trainer_for(base, run, case)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    wrong = [] if losses[-1] < 0.8 * losses[0] else ["the loss did not fall"]
    model: Any = trainer.model.eval()
    folder = run / "adapter"
    model.save_pretrained(folder)
    plain, _ = load_base(str(base), case["dtype"], DEVICE, case["scheme"])
    back: Any = molora.load(plain, folder).eval()
    ids = torch.arange(10, 42, device=DEVICE)[None]
    with torch.no_grad():
        if not torch.equal(back(ids).logits, model(ids).logits):
            wrong.append("other logits from its folder")
    if not case["plain"]:
        again = trainer_for(base, run, case)
        again.remove_callback(PrinterCallback)
        again.train(resume_from_checkpoint=str(run / f"checkpoint-{STEPS // 2}"))
        pairs = zip(
            adapter_parameters(again.model).values(),
            adapter_parameters(model).values(),
            strict=True,
        )
        # on a GPU two runs may sum in another order
        if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs):
            wrong.append("resumed it ends elsewhere")
    return losses[0], losses[-1], "; ".join(wrong)


def cases() -> dict[str, dict[str, Any]]:
    """Every case by name."""
    found: dict[str, dict[str, Any]] = {}
    dtypes = {"none": "float32", "nf4": "bfloat16", "int8": "float16"}
    if DEVICE == "cpu":
        dtypes["int8"] = "float32"
    for scheme, dtype in dtypes.items():
        for name, adapter in {"QLoRA": LORA, "top-2 of 4": TOP2}.items():
            for plain in (False, True):
                who = "Trainer" if plain else "MoloraTrainer"
                found[f"{scheme}, {name}, {who}"] = {
                    "scheme": scheme,
                    "dtype": dtype,
                    "adapter": adapter,
                    "plain": plain,
                    "recipe": None,
                }
    for kind, given in RECIPES.items():
        recipe = {"kind": kind, **given}
        experts = recipe.pop("experts")
        found[f"recipe {kind}"] = {
            "scheme": "none",
            "dtype": "float32",
            "adapter": {"experts": experts},
            "plain": False,
            "recipe": recipe,
        }
    return found


def main() -> None:
    """Run every case, print one table."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    table, failed = Table(title=f"Trainers on {DEVICE}"), 0
    for column in ("case", "first loss", "last loss", "wrong"):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as place:
        base = Path(place) / "base"
        write_base(base)
        for name, case in track(
            list(cases().items()), "cases", console=Console(stderr=True)
        ):
            run = Path(place) / "run"
            first, last, wrong = check(base, run, case)
            shutil.rmtree(run)
            failed += bool(wrong)
            style = "red" if wrong else ""
            table.add_row(name, f"{first:.3f}", f"{last:.3f}", wrong, style=style)
    Console().print(table)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
