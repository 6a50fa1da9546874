"""The main job from end to end, on the real base model and four real tasks.

Train a mixture, look at its routes, collapse it by every method, merge the best, load
everything back, and print one table. Every number is computed by this run.
"""

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

import molora
from molora.atomic import atomic_folder
from molora.base_models import load_base
from molora.checkpoint import load
from molora.collapse import COLLAPSERS
from molora.commands import session
from molora.commands.deploy import calibration
from molora.errors import ConfigError, MoloraError
from molora.manifest import write_manifest
from molora.model import adapter_parameters, sites
from molora.report import pieces, save_heatmap, token_strip
from molora.run_config import RunConfig, load_run_config
from molora.training import MoloraTrainer
from molora.training.arguments import build_arguments
from molora.training.data import (
    Collator,
    EvalSet,
    TaskMixture,
    build_eval_sets,
    build_mixture,
)
from molora.training.evaluation import TaskResult, evaluate

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
RANK = 16
Scores = Mapping[str, TaskResult]


def run_demo(
    output: Path, overrides: list[str] | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Run the demonstration.

    Args:
        output: Folder for adapters, merged model, picture and results.
        overrides: ``key.path=value`` changes to configs/quickstart.yaml.
        console: Where to print; standard output by default.

    Returns:
        All results, as written to ``output/results.json``.

    Raises:
        MoloraError: What was loaded back differs from what was saved.
    """
    run = _Demo(output, overrides or [], console or Console())
    return run.run()


METHODS = [n for n, entry in COLLAPSERS.entries().items() if not entry.cls.searches]
"""Ways to collapse that take one pass or two, and no package beside molora's own."""


class _Demo:
    """One run; the state that its steps share."""

    def __init__(self, output: Path, overrides: list[str], console: Console):
        if not CONFIG.is_file():
            raise ConfigError(
                "molora demo needs a checkout of the project: its settings and data "
                f"lie in configs/, and there is no {CONFIG}"
            )
        self.output = output
        self.console = console
        settings = [f"training.output_dir={output / 'training'}", *overrides]
        self.config: RunConfig = load_run_config(CONFIG, settings)
        self.started = time.perf_counter()
        self.results: dict[str, Any] = {"seconds": {}}

    def run(self) -> dict[str, Any]:
        self.output.mkdir(parents=True, exist_ok=True)
        with self.step("load the base model"):
            model, self.tokenizer = session.base(self.config)
        mixture = build_mixture(self.config.data, self.tokenizer)
        mixture.summary.print(self.console)
        self.eval_sets = build_eval_sets(self.config.data, self.tokenizer)
        self.calibration = calibration(self.config, self.tokenizer)
        with self.step("evaluate the base model"):
            base = self.evaluate(model)
        with self.step("train the mixture"):
            self.train(model, mixture)
        with self.step("save and load the mixture back"):
            model = self.reload(model)
        with self.step("evaluate the mixture"):
            mixed = self.evaluate(model)
        with self.step("show the routes of one prompt of each task"):
            self.routes(model)
        del model
        losses: dict[str, Scores] = {}
        for method in METHODS:
            with self.step(f"collapse by {method}"):
                losses[method] = self.collapse(self.fresh(), method)
        best = min(losses, key=lambda m: _mean_loss(losses[m]))
        with self.step(f"load the {best} one, merge, write, load back, evaluate"):
            collapsed, merged = self.deploy(best)
        columns = {"base": base, "mixture": mixed, best: collapsed, "merged": merged}
        self.finish(columns, losses, best)
        return self.results

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Announce a step and note how long it takes."""
        self.console.rule(f"[bold]{title}", align="left")
        start = time.perf_counter()
        yield
        self.results["seconds"][title] = round(time.perf_counter() - start, 1)

    def evaluate(self, model: PreTrainedModel, loss_only: bool = False) -> Scores:
        """Scores per task, on the evaluation rows of the configuration."""
        eval_sets = self.eval_sets
        if loss_only:
            eval_sets = {k: _without_metrics(v) for k, v in eval_sets.items()}
        return evaluate(model, self.tokenizer, eval_sets)

    def train(self, model: PreTrainedModel, mixture: TaskMixture) -> None:
        molora.wrap(model, self.config.adapter, seed=self.config.seed)
        trained = sum(p.numel() for p in adapter_parameters(model).values())
        self.console.print(
            f"{len(sites(model))} target layers, {trained / 1e6:.1f} M trained values"
        )
        arguments, settings = build_arguments(self.config.training)
        trainer = MoloraTrainer(
            model=model,
            args=arguments,
            settings=settings,
            train_dataset=mixture,
            data_collator=Collator(self.tokenizer.pad_token_id),
            processing_class=self.tokenizer,
        )
        trainer.train()
        model.eval()

    def reload(self, model: PreTrainedModel) -> Any:
        """Save the mixture, load it onto a new base, require equal bits."""
        model.save_pretrained(self.output / "adapter")
        again = self.fresh()
        kept = adapter_parameters(again)
        for name, parameter in adapter_parameters(model).items():
            if not torch.equal(parameter, kept[name]):
                raise MoloraError(f"{name} differs after saving and loading")
        return again

    def fresh(self, adapter: str = "adapter") -> Any:
        """A new base with a saved adapter on it."""
        base, _ = session.base(self.config)
        return load(base, self.output / adapter).eval()

    def routes(self, model: PreTrainedModel) -> None:
        """Colour the tokens of one prompt per task by expert; draw the heat map."""
        for name, eval_set in self.eval_sets.items():
            ids = eval_set.rows[0].prompt_ids
            with molora.record_routing(model) as trace, torch.no_grad():
                model(input_ids=torch.tensor([ids]))
            self.console.print(f"[bold]{name}[/bold]")
            self.console.print(token_strip(pieces(ids, self.tokenizer), trace))
        with molora.record_routing(model, keep_tokens=False) as trace:
            for name, eval_set in self.eval_sets.items():
                rows = [row.encoded for row in eval_set.rows[:8]]
                batch = Collator(self.tokenizer.pad_token_id)(rows)
                batch.pop("task_ids")
                with molora.tasks(model, [name] * len(rows)), torch.no_grad():
                    model(**batch)
        picture = self.output / "routes.png"
        save_heatmap(trace, picture)
        self.console.print(f"Experts by layer and task: {picture}")

    def collapse(self, model: Any, method: str) -> Scores:
        """Collapse in place, save, and return the losses."""
        options: dict[str, Any] = {} if method == "concat" else {"rank": RANK}
        if method == self.config.collapse.method:
            options = {**self.config.collapse.options, "rank": RANK}
        result = molora.collapse(
            model, method=method, calibration=self.calibration, **options
        )
        result.save(self.output / f"collapsed_{method}.json")
        model.save_pretrained(self.output / f"collapsed_{method}")
        return self.evaluate(model, loss_only=True)

    def deploy(self, method: str) -> tuple[Scores, Scores]:
        """Evaluate, export, merge, write a plain model, load it back, evaluate."""
        model = self.fresh(f"collapsed_{method}")
        molora.export_peft(model, self.output / "peft")
        collapsed = self.evaluate(model)
        probe = torch.tensor([next(iter(self.eval_sets.values())).rows[0].prompt_ids])
        with torch.no_grad():
            molora.merge(model)
            before = model(input_ids=probe).logits
            molora.unwrap(model)
            with atomic_folder(self.output / "merged") as folder:
                model.save_pretrained(folder)
                self.tokenizer.save_pretrained(folder)
                write_manifest(folder, {"base_model": self.config.model.name})
            plain, _ = load_base(str(self.output / "merged"), self.config.model.dtype)
            after = plain(input_ids=probe).logits
        if not torch.equal(before, after):
            raise MoloraError("the merged model differs after saving and loading")
        return collapsed, self.evaluate(plain)

    def finish(
        self, columns: dict[str, Scores], losses: dict[str, Scores], best: str
    ) -> None:
        """Print the tables, write results.json."""
        base, mixed = columns["base"], columns["mixture"]
        gain = _mean_loss(base) - _mean_loss(mixed)
        if gain <= 0:
            raise MoloraError(
                f"training did not lower the mean loss ({gain:+.3f}), so there is "
                "nothing to compare; train for more steps"
            )
        kept = {m: (_mean_loss(base) - _mean_loss(s)) / gain for m, s in losses.items()}
        self.console.rule("[bold]results", align="left")
        self.console.print(_methods_table(losses, kept))
        self.console.print(_tasks_table(columns, best))
        minutes = (time.perf_counter() - self.started) / 60
        self.console.print(
            f"The mixture lowers the mean loss by {gain:.3f}; {best} keeps "
            f"{kept[best]:.1%} of that. {minutes:.1f} minutes; everything is in "
            f"{self.output}."
        )
        self.results.update(
            scores={
                column: {task: r.to_dict() for task, r in scores.items()}
                for column, scores in columns.items()
            },
            collapse_loss={
                m: {task: r.loss for task, r in scores.items()}
                for m, scores in losses.items()
            },
            kept_loss_reduction=kept,
            best=best,
            minutes=minutes,
        )
        path = self.output / "results.json"
        path.write_text(json.dumps(self.results, indent=2) + "\n")


def _without_metrics(eval_set: EvalSet) -> EvalSet:
    """The same rows, scored by loss alone."""
    task = eval_set.task.model_copy(update={"labels": None, "exact_match": False})
    return dataclasses.replace(eval_set, task=task)


def _mean_loss(scores: Scores) -> float:
    return sum(result.loss for result in scores.values()) / len(scores)


def _methods_table(losses: dict[str, Scores], kept: dict[str, float]) -> Table:
    table = Table(title="Collapse: loss per task, share of the loss reduction kept")
    names = list(next(iter(losses.values())))
    for column in ("method", *names, "mean", "kept"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method, scores in losses.items():
        rank = "full rank" if method == "concat" else f"rank {RANK}"
        cells = [f"{scores[name].loss:.3f}" for name in names]
        mean = f"{_mean_loss(scores):.3f}"
        table.add_row(f"{method}, {rank}", *cells, mean, f"{kept[method]:.1%}")
    return table


def _tasks_table(columns: dict[str, Scores], best: str) -> Table:
    table = Table(title="Per task: loss, and accuracy or exact match")
    table.add_column("task\n")
    table.add_column("loss\nscore")
    for column in columns:
        title = f"collapsed\n{best}, {RANK}" if column == best else f"{column}\n"
        table.add_column(title, justify="right")
    for task, first in next(iter(columns.values())).items():
        metric = "accuracy" if first.accuracy is not None else "exact match"
        cells = []
        for scores in columns.values():
            result = scores[task]
            score = result.exact_match if result.accuracy is None else result.accuracy
            shown = "-" if score is None else f"{score:.1%}"
            cells.append(f"{result.loss:.3f}\n{shown}")
        table.add_row(task, f"loss\n{metric}", *cells, end_section=True)
    return table
