"""What a trainer does where every row names its adapter; the tensors are in apart.py.

Shape legend: see apart.py.
"""

import abc
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from molora.errors import TrainingError
from molora.training.apart import Apart, is_apart, row_losses, supervised
from molora.training.encoding import IGNORE


class ApartMixin(Trainer):
    """Trains the adapters that rows name as if each were trained by itself.

    With router.kind ``adapter``, a task's rows train the adapter of its name, and
    training equals one run per adapter on the rows that it has in each step: the loss
    is the sum of the adapters' own means, norms are clipped adapter by adapter, and an
    adapter without a supervised token in a step is left as it is, optimizer state
    included. The logged loss is that sum. Evaluation has the loss of the model itself.

    Limitations: one process; no label smoothing, loss function or optimizer of the
    caller's, nor TRL's trainers. The learning rate follows the steps of the run, those
    that an adapter has no row in as well; a step whose gradient is not finite is left
    out for all. A dropout mask is drawn for the batch, so an adapter sees other masks
    than by itself, of the same distribution.
    """

    # transformers declares that these may be None, which they are not while training
    args: Any
    model: Any
    optimizer: Any

    apart: Apart | None = None
    row_tasks_B: Tensor | None = None
    """Task of each row of the running forward."""
    _is_apart = False
    _items_N: Tensor
    _present: Sequence[str] = ()

    @abc.abstractmethod
    def task_names(self) -> Sequence[str] | None:
        """Names of the tasks by id; None where no data set has any."""

    def set_up_apart(self) -> None:
        """Find out whether rows name their adapters, and refuse what does not fit.

        Raises:
            TrainingError: See the limitations, and ``is_apart``.
        """
        self._is_apart = is_apart(self.model)
        if not self._is_apart:
            return
        is_trl = any(c.__module__.split(".")[0] == "trl" for c in type(self).__mro__)
        problems = {
            "several processes": self.args.world_size > 1,
            "label_smoothing_factor": self.args.label_smoothing_factor != 0,
            "compute_loss_func": self.compute_loss_func is not None,
            "an optimizer of your own": self.optimizer is not None,
            "a trainer of TRL": is_trl,
        }
        given = [name for name, is_given in problems.items() if is_given]
        if given:
            raise TrainingError(
                f"router.kind adapter trains every adapter by its own loss, which "
                f"does not go with {', '.join(given)}; leave that out"
            )
        self.compute_loss_func = self._loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer, of every adapter's own parameters."""
        if self._is_apart:
            if self.optimizer is None:
                self.apart = Apart(self.model)
            model = self.apart
        return super().create_optimizer(model)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Fetch the batches of one step and count each adapter's supervised tokens."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._is_apart and batches:
            names = self.task_names() or ()
            counts = [supervised(batch, len(names)) for batch in batches]
            self._items_N = torch.stack(counts).sum(0)
            pairs = zip(names, self._items_N.tolist(), strict=True)
            self._present = [name for name, count in pairs if count]
        return batches, items

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward; after the last of a step adapters get their parts."""
        loss = super().training_step(*args, **kwargs)
        if self.apart is not None and self.accelerator.sync_gradients:
            self.apart.hand_out(self._present)
        return loss

    def _loss(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None
    ) -> Tensor:
        """Sum of the adapters' means; in evaluation the mean over all tokens."""
        loss_B = row_losses(outputs["logits"], labels)
        if not self.model.training:
            return loss_B.sum() / labels[:, 1:].ne(IGNORE).sum()
        assert self.row_tasks_B is not None
        items_B = self._items_N.to(loss_B.device)[self.row_tasks_B]
        return (loss_B / items_B.clamp(min=1)).sum()

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.apart is None:
            return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        # undoes the loss scale, and says what the norm of all is
        norm = self.accelerator.clip_grad_norm_(model.parameters(), math.inf)
        self.apart.clip(self.args.max_grad_norm)
        return norm
