"""What a trainer does for its recipe; what a recipe is stands in recipes/base.py."""

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from molora.errors import CheckpointError, TrainingError
from molora.training.mixture import TaskMixture
from molora.training.recipes import RECIPES, Recipe, RecipeConfig
from molora.training.sampling import MixtureSampler

logger = logging.getLogger(__name__)

_OWN_WAYS = ("lomo", "layerwise", "schedule_free")
"""Optimizers that take gradients as they come, or keep weights that they average."""


class _Held:
    """Loss of the model on batches of rows that are held out.

    Args:
        trainer: Whose model and loss they are for.
        rows: In an order of their own for each pass.
    """

    def __init__(self, trainer: Any, rows: TaskMixture):
        self.trainer = trainer
        self.rows = rows
        self.sampler = MixtureSampler(rows, seed=trainer.args.seed)

    def __call__(self, index: int) -> Tensor:
        """Mean loss of a batch, by its number, in evaluation mode."""
        trainer = self.trainer
        size = min(trainer.args.per_device_train_batch_size, len(self.rows))
        passed, place = divmod(index, len(self.rows) // size)
        order = self.sampler.draw(passed)[place * size : (place + 1) * size]
        batch = trainer.data_collator([self.rows[row] for row in order])
        was_training = trainer.model.training
        trainer.model.eval()
        try:
            with trainer.compute_loss_context_manager():
                inputs = trainer._prepare_inputs(batch)
                loss: Tensor = trainer.compute_loss(trainer.model, inputs)
        finally:
            trainer.model.train(was_training)
        return loss


class RecipeMixin(Trainer):
    """Calls the recipe in every step, and keeps its state with the checkpoints.

    The penalty of a recipe is no part of the logged loss: it has a number of its own.
    A step whose gradient is not finite is left out for the recipe too.

    Limitations: a recipe whose parameters have optimizer settings of their own takes
    the optimizer that ``args.optim`` names, none of the caller's. One that holds rows
    out runs them as in evaluation, without dropout, noise and activation checkpointing,
    in batches of ``per_device_train_batch_size``.
    """

    # transformers declares that these may be None, which they are not while training
    args: Any
    model: Any
    optimizer: Any

    recipe: Recipe | None = None
    held_rows: int = 0
    """Rows that are held out of training."""
    _penalty: Tensor | None = None

    def set_up_recipe(self, config: RecipeConfig | None) -> None:
        """Build the recipe, and refuse what does not fit it.

        Raises:
            TrainingError: See the limitations of it.
        """
        self.recipe = None
        if config is None:
            return
        self.recipe = RECIPES[config.kind](config, self.model)
        where = f"recipe {config.kind!r}"
        optim = str(getattr(self.args.optim, "value", self.args.optim))
        if any(word in optim for word in _OWN_WAYS):
            raise TrainingError(
                f"{where} reads the gradients of a step and changes the parameters "
                f"after it, and optim {optim!r} keeps one of the two to itself; take "
                "adamw_torch, for example"
            )
        if self.recipe.one_process and self.args.world_size > 1:
            raise TrainingError(f"{where} trains in one process; start one")
        if self.recipe.groups() and self.optimizer is not None:
            raise TrainingError(
                f"{where} gives some parameters optimizer settings of their own, which "
                "does not go with an optimizer of your own; leave that out"
            )
        if self.args.load_best_model_at_end:
            logger.warning(
                "load_best_model_at_end: the best checkpoint may be one from before %s "
                "was done, with more ranks or other masks than it ends with",
                where,
            )
        share = self.recipe.held_share()
        if share:
            self._hold_out(share, where)

    def _hold_out(self, share: float, where: str) -> None:
        """Split the training rows, and give the recipe the loss on its part."""
        assert self.recipe is not None
        if not isinstance(self.train_dataset, TaskMixture):
            raise TrainingError(
                f"{where} holds rows out of training, which needs a TaskMixture "
                "(build_mixture) as the training set"
            )
        if self.args.fp16:
            raise TrainingError(
                f"{where} takes gradients of its own, which fp16's loss scale does not "
                "cover; set bf16 in its place"
            )
        rest, rows = self.train_dataset.split(share, self.args.seed)
        self.train_dataset = rest
        self.held_rows = len(rows)
        self.recipe.held = _Held(self, rows)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer, with the recipe's own groups in it."""
        made = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if self.recipe is None or made:
            return optimizer
        for group in self.recipe.groups():
            own = {id(parameter) for parameter in group["params"]}
            for other in optimizer.param_groups:
                other["params"] = [p for p in other["params"] if id(p) not in own]
            optimizer.add_param_group(group)
        return optimizer

    def begin_recipe(self, progress: dict[str, Any] | None) -> None:
        """Set out, or go on from the progress of a checkpoint.

        Raises:
            CheckpointError: It was saved with another recipe.
        """
        kind = None if self.recipe is None else self.recipe.config.kind
        if self.recipe is not None:
            part = next(iter(self.recipe.parts.values()))
            if all(part is not module for module in self.model.modules()):
                raise TrainingError(
                    "the trainer has another model than when it was made (model_init), "
                    "which its recipe does not know; make a new trainer"
                )
            self.recipe.begin(self.state.max_steps)
        if progress is None:
            return
        saved = progress.get("recipe")
        if (saved and saved["kind"]) != kind:
            had = saved["kind"] if saved else "none"
            raise CheckpointError(
                f"the checkpoint is of a run with training.recipe {had}, and this one "
                f"has {kind or 'none'}; give it the same, or start anew from the "
                "adapter with start_from"
            )
        if self.recipe is not None and saved is not None:
            self.recipe.restore(saved["state"])

    def recipe_progress(self) -> dict[str, Any] | None:
        """What a checkpoint keeps of the recipe."""
        if self.recipe is None:
            return None
        return {"kind": self.recipe.config.kind, "state": self.recipe.state()}

    def start_recipe_step(self) -> None:
        """Tell the recipe that the forwards of a step are about to come."""
        if self.recipe is not None:
            self.recipe.start_step(self.state.global_step + 1)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward; the last of a step adds the recipe's penalty."""
        loss = super().training_step(*args, **kwargs)
        if self.recipe is not None and self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler
            scale = 1.0 if scaler is None else scaler.get_scale()
            self._penalty = self.recipe.after_backward(scale)
        return loss

    def before_recipe_step(self, taken: bool) -> None:
        """Tell the recipe that gradients are there, unless the step is left out."""
        if self.recipe is not None and taken:
            self.recipe.before_step(self.state.global_step + 1)

    def after_recipe_step(self, taken: bool) -> None:
        """Tell the recipe that the parameters have moved, unless they have not."""
        if self.recipe is not None and taken:
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
            self.recipe.after_step(self.state.global_step + 1, optimizer)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; a training log gains the numbers of the recipe."""
        if "loss" in logs and self.recipe is not None:
            logs.update(self.recipe.log())
            if self._penalty is not None:
                logs["recipe_penalty"] = float(self._penalty)
        super().log(logs, start_time)
