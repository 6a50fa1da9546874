"""molora collapse, molora merge and molora export."""

import dataclasses
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import molora
from molora.atomic import atomic_folder
from molora.base_models import load_base
from molora.checkpoint import write_manifest
from molora.commands import session
from molora.errors import ConfigError
from molora.mergeable import MergeCost
from molora.merging import check_choice
from molora.run_config import RunConfig
from molora.training.data import Collator, EvalSet, MixtureSampler, build_mixture

BATCH = 8
"""Rows of a calibration batch."""

WORST = 5
"""Sites that the table of errors shows; the JSON file has all of them."""


def collapse(config: RunConfig, adapter: Path, output: Path) -> None:
    """Turn the mixture into one adapter, and tell what that costs.

    Where tasks have evaluation rows, their losses are measured before and after.

    Args:
        config: The run.
        adapter: Folder of the mixture.
        output: Folder of the result; the report goes beside it, as ``<output>.json``.

    Raises:
        MoloraError: No adapter, data that cannot be read, settings that do not fit.
    """
    session.require_other(adapter, output)
    model, tokenizer = session.trained(config, adapter)
    batches = calibration(config, tokenizer)
    sets = {
        name: _loss_only(eval_set)
        for name, eval_set in session.eval_sets(config, tokenizer).items()
    }

    def losses(model: PreTrainedModel) -> dict[str, float]:
        results = session.scores(config, model, tokenizer, sets)
        return {name: result.loss for name, result in results.items()}

    settings = config.collapse
    result = molora.collapse(
        model,
        method=settings.method,
        calibration=batches,
        evaluate=losses if sets else None,
        **settings.options,
    )
    model.save_pretrained(output)
    session.note(f"Wrote {output}")
    report = output.with_name(output.name + ".json")
    try:
        result.save(report)
    except OSError as error:
        raise ConfigError(f"{report}: cannot be written: {error.strerror}") from error
    session.note(f"Wrote {report}")
    session.out.print(result.table(worst=WORST))
    if sets:
        session.out.print(result.report.loss_table())


def merge(config: RunConfig, adapter: Path, output: Path, base: str | None) -> None:
    """Fold a one-expert adapter into the base and write a plain model.

    Where ``model.quantization`` is set, the unquantised base is loaded as well, to tell
    how far the result is from either.

    Args:
        config: The run.
        adapter: Folder of the adapter.
        output: Folder for the model and its tokenizer.
        base: Which weights a quantised base stands for, or that the original ones are
            meant where only the adapter's own base was; see ``molora.merge``.

    Raises:
        MoloraError: No adapter, one with several experts, a folder in the way, or a
            quantised base, here or in training, without ``base``.
    """
    session.require_other(adapter, output)
    quantised = config.model.quantization != "none"
    if quantised:
        check_choice(True, base)
    model, tokenizer = session.trained(config, adapter)
    settings, original = config.model, None
    if quantised:
        original, _ = load_base(settings.name, settings.dtype)
    molora.merge(model, base, original)
    del original
    costs = molora.merge_costs(model).values()
    plain = molora.unwrap(model)
    with atomic_folder(output) as folder:
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # marks the folder as ours, which a later merge may replace
        write_manifest(folder, {"base_model": config.model.name})
    session.note(f"Read {adapter}")
    session.note(f"Wrote {output}")
    for name in MergeCost._fields:
        far = [value for cost in costs if (value := getattr(cost, name)) is not None]
        if far:
            session.note(
                f"From the {name} weights with the update, the merged ones are "
                f"{sum(far) / len(far):.2%} away on average, {max(far):.2%} at most"
            )


def export(
    config: RunConfig, adapter: Path, output: Path, rank: int | None = None
) -> None:
    """Write a one-expert adapter for PEFT, and tell what that costs.

    Args:
        config: The run.
        adapter: Folder of the adapter.
        output: Folder to write.
        rank: Rank of a LoRA; None keeps the method.

    Raises:
        MoloraError: No adapter, or one that PEFT cannot express.
    """
    session.require_other(adapter, output)
    model, _ = session.trained(config, adapter)
    written = molora.export_peft(model, output, rank)
    session.note(f"Read {adapter}")
    session.note(f"Wrote {output} ({written.peft_type})")
    for told in written.notes:
        session.note(told)
    if rank is None:
        return
    worst = sorted(written.errors.items(), key=lambda one: -one[1])[:WORST]
    table = Table("layer", "relative error", title=f"as a LoRA of rank {rank}")
    for path, error in worst:
        table.add_row(path, f"{error:.2e}")
    session.out.print(table)


def calibration(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, rows: int | None = None
) -> list[dict[str, Any]]:
    """Batches of training rows, those that an epoch would begin with.

    Args:
        config: The run.
        tokenizer: Writes the rows.
        rows: How many; None takes ``collapse.calibration_rows``.

    Returns:
        What the model takes, and the names of the rows' tasks under ``tasks``.
    """
    mixture = build_mixture(config.data, tokenizer)
    order = MixtureSampler(mixture, config.seed).draw(0)
    count = config.collapse.calibration_rows if rows is None else rows
    chosen = [mixture[i] for i in order[:count]]
    collate = Collator(session.filler(tokenizer))
    batches: list[dict[str, Any]] = []
    for start in range(0, len(chosen), BATCH):
        batch: dict[str, Any] = collate(chosen[start : start + BATCH])
        ids = batch.pop("task_ids").tolist()
        batches.append({**batch, "tasks": [mixture.task_names[i] for i in ids]})
    return batches


def _loss_only(eval_set: EvalSet) -> EvalSet:
    """The same rows, without the scores that take generation."""
    task = eval_set.task.model_copy(update={"labels": None, "exact_match": False})
    return dataclasses.replace(eval_set, task=task)
