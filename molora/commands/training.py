"""molora train and molora evaluate."""

from pathlib import Path

from transformers import IntervalStrategy

import molora
from molora.commands import session
from molora.continuing import continued
from molora.errors import ConfigError
from molora.run_config import RunConfig
from molora.training import MoloraTrainer
from molora.training.arguments import build_arguments
from molora.training.data import Collator, build_eval_sets, build_mixture


def train(config: RunConfig, resume: bool) -> None:
    """Train, save the adapter in ``<output_dir>/adapter``, evaluate it.

    Args:
        config: The run.
        resume: Go on from the newest valid checkpoint in the output folder.

    Raises:
        MoloraError: Data or targets that do not fit, nothing to resume from, or
            checkpoints of an earlier run without ``resume``.
    """
    folder = config.output_dir
    earlier = [*folder.glob("checkpoint-*"), *folder.glob("adapter")]
    if not resume and earlier:
        raise ConfigError(
            f"{folder} holds {earlier[0].name} of an earlier run: go on from its "
            "checkpoints with --resume, delete it, or set another training.output_dir"
        )
    if config.adapter.train != "all" and config.start_from is None:
        raise ConfigError(
            f"adapter.train={config.adapter.train}: this command starts from new "
            "experts, which are to be trained; set train: all, or name trained ones "
            "with start_from: what molora import, molora grow or another run wrote"
        )
    arguments, settings = build_arguments(config.training)
    if config.load_router:
        # before training: whether it means something with these experts
        continued(config.adapter, {"router": config.load_router}, "load")
        session.note("training uses adapter.router, the scores after it load_router")
    model, tokenizer = session.base(config)
    mixture = build_mixture(config.data, tokenizer)
    mixture.summary.print(session.out)
    eval_sets = session.eval_sets(config, tokenizer)
    in_between = arguments.eval_strategy != IntervalStrategy.NO
    session.give_adapter(config, model)
    trainer = MoloraTrainer(
        model=model,
        args=arguments,
        settings=settings,
        train_dataset=mixture,
        eval_dataset=build_mixture(config.data, tokenizer, "eval")
        if in_between
        else None,
        data_collator=Collator(session.filler(tokenizer)),
        processing_class=tokenizer,
    )
    if trainer.held_rows:
        held, every = trainer.held_rows, len(mixture)
        session.note(f"training.recipe holds {held} of {every} rows out of training")
    trainer.train(resume_from_checkpoint=resume or None)
    model.eval()
    model.save_pretrained(folder / "adapter")
    session.note(f"Wrote {folder / 'adapter'}")
    if eval_sets:
        if config.load_router:
            plain, router = molora.unwrap(model), config.load_router
            twin = session.original(config, config.adapter, 2)
            model = molora.load(
                plain, folder / "adapter", router=router, original=twin
            ).eval()
        results = session.scores(config, model, tokenizer, eval_sets)
        session.out.print(session.score_table(results))


def evaluate(config: RunConfig, adapter: Path, json: Path | None) -> None:
    """Score an adapter on every task.

    Args:
        config: The run.
        adapter: Folder of the adapter.
        json: File for the scores.

    Raises:
        MoloraError: No adapter, evaluation data that cannot be read, or a file that
            cannot be written.
    """
    session.require_writable(json)
    model, tokenizer = session.trained(config, adapter)
    sets = build_eval_sets(config.data, tokenizer)
    results = session.scores(config, model, tokenizer, sets)
    session.out.print(session.score_table(results))
    if json is not None:
        scores = {name: result.to_dict() for name, result in results.items()}
        session.write_json(json, scores)
