"""The encoded rows of all tasks, and what they amount to."""

from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from molora.errors import DataError
from molora.training.encoding import Encoded, num_learned


class TaskRows:
    """The encoded rows of one task, four bytes a number, with their counts.

    Args:
        name: The task.
    """

    def __init__(self, name: str):
        self.name = name
        self.input_ids: list[array[int]] = []
        self.labels: list[array[int]] = []
        self.num_tokens = 0
        self.num_supervised = 0
        self.num_truncated = 0
        self.num_dropped = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    def add(self, row: Encoded) -> None:
        """Append a row."""
        self.input_ids.append(array("i", row["input_ids"]))
        self.labels.append(array("i", row["labels"]))
        self.num_tokens += len(row["input_ids"])
        self.num_supervised += num_learned(row["labels"])


@dataclass(frozen=True)
class TaskSummary:
    """What one task brings to a mixture.

    Args:
        rows: Rows kept.
        tokens: Tokens of these rows.
        supervised: Tokens among them that bear loss.
        share: Part of an epoch's rows, 0 to 1.
        truncated: Rows cut to max_length.
        dropped: Rows left out because they were above max_length.
    """

    rows: int
    tokens: int
    supervised: int
    share: float
    truncated: int
    dropped: int


@dataclass(frozen=True)
class MixtureSummary:
    """One line per task, by name; printable."""

    tasks: dict[str, TaskSummary]

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Task name to its numbers, JSON-ready."""
        return {name: asdict(task) for name, task in self.tasks.items()}

    def table(self) -> Table:
        """The numbers as a table."""
        table = Table(title="Tasks")
        table.add_column("task")
        for head in ("rows", "tokens", "supervised", "share", "truncated", "dropped"):
            table.add_column(head, justify="right")
        for name, task in self.tasks.items():
            table.add_row(
                name,
                f"{task.rows:,}",
                f"{task.tokens:,}",
                f"{task.supervised:,}",
                f"{task.share:.1%}",
                f"{task.truncated:,}",
                f"{task.dropped:,}",
            )
        return table

    def print(self, console: Console | None = None) -> None:
        """Print the table.

        Args:
            console: Where to; standard output by default.
        """
        (console or Console()).print(self.table())


class TaskMixture(torch.utils.data.Dataset[Encoded]):
    """The encoded rows of all tasks, one task after the other.

    Args:
        parts: The tasks; a task's id is its position.
        shares: Each task's part of an epoch's rows, adding up to 1.
        epoch_size: Rows per epoch.
    """

    def __init__(
        self, parts: Sequence[TaskRows], shares: Sequence[float], epoch_size: int
    ):
        self.task_names = [part.name for part in parts]
        self.sizes = [len(part) for part in parts]
        self.shares = list(shares)
        self.epoch_size = epoch_size
        self._input_ids = [ids for part in parts for ids in part.input_ids]
        self._labels = [labels for part in parts for labels in part.labels]
        self._task_ids = array(
            "i", [task for task, size in enumerate(self.sizes) for _ in range(size)]
        )
        self.summary = MixtureSummary(
            {
                part.name: TaskSummary(
                    rows=len(part),
                    tokens=part.num_tokens,
                    supervised=part.num_supervised,
                    share=share,
                    truncated=part.num_truncated,
                    dropped=part.num_dropped,
                )
                for part, share in zip(parts, shares, strict=True)
            }
        )

    def split(self, share: float, seed: int = 0) -> tuple["TaskMixture", "TaskMixture"]:
        """Hold rows of every task out.

        Args:
            share: Part of a task's rows that is held out, rounded, one at least.
            seed: Of the choice.

        Returns:
            The other rows, with an epoch that is shorter by that part, and those that
            are held out, of which an epoch sees all.

        Raises:
            DataError: A task would have no row left.
        """
        generator = torch.Generator().manual_seed(seed)
        kept, held = [], []
        offset = 0
        for name, size in zip(self.task_names, self.sizes, strict=True):
            out = max(1, round(share * size))
            if size and out >= size:
                raise DataError(
                    f"task {name!r} has {size} rows, of which {out} are to be held "
                    "out; give it more rows, or leave it out"
                )
            order = torch.randperm(size, generator=generator).tolist()
            kept.append(self._part(name, sorted(offset + i for i in order[out:])))
            held.append(self._part(name, sorted(offset + i for i in order[:out])))
            offset += size
        shorter = max(1, round(self.epoch_size * (1 - share)))
        sizes = [len(part) for part in held]
        shares = [size / sum(sizes) for size in sizes]
        return (
            TaskMixture(kept, self.shares, shorter),
            TaskMixture(held, shares, sum(sizes)),
        )

    def _part(self, name: str, rows: Sequence[int]) -> TaskRows:
        part = TaskRows(name)
        for row in rows:
            part.add(self[row])
        return part

    def __len__(self) -> int:
        return len(self._task_ids)

    def __getitem__(self, index: int) -> Encoded:
        return {
            "input_ids": self._input_ids[index].tolist(),
            "labels": self._labels[index].tolist(),
            "task_id": self._task_ids[index],
        }
