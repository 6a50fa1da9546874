"""Task mixtures: from settings to encoded rows for training and evaluation."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from molora.errors import ConfigError, DataError
from molora.training.encoding import Encoded, encode, fit, split_answer, with_answer
from molora.training.formats import Row, detect_format, parse_row
from molora.training.mixture import MixtureSummary, TaskMixture, TaskRows
from molora.training.sampling import Collator, MixtureSampler
from molora.training.sources import read_raw
from molora.training.tasks import DataConfig, Split, TaskConfig

__all__ = [
    "Collator",
    "DataConfig",
    "EvalRow",
    "EvalSet",
    "MixtureSampler",
    "MixtureSummary",
    "TaskConfig",
    "TaskMixture",
    "build_eval_sets",
    "build_mixture",
    "load_task_rows",
    "task_shares",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalRow:
    """One row to evaluate.

    Args:
        encoded: Ids and labels, for the loss.
        prompt_ids: What comes before the last answer.
        answer: The text of the last answer, without white space around it.
        end_id: Last token of the end-of-turn mark, at which generation stops.
        candidates: Ids of every label as the answer, end-of-turn mark included; empty
            where the task lists no labels.
        gold: Index of the right label; -1 where the task lists none.
    """

    encoded: Encoded
    prompt_ids: list[int]
    answer: str
    end_id: int
    candidates: tuple[list[int], ...]
    gold: int


@dataclass(frozen=True)
class EvalSet:
    """The rows of one task, and how to score them."""

    task: TaskConfig
    rows: tuple[EvalRow, ...]


def load_task_rows(
    task: TaskConfig, split: Split, base_dir: str | Path | None = None
) -> list[Row]:
    """Read and check the rows of one task.

    Args:
        task: Its settings.
        split: ``train`` or ``eval``.
        base_dir: Folder that relative paths start from; the working folder by default.

    Returns:
        The rows in the order of the source; the format ``auto`` is told from the
        first.

    Raises:
        ConfigError: The task has no such rows.
        DataError: The source or a row is missing or malformed; the message names file
            and line.
    """
    source = task.train if split == "train" else task.eval
    if source is None:
        raise ConfigError(f"task {task.name!r}: no {split} data; set {split}")
    if split == "train":
        hub_split, limit = task.train_split, task.limit
    else:
        hub_split, limit = task.eval_split, task.eval_limit
    placed = read_raw(source, hub_split, base_dir, limit, task.name)
    format_name: str = task.format
    if format_name == "auto":
        where, first = placed[0]
        format_name = detect_format(first, where)
    return [parse_row(raw, format_name, where) for where, raw in placed]


def task_shares(config: DataConfig, sizes: Sequence[int]) -> list[float]:
    """Each task's part of an epoch.

    Args:
        config: Weights, or the temperature T of p_i ~ n_i^(1/T).
        sizes: Rows n_i by task; a task without rows gets no share.

    Returns:
        Shares by task, adding up to 1.
    """
    raw = [
        0.0 if not size else (task.weight or size ** (1 / config.temperature))
        for task, size in zip(config.tasks, sizes, strict=True)
    ]
    return [share / sum(raw) for share in raw]


def build_mixture(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    split: Split = "train",
    base_dir: str | Path | None = None,
    show_progress: bool = True,
) -> TaskMixture:
    """Load, check and encode the rows of all tasks.

    Args:
        config: The tasks.
        tokenizer: Of the model.
        split: ``train`` or ``eval``; of ``eval``, an epoch is every row once.
        base_dir: Folder that relative paths start from; the working folder by default.
        show_progress: Show a progress bar on standard error.

    Returns:
        The mixture. Tasks without data of this split keep their id, with no rows.

    Raises:
        ConfigError: No task has data of this split.
        DataError: Data is missing or malformed.
    """
    parts = []
    for task_id, task in enumerate(config.tasks):
        part = TaskRows(task.name)
        if _has(task, split):
            rows = load_task_rows(task, split, base_dir)
            for _, encoded in _encode_all(
                config, task_id, rows, tokenizer, part, show_progress
            ):
                part.add(encoded)
        parts.append(part)
    sizes = [len(part) for part in parts]
    total = sum(sizes)
    if not total:
        raise ConfigError(f"tasks: no task has {split} data; set {split} of a task")
    if split == "eval":
        return TaskMixture(parts, [size / total for size in sizes], total)
    return TaskMixture(parts, task_shares(config, sizes), config.epoch_size or total)


def build_eval_sets(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    base_dir: str | Path | None = None,
    show_progress: bool = True,
) -> dict[str, EvalSet]:
    """Load, check and encode the evaluation rows, task by task.

    Args:
        config: The tasks.
        tokenizer: Of the model.
        base_dir: Folder that relative paths start from; the working folder by default.
        show_progress: Show a progress bar on standard error.

    Returns:
        Task name to its rows, for the tasks that have evaluation data.

    Raises:
        ConfigError: No task has evaluation data.
        DataError: Data is missing or malformed, or a completion is none of the task's
            labels.
    """
    sets = {}
    for task_id, task in enumerate(config.tasks):
        if not _has(task, "eval"):
            continue
        rows = load_task_rows(task, "eval", base_dir)
        part = TaskRows(task.name)
        encoded_rows = _encode_all(
            config, task_id, rows, tokenizer, part, show_progress
        )
        sets[task.name] = EvalSet(
            task,
            tuple(
                _eval_row(row, encoded, task, config, tokenizer)
                for row, encoded in encoded_rows
            ),
        )
    if not sets:
        raise ConfigError("tasks: no task has eval data; set eval of a task")
    return sets


def _has(task: TaskConfig, split: Split) -> bool:
    return (task.train if split == "train" else task.eval) is not None


def _encode_all(
    config: DataConfig,
    task_id: int,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    part: TaskRows,
    show_progress: bool,
) -> Iterator[tuple[Row, Encoded]]:
    """Encode and bring to length; count in part what was cut or left out."""
    kept = 0
    for row in track(
        rows,
        description=f"Encoding {part.name}",
        console=Console(stderr=True),
        transient=True,
        disable=not show_progress,
    ):
        encoded = encode(row, tokenizer, config.template, task_id)
        if len(encoded["input_ids"]) > config.max_length:
            if config.on_long == "drop":
                part.num_dropped += 1
                continue
            encoded = fit(encoded, config.max_length, config.on_long, row.where)
            part.num_truncated += 1
        kept += 1
        yield row, encoded
    if part.num_dropped:
        logger.warning(
            "task %r: left out %d of %d rows above max_length %d",
            part.name,
            part.num_dropped,
            len(rows),
            config.max_length,
        )
    if not kept:
        raise DataError(
            f"task {part.name!r}: all {len(rows)} rows are above max_length "
            f"{config.max_length}; raise max_length"
        )


def _eval_row(
    row: Row,
    encoded: Encoded,
    task: TaskConfig,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> EvalRow:
    answer = row.turns[-1].content.strip()
    if (task.labels or task.exact_match) and row.turns[-1].role != "assistant":
        raise DataError(
            f"{row.where}: labels and exact_match compare the last turn, which must be "
            f"the assistant's, not the {row.turns[-1].role}'s"
        )
    if task.labels and answer not in task.labels:
        raise DataError(
            f"{row.where}: completion {answer!r} is none of task {task.name!r}'s "
            f"labels {task.labels}"
        )
    # encoded may have been cut; the prompt and the mark of the end must be whole
    prompt_ids, answer_ids = split_answer(encode(row, tokenizer, config.template))
    end_id = answer_ids[-1]
    if task.exact_match and not _is_special(end_id, tokenizer):
        raise DataError(
            f"{row.where}: exact_match cannot tell where a generated answer ends: the "
            "chat template closes the assistant's turn without a special token; use "
            "another chat template or exact_match: false"
        )
    candidates = tuple(
        split_answer(encode(with_answer(row, label), tokenizer, config.template))[1]
        for label in task.labels or ()
    )
    gold = task.labels.index(answer) if task.labels else -1
    return EvalRow(encoded, prompt_ids, answer, end_id, candidates, gold)


def _is_special(token_id: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    return (
        token_id == tokenizer.eos_token_id or token_id in tokenizer.added_tokens_decoder
    )
