"""Checkpoints of a training run: whole or absent, checked before use, without pickle.

``checkpoint-<step>`` appears by a rename. Beside the adapter it holds what a run needs
to go on: optimizer, scheduler, generators, progress (see state.py for the format),
transformers' ``trainer_state.json``, and the manifest of all of these.
"""

import abc
import logging
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from molora.atomic import atomic_folder
from molora.checkpoint import (
    load_adapter_state,
    newest_valid,
    verify,
    write_adapter,
    write_manifest,
)
from molora.errors import CheckpointError
from molora.training.state import read_state, rng_state, set_rng_state, write_state

logger = logging.getLogger(__name__)

OPTIMIZER = "optimizer"
SCHEDULER = "scheduler"
SCALER = "scaler"
RNG = "rng_state"
PROGRESS = "progress"
NEEDED = (OPTIMIZER, SCHEDULER, RNG, PROGRESS, "trainer_state")
"""Names of the JSON files without which training cannot be resumed."""


class CheckpointingMixin(Trainer):
    """Replaces how a trainer saves and loads; all else is the trainer's.

    A subclass says in ``progress`` what else of a run has to be kept, and finds it in
    ``resumed`` when training begins.
    """

    # transformers declares that these may be None, which they are not while training
    args: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any

    staging: Path | None = None
    resumed: Any = None

    @abc.abstractmethod
    def progress(self) -> Any:
        """State beside the adapter, optimizer, scheduler and generators."""

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if not self.args.should_save:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            return
        root = Path(self._get_output_dir(trial))
        target = root / f"checkpoint-{self.state.global_step}"
        with atomic_folder(target) as folder:
            self.staging = folder
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.staging = None
            # transformers writes below the folder that it is given
            for path in (folder / target.name).iterdir():
                path.rename(folder / path.name)
            (folder / target.name).rmdir()
            self._note_best(root, target)
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            write_manifest(folder, {"step": self.state.global_step})
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))
        best = self.state.best_model_checkpoint
        keep = [target] if best is None else [target, Path(best)]
        rotate(root, self.args.save_total_limit, keep, self.state.global_step)
        self.accelerator.wait_for_everyone()

    def _note_best(self, root: Path, target: Path) -> None:
        """Put the place of the best checkpoint right, once it is or will be there."""
        if not self.state.best_global_step:
            return
        best = root / f"checkpoint-{self.state.best_global_step}"
        if best == target or best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # from a folder that is about to be renamed the upload would fail
        if self.staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if self.staging is None:
            self.model.save_pretrained(folder)
        else:
            folder.mkdir()
            write_adapter(self.model, folder)
            text = self.args.to_json_string()
            (folder / "training_args.json").write_text(text, encoding="utf-8")
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir)
        write_state(folder, OPTIMIZER, self.optimizer.state_dict())
        write_state(folder, SCHEDULER, self.lr_scheduler.state_dict())
        write_state(folder, PROGRESS, self.progress())

    def _save_scaler(self, output_dir: str) -> None:
        scaler = self.accelerator.scaler
        if scaler is not None and self.args.should_save:
            write_state(Path(output_dir), SCALER, scaler.state_dict())

    def _save_rng_state(self, output_dir: str) -> None:
        every_process = gather_object([rng_state()])
        if self.args.should_save:
            write_state(Path(output_dir), RNG, every_process)

    def train(
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        *rest: Any,
        **kwargs: Any,
    ) -> Any:
        """Train, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: True for the newest valid checkpoint of the output
                folder (those that are not valid are named in a warning), or a
                checkpoint, or a folder of checkpoints.
            *rest: Passed on.
            **kwargs: Passed on.

        Raises:
            CheckpointError: No checkpoint can be resumed from.
        """
        folder = None
        self.resumed = None
        if resume_from_checkpoint:
            folder = str(find_resumable(resume_from_checkpoint, self.args.output_dir))
        return super().train(folder, *rest, **kwargs)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: Any = None
    ) -> None:
        load_adapter_state(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_adapter_state(self.model, str(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        self.optimizer.load_state_dict(read_state(folder, OPTIMIZER))
        self.lr_scheduler.load_state_dict(read_state(folder, SCHEDULER))
        self.resumed = read_state(folder, PROGRESS)

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = self.accelerator.scaler
        if checkpoint is not None and scaler is not None:
            scaler.load_state_dict(read_state(Path(checkpoint), SCALER))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        every_process = read_state(Path(checkpoint), RNG)
        if len(every_process) != self.args.world_size:
            raise CheckpointError(
                f"{checkpoint}: saved by {len(every_process)} processes, resumed with "
                f"{self.args.world_size}; start as many"
            )
        set_rng_state(every_process[self.args.process_index])


def find_resumable(choice: str | Path | bool, output_dir: str | Path) -> Path:
    """Choose the checkpoint to resume from.

    Args:
        choice: True for the newest valid one in output_dir, a checkpoint, or a folder
            of checkpoints.
        output_dir: Of the run.

    Returns:
        A checkpoint whose files are all there and unchanged.

    Raises:
        CheckpointError: There is none, or it holds no training state. The message says
            what is wrong with each that was looked at.
    """
    root = Path(output_dir if choice is True else str(choice))
    is_one = choice is not True and not any(root.glob("checkpoint-*"))
    folder = _checked(root) if is_one else _newest(root)
    missing = [f"{n}.json" for n in NEEDED if not (folder / f"{n}.json").is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: cannot be resumed from, it lacks {', '.join(missing)}. It is "
            "an adapter without training state (save_only_model, or written by "
            "save_pretrained); molora.load starts a new run from it."
        )
    return folder


def _checked(folder: Path) -> Path:
    """Return a checkpoint if it is valid; else name one that is."""
    try:
        verify(folder)
    except CheckpointError as error:
        newest, _ = newest_valid(folder.parent)
        hint = f". The newest valid one beside it is {newest}" if newest else ""
        raise CheckpointError(f"{error}{hint}") from None
    return folder


def _newest(root: Path) -> Path:
    """Return the newest valid checkpoint of a folder; warn of those passed over."""
    newest, skipped = newest_valid(root)
    reasons = "".join(f"\n  {path.name}: {reason}" for path, reason in skipped)
    if newest is None:
        raise CheckpointError(
            f"{root}: holds no valid checkpoint to resume from{reasons}"
        )
    if skipped:
        logger.warning("resuming from %s, since not valid are:%s", newest, reasons)
    return newest


def rotate(root: Path, limit: int | None, keep: Iterable[Path], step: int) -> None:
    """Delete checkpoints until at most limit are left.

    Those from beyond the present step go first (a run that was resumed earlier left
    them behind), then the oldest.

    Args:
        root: Folder of the checkpoints.
        limit: How many may stay; None or 0 for all.
        keep: Never deleted: the one just written, and the best one.
        step: The present step.
    """
    if not limit:
        return
    found = {
        path: int(path.name.rpartition("-")[2])
        for path in root.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()
    }
    kept = {path.resolve() for path in keep}
    loose = [path for path in found if path.resolve() not in kept]
    loose.sort(key=lambda path: (found[path] <= step, found[path]))
    for path in loose[: max(len(found) - limit, 0)]:
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():
            logger.warning("%s: could not be deleted (save_total_limit)", path)
