"""Calibration batches: which rows are used, and which of them are held out.

Shape legend
    B rows of a batch
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molora.collapse.base import CollapseConfig
from molora.collapse.moments import Task
from molora.errors import DataError

FIT, HELD = 0, 1
"""Parts of the calibration rows: to learn from, and to measure the error on."""
UNUSED = -1


@dataclass(frozen=True)
class Batch:
    """One batch of calibration rows.

    Attributes:
        inputs: Keyword arguments of the model's forward.
        tasks: Task of each row.
        part_B: FIT, HELD or UNUSED for each row, int64.
        labels: Labels of the rows: they tell the prompt, and the loss to some methods.
    """

    inputs: dict[str, Any]
    tasks: list[Task]
    part_B: Tensor
    labels: Tensor | None = None

    @property
    def names(self) -> list[str] | None:
        """Names for ``molora.tasks``; None when the batch has no names."""
        named = [task for task in self.tasks if isinstance(task, str)]
        return named if len(named) == len(self.tasks) else None


def read_calibration(
    batches: Iterable[Mapping[str, Any]], config: CollapseConfig
) -> list[Batch]:
    """Read all batches once and divide their rows.

    The held-out rows are drawn per task, with a fixed seed: a regular pattern could
    fall in step with the order of the tasks.

    Args:
        batches: Mappings with ``input_ids`` or ``inputs_embeds`` [B, S, ...] and what
            else the model takes; ``tasks`` (names) or ``task_ids`` (numbers) of the
            rows are taken out, and so are ``labels`` where another argument tells
            padding from tokens.
        config: Its ``tasks`` and ``held_out`` are read.

    Returns:
        The batches that have a row in use.

    Raises:
        DataError: No batches, a batch that is none, or fewer than two rows in use.
    """
    read = [_split(raw, i) for i, raw in enumerate(batches)]
    tasks = [task for _, names, _ in read for task in names]
    used = [config.tasks is None or task in config.tasks for task in tasks]
    missing = set(config.tasks or ()) - set(tasks)
    if missing:
        raise DataError(
            f"calibration: no row of the tasks {sorted(map(str, missing))}; the rows "
            f"have {sorted({str(task) for task in tasks})}"
        )
    if sum(used) < 2:
        raise DataError(
            f"calibration: {sum(used)} rows in use; at least 2 are needed, one to fit "
            "and one to hold out"
        )
    part_N = _divide(tasks, used, config.held_out)
    parts = part_N.split([len(names) for _, names, _ in read])
    made = [
        Batch(inputs, names, part_B, labels)
        for (inputs, names, labels), part_B in zip(read, parts, strict=True)
    ]
    return [batch for batch in made if (batch.part_B != UNUSED).any()]


def _split(
    raw: Mapping[str, Any], index: int
) -> tuple[dict[str, Any], list[Task], Tensor | None]:
    """Take a batch apart into the model's arguments, the rows' tasks and labels."""
    if not isinstance(raw, Mapping):
        raise DataError(
            f"calibration: batch {index} is a {type(raw).__name__}, expected a mapping "
            "of tensors for model(**batch)"
        )
    inputs = dict(raw)
    names, ids = inputs.pop("tasks", None), inputs.pop("task_ids", None)
    first = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if not isinstance(first, Tensor):
        raise DataError(f"calibration: batch {index} has no tensor input_ids")
    rows = first.shape[0]
    tasks = _tasks(ids if names is None else names, rows)
    if len(tasks) != rows:
        raise DataError(
            f"calibration: batch {index} has {rows} rows and {len(tasks)} tasks"
        )
    labels = inputs.get("labels")
    if "attention_mask" in inputs or "position_ids" in inputs:
        inputs.pop("labels", None)
    return inputs, tasks, labels


def _tasks(given: Tensor | Sequence[Task] | None, rows: int) -> list[Task]:
    if given is None:
        return [None] * rows
    return given.tolist() if isinstance(given, Tensor) else list(given)


def _divide(tasks: list[Task], used: list[bool], held_out: float) -> Tensor:
    """FIT, HELD or UNUSED for every row; both parts get at least one row."""
    generator = torch.Generator().manual_seed(0)
    part_N = torch.full((len(tasks),), UNUSED)
    for task in dict.fromkeys(tasks):
        rows = torch.tensor(
            [i for i, name in enumerate(tasks) if name == task and used[i]],
            dtype=torch.int64,
        )
        order = rows[torch.randperm(len(rows), generator=generator)]
        held = round(held_out * len(rows))
        part_N[order[:held]] = HELD
        part_N[order[held:]] = FIT
    for part, other in ((FIT, HELD), (HELD, FIT)):
        if not (part_N == part).any():
            part_N[(part_N == other).nonzero()[-1]] = part
    return part_N
