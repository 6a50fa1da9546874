"""What several commands need: consoles, the trained model, files for results."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import molora
from molora.base_models import load_base
from molora.checkpoint import start_from
from molora.config import AdapterConfig
from molora.continuing import continued
from molora.errors import CheckpointError, ConfigError
from molora.loftq import steps_of
from molora.model import adapter_parameters, sites
from molora.run_config import RunConfig
from molora.saved import read_adapter, read_settings
from molora.training.arguments import build_arguments
from molora.training.data import EvalSet, build_eval_sets
from molora.training.evaluation import TaskResult, evaluate

T = TypeVar("T")
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]

out = Console()
"""Results go here."""

notes = Console(stderr=True)
"""Remarks and progress go here, so that results can be piped."""


def base(config: RunConfig) -> Loaded:
    """Load the base model of a run and its tokenizer."""
    settings = config.model
    return load_base(
        settings.name, settings.dtype, settings.device, settings.quantization
    )


def original(
    config: RunConfig, adapter: AdapterConfig, least: int = 1
) -> PreTrainedModel | None:
    """Load the unquantised base of a run, where LoftQ reads it; else None.

    Args:
        config: The run.
        adapter: Settings of the adapter.
        least: Iterations of LoftQ from which on it is read: 2 for a saved adapter.
    """
    settings = config.model
    if settings.quantization != "nf4" or steps_of(adapter) < least:
        return None
    note("LoftQ reads the unquantised base")
    return load_base(settings.name, settings.dtype)[0]


def give_adapter(config: RunConfig, model: PreTrainedModel) -> None:
    """Wrap the base of a run, with new experts or those that it starts from.

    Raises:
        MoloraError: Targets or an adapter that do not fit.
    """
    if config.start_from is None:
        twin = original(config, config.adapter)
        molora.wrap(model, config.adapter, seed=config.seed, original=twin)
    else:
        twin = original(config, config.adapter, 2)
        start_from(model, config.start_from, config.adapter, twin)
    trained = [p for p in adapter_parameters(model).values() if p.requires_grad]
    values = sum(p.numel() for p in trained)
    note(f"{len(sites(model))} target layers, {values:,} trained values")


def saved_settings(config: RunConfig, adapter: Path) -> AdapterConfig:
    """Settings of an adapter as the run loads it.

    Raises:
        MoloraError: There is no adapter, or another router means nothing with it.
    """
    require_adapter(adapter)
    saved = read_adapter(adapter).config
    if not config.load_router:
        return saved
    return continued(saved, {"router": config.load_router}, "load")


def trained(config: RunConfig, adapter: Path) -> Loaded:
    """Load the base model of a run with an adapter on it, in eval mode.

    Raises:
        MoloraError: There is no adapter, or it does not fit.
    """
    require_adapter(adapter)
    model, tokenizer = base(config)
    router = config.load_router or None
    twin = original(config, read_settings(adapter), 2)
    return molora.load(model, adapter, router=router, original=twin).eval(), tokenizer


def require_adapter(adapter: Path) -> None:
    """Refuse a folder that is not there, before anything slow happens.

    Raises:
        CheckpointError: There is no such folder.
    """
    if not adapter.is_dir():
        raise CheckpointError(
            f"there is no adapter in {adapter}; train one with: molora train, or name "
            "its folder with --adapter"
        )


def require_other(adapter: Path, output: Path) -> None:
    """Refuse to write a result over the adapter that it is made from.

    Raises:
        ConfigError: Both are one folder.
    """
    if adapter.resolve() == output.resolve():
        raise ConfigError(
            f"--output {output} is the adapter itself, which would be lost; name "
            "another folder"
        )


def require_writable(*paths: Path | None) -> None:
    """Refuse files that cannot be written, before anything slow happens.

    Args:
        paths: Files to write, devices and pipes among them; None is passed over.

    Raises:
        ConfigError: One is a folder, its folder is missing, or permission is.
    """
    for path in paths:
        if path is None:
            continue
        # those of pathlib raise where a folder may not be looked into
        if os.path.isdir(path):
            reason = "is a folder; name a file"
        elif not os.path.isdir(path.parent):
            reason = f"there is no folder {path.parent}"
        elif not os.access(path if os.path.exists(path) else path.parent, os.W_OK):
            reason = "no permission"
        else:
            continue
        raise ConfigError(f"{path}: cannot be written: {reason}")


def filler(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id for padding, which is masked: pad, else eos, else 0."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in ids if token is not None), 0)


def eval_sets(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> Mapping[str, EvalSet]:
    """Evaluation rows by task, or nothing where no task has any."""
    if all(task.eval is None for task in config.data.tasks):
        return {}
    return build_eval_sets(config.data, tokenizer)


def scores(
    config: RunConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, EvalSet],
) -> dict[str, TaskResult]:
    """Evaluate a wrapped model on every task."""
    arguments, _ = build_arguments(config.training)
    return evaluate(
        model,
        tokenizer,
        sets,
        batch_size=arguments.per_device_eval_batch_size,
        task_context=lambda names: molora.tasks(model, names),
    )


def score_table(results: Mapping[str, TaskResult]) -> Table:
    """Scores as a table; a dash where the task does not ask for a score."""
    table = Table(title="Evaluation")
    table.add_column("task")
    for head in ("rows", "loss", "accuracy", "exact match"):
        table.add_column(head, justify="right")
    for name, result in results.items():
        table.add_row(
            name,
            f"{result.n:,}",
            f"{result.loss:.4f}",
            _percent(result.accuracy),
            _percent(result.exact_match),
        )
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def progress(items: Sequence[T], text: str) -> Iterable[T]:
    """Go through items under a progress bar, where a terminal can draw it."""
    quiet = not notes.is_terminal
    return track(items, text, console=notes, transient=True, disable=quiet)


def say(text: str) -> None:
    """Print a line of the results, as it is."""
    out.print(text, highlight=False, markup=False, soft_wrap=True)


def note(text: str) -> None:
    """Tell something on standard error, as it is."""
    notes.print(text, highlight=False, markup=False, soft_wrap=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write results and say so.

    Raises:
        ConfigError: The file cannot be written, or a number is not finite.
    """
    try:
        text = json.dumps(values, indent=2, allow_nan=False) + "\n"
        path.write_text(text, encoding="utf-8")
    except ValueError:
        raise ConfigError(f"{path}: not written, a score is NaN or infinite") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
    note(f"Wrote {path}")
