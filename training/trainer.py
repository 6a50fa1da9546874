"""The trainer: transformers' own, with what a mixture of experts needs beside it.

``MoloraTrainerMixin`` stands before any trainer that derives from transformers'
``Trainer``; ``MoloraTrainer`` is the plain one. For TRL:

    class MoloraSFTTrainer(MoloraTrainerMixin, SFTTrainer): ...
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_utils import SaveStrategy

from molora.errors import TrainingError
from molora.model import after_optimizer_step, prompts, tasks
from molora.prompt import prompt_from_labels
from molora.training.apart_mixin import ApartMixin
from molora.training.arguments import MoloraTrainingSettings
from molora.training.checkpointing import CheckpointingMixin
from molora.training.checks import check_model, check_setup, datasets
from molora.training.guard import StepGuard
from molora.training.mixture import TaskMixture
from molora.training.monitor import RoutingMonitor
from molora.training.recipe_mixin import RecipeMixin
from molora.training.routing_log import LOG_NAME, RoutingLog, scalars, summary
from molora.training.sampling import Collator, MixtureSampler

logger = logging.getLogger(__name__)


class MoloraTrainerMixin(ApartMixin, RecipeMixin, CheckpointingMixin):
    """Trains the adapter of a wrapped model.

    Beside what the trainer it stands before does:

    - balance objectives keep their coefficient under gradient accumulation and fp16;
    - a ``TaskMixture`` is drawn anew each epoch; forwards know the task of each row;
    - a step whose gradient is not finite is left out: parameters and optimizer state
      stay, the learning rate schedule goes on with the step count (under fp16 the loss
      scaler decides both, as ever). After ``max_skipped_steps`` of them in a row the
      run saves a checkpoint and stops;
    - routing statistics go to the log, those of each site to ``routing_log.jsonl`` and
      TensorBoard, and a router that collapses is warned of;
    - adapters that rows name (router.kind ``adapter``) are trained as if each were
      trained by itself, see ``ApartMixin``;
    - ``settings.recipe`` prunes ranks, freezes tensors and the like while it trains,
      see ``RecipeMixin``;
    - checkpoints appear whole or not at all, hold no pickle, and are verified before
      they are resumed from. A resumed run equals one that never stopped, bit for bit.

    ``train_loss`` and the speeds at the end are of one call of ``train``, as in
    transformers. Callbacks keep their own state across a resume only with
    ``restore_callback_states_from_checkpoint``; SFTTrainer's running means
    (``mean_token_accuracy`` and others) start anew.

    Limitations: one process drives one device (no DataParallel); DeepSpeed and FSDP are
    refused, and so is ``enable_jit_checkpoint``, which saves in the middle of a step.
    Under several processes the log window that is open at a stop goes on with the sums
    of the first process (weights are exact all the same).

    Args:
        model: A wrapped model with trainable parameters.
        args: Training arguments. ``logging_nan_inf_filter`` is switched off, since it
            would replace a NaN loss in the log by an average of others.
        *rest: Passed on.
        settings: What transformers' arguments do not have; defaults when None.
        **kwargs: Passed on.

    Raises:
        WrapError: The model is not wrapped.
        TrainingError: The model is merged, nothing in it is trainable, or the set-up is
            one of those under limitations.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *rest: Any,
        settings: MoloraTrainingSettings | None = None,
        **kwargs: Any,
    ):
        if isinstance(model, nn.Module):
            # before another trainer changes anything about it
            check_model(model, type(self), args)
        super().__init__(model, args, *rest, **kwargs)
        check_model(self.model, type(self), self.args)
        check_setup(self)
        self.set_up_apart()
        self.args.logging_nan_inf_filter = False
        self.settings = settings or MoloraTrainingSettings()
        self.set_up_recipe(self.settings.recipe)
        self.guard = StepGuard(self.settings.max_skipped_steps)
        self.monitor: RoutingMonitor | None = None
        self.routing_log: RoutingLog | None = None
        self.sampler: MixtureSampler | None = None
        self.current_gradient_accumulation_steps = 1
        self._unsupervised: int | Tensor = 0
        self._last_read = 0
        self.add_callback(_Events(self))

    def task_names(self) -> Sequence[str] | None:
        """Names of the tasks by id; None where no data set has any."""
        for dataset in datasets(self):
            if hasattr(dataset, "task_names"):
                names: Sequence[str] = dataset.task_names
                return names
        return None

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        # remove_unused_columns would drop what the collator reads
        wanted = isinstance(self.data_collator, Collator) or self.task_names()
        columns: Any = self._signature_columns
        if wanted and "task_id" not in columns:
            columns.append("task_id")

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, TaskMixture):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.sampler = MixtureSampler(dataset, seed=seed)
        return self.sampler

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Rows of an epoch."""
        if self.sampler is not None and dataloader.dataset is self.train_dataset:
            return len(self.sampler)
        return super().num_examples(dataloader)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Fetch the batches of one step and count their supervised tokens.

        Where there is none the count is 1, so that the loss is 0 and not 0 / 0.
        """
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            if "labels" in batch:
                self._unsupervised = self._unsupervised + ~_supervised(batch["labels"])
        if isinstance(items, Tensor):
            items = items.clamp(min=1)
        return batches, items

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one micro-batch, balance objectives scaled to it."""
        runtime: Any = self.model.molora_runtime
        scaler = self.accelerator.scaler
        loss_scale = 1.0 if scaler is None else scaler.get_scale()
        runtime.balance_scale = loss_scale / self.current_gradient_accumulation_steps
        try:
            return super().training_step(*args, **kwargs)
        finally:
            runtime.balance_scale = 1.0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss of a batch, its forward under the tasks of its rows."""
        task_ids = self.row_tasks_B = inputs.pop("task_ids", None)
        names = self.task_names()
        known: Any = contextlib.nullcontext()
        if task_ids is not None and names:
            known = tasks(self.model, [names[i] for i in task_ids.tolist()])
        told: Any = contextlib.nullcontext()
        if "labels" in inputs:
            # a loss of one's own takes them away, and routers read where they begin
            told = prompts(self.model, prompt_from_labels(inputs["labels"]))
        with known, told:
            if num_items_in_batch is None and self._is_empty(inputs):
                loss, outputs = _zero_loss(model, inputs)
                return (loss, outputs) if return_outputs else loss
            return super().compute_loss(
                model,
                inputs,
                return_outputs=return_outputs,
                num_items_in_batch=num_items_in_batch,
            )

    def _is_empty(self, inputs: dict[str, Any]) -> bool:
        """Whether the mean loss of a training batch would be 0 / 0."""
        if not self.model.training or "labels" not in inputs:
            return False
        return not bool(_supervised(inputs["labels"]))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        if not self.guard.accepts(float(norm), self.state.global_step):
            if self.accelerator.scaler is None:
                # accelerate takes a step only where gradients are in sync
                self.accelerator.gradient_state._set_sync_gradients(False)
            if self.guard.exhausted:
                self.control.should_training_stop = True
                self.control.should_save = self.args.save_strategy != SaveStrategy.NO
        return norm

    def train(
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        *rest: Any,
        **kwargs: Any,
    ) -> Any:
        """Train, from the start or from a checkpoint; see ``CheckpointingMixin.train``.

        Raises:
            CheckpointError: No checkpoint can be resumed from.
            TrainingError: Too many steps in a row had a gradient that was not finite.
        """
        self.guard = StepGuard(self.settings.max_skipped_steps)
        self._unsupervised = 0
        try:
            output = super().train(resume_from_checkpoint, *rest, **kwargs)
        finally:
            if self.monitor is not None:
                self.monitor.stop()
        if self.guard.exhausted:
            raise TrainingError(
                f"stopped at step {self.state.global_step}: the gradients of "
                f"{self.guard.in_row} steps in a row were not finite. Parameters are "
                f"as they were before these steps; {self._saved()}. Lower "
                "learning_rate, look at the data of these steps, or raise "
                "max_skipped_steps."
            )
        return output

    def _saved(self) -> str:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        return f"they are in {folder}" if folder.exists() else "they were not saved"

    def begin(self) -> None:
        """Set up what watches the run; called when transformers' loop begins."""
        check_model(self.model, type(self), self.args)
        if self.apart is not None:
            self.apart.check()
        # the errors of a collapse say nothing about what is trained from here on
        self.model.__dict__.pop("molora_report", None)
        self.monitor = RoutingMonitor(self.model, self.settings)
        self._last_read = self.state.global_step
        if self.monitor.places and self.is_world_process_zero():
            path = Path(self.args.output_dir) / LOG_NAME
            self.routing_log = RoutingLog(path, self.state.global_step)
        self.begin_recipe(self.resumed)
        if self.resumed is not None:
            self._restore(self.resumed)

    def progress(self) -> dict[str, Any]:
        """See base class."""
        assert self.monitor is not None
        return {
            "loss_sum": self._tr_loss,
            "last_logged": self._globalstep_last_logged,
            "last_read": self._last_read,
            "unsupervised": int(self._unsupervised),
            "guard": self.guard.state(),
            "routing": self.monitor.state(),
            "recipe": self.recipe_progress(),
            "settings": self._settings(),
        }

    def _restore(self, progress: dict[str, Any]) -> None:
        assert self.monitor is not None
        self._tr_loss.copy_(progress["loss_sum"])
        # train_loss is of one call of train, so what came before it is taken off
        self._total_loss_scalar = -float(progress["loss_sum"])
        self._globalstep_last_logged = progress["last_logged"]
        self._last_read = progress["last_read"]
        self._unsupervised = progress["unsupervised"]
        self.guard.restore(progress["guard"])
        self.monitor.restore(progress["routing"])
        now = self._settings()
        changed = [name for name, v in progress["settings"].items() if now[name] != v]
        if changed:
            logger.warning(
                "%s changed since the checkpoint was saved: the run goes on, but not "
                "as it would have done without a stop",
                ", ".join(changed),
            )

    def _settings(self) -> dict[str, Any]:
        """What must stay for a resumed run to equal one that never stopped."""
        args = self.args
        rows: Any = self.sampler or self.train_dataset
        recipe = self.settings.recipe
        return {
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "seed": args.seed,
            "data_seed": args.data_seed,
            "max_steps": self.state.max_steps,
            "recipe": None if recipe is None else recipe.to_dict(),
            "the number of rows": len(rows) if hasattr(rows, "__len__") else None,
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; a training log gains routing statistics and counts of what was left out.

        Args:
            logs: Numbers by name.
            start_time: When training began, for speeds.
        """
        if "loss" in logs and self.monitor is not None:
            uses = self.monitor.read(self.state.global_step - self._last_read)
            self._last_read = self.state.global_step
            logs["skipped_steps"] = self.guard.total
            logs["batches_without_labels"] = int(self._unsupervised)
            logs.update(summary(uses))
            # transformers resets its sum by subtraction, which a NaN would survive
            self._tr_loss.zero_()
            if self.routing_log is not None:
                self.routing_log.write(self.state.global_step, uses)
            self._log_sites(scalars(uses))
        super().log(logs, start_time)

    def _log_sites(self, numbers: dict[str, float]) -> None:
        """Send the numbers of every site to TensorBoard; a console has no room."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):
                callback.on_log(self.args, self.state, self.control, logs=numbers)


class MoloraTrainer(MoloraTrainerMixin):
    """transformers' Trainer for a wrapped model; see ``MoloraTrainerMixin``."""


class _Events(TrainerCallback):
    """Calls the trainer where transformers' loop has no method to override."""

    def __init__(self, trainer: MoloraTrainerMixin):
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.begin()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.start_recipe_step()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.before_recipe_step(self.trainer.guard.in_row == 0)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        # a step that was left out leaves its gradient norm on record
        taken = self.trainer.guard.in_row == 0
        after_optimizer_step(self.trainer.model, taken)
        self.trainer.after_recipe_step(taken)

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        # under several processes accelerate does not reach the sampler after a resume
        if self.trainer.sampler is not None:
            self.trainer.sampler.set_epoch(int(self.trainer.state.epoch))


def _supervised(labels: Tensor) -> Tensor:
    """Whether any token of a batch bears loss; nothing predicts the first of a row."""
    return labels[..., 1:].ne(-100).any()


def _zero_loss(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
    """Loss 0 with a graph to every parameter, and the outputs."""
    outputs = model(**{name: v for name, v in inputs.items() if name != "labels"})
    return outputs["logits"].float().sum() * 0.0, outputs
