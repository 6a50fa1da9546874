"""Per-task evaluation: loss, accuracy by label likelihood, exact match."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from molora.errors import ConfigError
from molora.training.data import EvalRow, EvalSet
from molora.training.encoding import IGNORE
from molora.training.sampling import Collator
from molora.training.scoring import RowsContext, Scorer

TaskContext = Callable[[Sequence[str]], AbstractContextManager[Any]]

# short rows of one label-scoring forward, per row of the batch size
EXPANSION = 16


@dataclass(frozen=True)
class TaskResult:
    """Scores of one task.

    Args:
        n: Rows evaluated.
        loss: Mean negative log-likelihood of the task's learned tokens, in nats.
        accuracy: Part of the rows whose right label is the likeliest; None where the
            task lists no labels.
        exact_match: Part of the rows answered letter by letter; None where the task
            does not ask for it.
    """

    n: int
    loss: float
    accuracy: float | None
    exact_match: float | None

    def to_dict(self) -> dict[str, int | float | None]:
        """The scores, JSON-ready."""
        return asdict(self)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    eval_sets: Mapping[str, EvalSet],
    batch_size: int = 16,
    show_progress: bool = True,
    task_context: TaskContext | None = None,
) -> dict[str, TaskResult]:
    """Score a model on every task.

    Loss is the mean over all learned tokens of a task, not the mean of row means. The
    likeliest label is the one whose tokens, end of turn included, have the largest
    summed log-likelihood after the prompt: the end settles labels that begin alike,
    and nothing is divided by length. Equal sums go to the label listed first. Exact
    match generates greedily and compares the text without white space around it.

    Modes, random state and generation settings of the model are afterwards as before,
    also after an exception; gradients are neither computed nor touched.

    Args:
        model: Any causal language model of transformers, not inside a data-parallel
            wrapper.
        tokenizer: The one that the rows were encoded with.
        eval_sets: Task name to rows, from ``build_eval_sets``.
        batch_size: Rows per forward. Label scoring goes on with up to 16 times as many
            short rows at once.
        show_progress: Show a progress bar on standard error.
        task_context: Called with the task names of a forward's rows; the forward runs
            inside what it returns. Task routers need it.

    Returns:
        Task name to scores, in the order given.

    Raises:
        ConfigError: The batch size is below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size: must be at least 1, got {batch_size}")
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    filler = next((token for token in (pad, eos) if token is not None), 0)
    context = task_context or _no_context
    results = {}
    console = Console(stderr=True)
    with (
        _undisturbed(model),
        Progress(console=console, transient=True, disable=not show_progress) as bar,
    ):
        for name, eval_set in eval_sets.items():
            scorer = Scorer(model, filler, _for_rows(context, name))
            bar_task = bar.add_task(f"Evaluating {name}", total=_work(eval_set))
            run = _Run(scorer, tokenizer, eval_set, batch_size, bar, bar_task)
            results[name] = run.score()
    return results


@dataclass(frozen=True)
class _Run:
    """The evaluation of one task."""

    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase
    eval_set: EvalSet
    batch_size: int
    bar: Progress
    bar_task: TaskID

    def score(self) -> TaskResult:
        task = self.eval_set.task
        accuracy = loss = None
        if task.labels:
            accuracy, gold_loss = self._accuracy()
            # the right label is then all that is learned: no need to run it again
            loss = gold_loss if all(map(_learns_gold, self.eval_set.rows)) else None
        return TaskResult(
            n=len(self.eval_set.rows),
            loss=self._loss() if loss is None else loss,
            accuracy=accuracy,
            exact_match=self._exact_match() if task.exact_match else None,
        )

    def _loss(self) -> float:
        collate = Collator(self.scorer.filler)
        total, count = 0.0, 0
        for batch in self._batches(
            self.batch_size, lambda row: len(row.encoded["input_ids"])
        ):
            nll, tokens = self.scorer.learned_nll(
                collate([row.encoded for row in batch])
            )
            total += nll
            count += tokens
        return total / count

    def _accuracy(self) -> tuple[float, float]:
        """Accuracy, and the mean loss per token of the right labels."""
        num_labels = len(self.eval_set.rows[0].candidates)
        affordable = self.batch_size * EXPANSION // num_labels
        right, total, count = 0, 0.0, 0
        for batch in self._batches(
            max(1, min(self.batch_size, affordable)), lambda row: len(row.prompt_ids)
        ):
            scores_BC = self.scorer.candidate_scores(
                [row.prompt_ids for row in batch], [row.candidates for row in batch]
            ).cpu()
            best = scores_BC.argmax(1).tolist()
            gold = [row.gold for row in batch]
            right += sum(b == g for b, g in zip(best, gold, strict=True))
            total -= float(scores_BC[range(len(batch)), gold].double().sum())
            count += sum(len(row.candidates[row.gold]) for row in batch)
        return right / len(self.eval_set.rows), total / count

    def _exact_match(self) -> float:
        end_ids = sorted({row.end_id for row in self.eval_set.rows})
        right = 0
        # answers of like length together: a batch runs until its last row has ended
        for batch in self._batches(self.batch_size, lambda row: len(row.answer)):
            answers = self.scorer.greedy_answers(
                [row.prompt_ids for row in batch],
                self.eval_set.task.max_new_tokens,
                end_ids,
            )
            texts = self.tokenizer.batch_decode(
                answers, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            right += sum(
                text.strip() == row.answer
                for text, row in zip(texts, batch, strict=True)
            )
        return right / len(self.eval_set.rows)

    def _batches(
        self, size: int, length: Callable[[EvalRow], int]
    ) -> Iterator[list[EvalRow]]:
        """Batches of rows of similar length, the longest first to fail early."""
        rows = sorted(self.eval_set.rows, key=length, reverse=True)
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            yield batch
            self.bar.advance(self.bar_task, len(batch))


def _no_context(names: Sequence[str]) -> AbstractContextManager[None]:
    return nullcontext()


def _for_rows(context: TaskContext, name: str) -> RowsContext:
    return lambda num_rows: context([name] * num_rows)


def _learns_gold(row: EvalRow) -> bool:
    """Whether the learned tokens of a row are those of its right label."""
    learned = [label for label in row.encoded["labels"] if label != IGNORE]
    return learned == row.candidates[row.gold]


def _work(eval_set: EvalSet) -> int:
    """Rows to go through, all scores together."""
    task = eval_set.task
    needs_loss = not task.labels or not all(map(_learns_gold, eval_set.rows))
    passes = bool(task.labels) + needs_loss + task.exact_match
    return passes * len(eval_set.rows)


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode without gradients; every module's mode and the RNG come back."""
    model_was_training = model.training
    was_training = [(module, module.training) for module in model.modules()]
    devices = [model.device] if model.device.type == "cuda" else []
    # not inference_mode: tensors that a module caches must stay usable in training
    with torch.no_grad(), torch.random.fork_rng(devices):
        model.train(False)
        try:
            yield
        finally:
            # for what a model's own train does beside setting the flag
            model.train(model_was_training)
            for module, mode in was_training:
                module.training = mode
