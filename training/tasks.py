"""Settings of the data: which tasks, from where, in which proportion."""

from typing import Literal, Self

from pydantic import Field, model_validator

from molora.errors import ConfigError
from molora.schema import Schema
from molora.training.sources import is_local_file

Format = Literal["auto", "prompt_completion", "messages", "alpaca", "sharegpt"]
OnLong = Literal["error", "truncate", "drop"]
Split = Literal["train", "eval"]
Template = Literal["plain", "chat"]


class TaskConfig(Schema):
    """One task: its rows for training, for evaluation, or both."""

    name: str = Field(min_length=1)
    """How the task is called in logs, tables and task routers."""
    train: str | None = None
    """Training rows: a .jsonl, .json or .parquet file, or a data set of the Hugging
    Face hub as ``name`` or ``name:config``."""
    eval: str | None = None
    """Evaluation rows, named as in ``train``."""
    train_split: str = Field("train", min_length=1)
    """Split of a hub data set that ``train`` reads. Local files have no splits."""
    eval_split: str = Field("validation", min_length=1)
    """Split of a hub data set that ``eval`` reads. Local files have no splits."""
    format: Format = "auto"
    """Columns of the rows; ``auto`` tells it from the first row."""
    weight: float | None = Field(None, gt=0)
    """Share of the training rows of an epoch, relative to the other tasks' weights."""
    labels: list[str] | None = Field(None, min_length=2)
    """All possible completions; evaluation then reports accuracy by likelihood."""
    exact_match: bool = False
    """Generate greedily in evaluation and compare with the completion."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest answer, in tokens, that ``exact_match`` generates."""
    limit: int | None = Field(None, ge=1)
    """Read at most this many training rows, from the first on."""
    eval_limit: int | None = Field(None, ge=1)
    """Read at most this many evaluation rows, from the first on."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_sources()
        if self.labels is not None:
            if len(set(self.labels)) < len(self.labels):
                raise ValueError(f"task {self.name!r}: labels must differ")
            if any(label != label.strip() or not label for label in self.labels):
                raise ValueError(
                    f"task {self.name!r}: labels must not be empty and must not "
                    f"begin or end with white space: {self.labels}"
                )
        if self.max_new_tokens != 64 and not self.exact_match:
            raise ValueError(
                f"task {self.name!r}: max_new_tokens is read only with "
                "exact_match: true; set that or leave max_new_tokens out"
            )
        return self

    def _check_sources(self) -> None:
        if self.train is None and self.eval is None:
            raise ValueError(f"task {self.name!r}: give train, eval or both")
        for source, split, default in (
            (self.train, "train_split", "train"),
            (self.eval, "eval_split", "validation"),
        ):
            chosen = getattr(self, split) != default
            if chosen and (source is None or is_local_file(source)):
                raise ValueError(
                    f"task {self.name!r}: {split} is read only for hub data sets; "
                    f"leave it out (source: {source})"
                )
        needs_train = {"weight": self.weight, "limit": self.limit}
        needs_eval = {
            "labels": self.labels,
            "exact_match": self.exact_match or None,
            "eval_limit": self.eval_limit,
        }
        for needs, field in ((needs_train, "train"), (needs_eval, "eval")):
            given = [name for name, value in needs.items() if value is not None]
            if given and getattr(self, field) is None:
                raise ValueError(
                    f"task {self.name!r}: {', '.join(given)} is read only with "
                    f"{field}; name the {field} data or leave it out"
                )


class DataConfig(Schema):
    """The tasks of a run, how they are mixed and how their rows become tokens."""

    tasks: list[TaskConfig] = Field(min_length=1)
    """The tasks; a task's id is its position in this list."""
    temperature: float = Field(1.0, ge=1)
    """T in the task shares p_i ~ n_i^(1/T), n_i rows (arXiv:1907.05019, section 4.2):
    1 keeps the natural proportions, large values approach equal shares. Only without
    weights."""
    epoch_size: int | None = Field(None, ge=1)
    """Training rows per epoch; by default the number of all training rows."""
    max_length: int = Field(512, ge=2)
    """Longest row in tokens."""
    template: Template = "plain"
    """How prompt and completion become text: ``plain`` joins them with one space and
    ends with the eos token; ``chat`` makes them user and assistant turns of the
    tokenizer's chat template. Conversations always use the chat template."""
    on_long: OnLong = "error"
    """What to do with a row above max_length: stop, cut its end off, or leave it out
    (counted in the summary)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [task.name for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"tasks: names must be unique; used twice: {twice}")
        training = [task for task in self.tasks if task.train is not None]
        weighted = [task.name for task in training if task.weight is not None]
        if weighted and self.temperature != 1:
            raise ConfigError(
                f"temperature: {self.temperature} has no effect beside the weights of "
                f"{weighted}; give either temperature or weights"
            )
        if weighted and len(weighted) < len(training):
            lacking = [task.name for task in training if task.weight is None]
            raise ConfigError(
                f"tasks: weight is given for {weighted} but not for {lacking}; "
                "give every task a weight, or none"
            )
        return self
