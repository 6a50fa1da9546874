"""molora clusters."""

from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from molora.clusters import ClusterChoice, Rule, choose_num_experts, embed
from molora.commands import session
from molora.commands.deploy import calibration
from molora.run_config import RunConfig


def clusters(
    config: RunConfig, rule: Rule, largest: int, rows: int, json: Path | None
) -> None:
    """Choose the number of experts from the training rows.

    Args:
        config: The run.
        rule: How to choose.
        largest: Largest number tried.
        rows: Training rows, those that an epoch would begin with.
        json: File for all numbers.

    Raises:
        MoloraError: Data that cannot be read, too few rows, no scikit-learn, or a file
            that cannot be written.
    """
    session.require_writable(json)
    model, tokenizer = session.base(config)
    batches = calibration(config, tokenizer, rows)
    found = embed(model.eval(), session.progress(batches, "Embedding"))
    choice = choose_num_experts(found, rule=rule, largest=largest, seed=config.seed)
    session.out.print(_table(choice))
    session.say(f"num_experts: {choice.num_experts}")
    if json is not None:
        session.write_json(json, asdict(choice))


def _table(choice: ClusterChoice) -> Table:
    table = Table(title=f"Clusters, chosen by {choice.rule}")
    for head in ("experts", "inertia", "silhouette", ""):
        table.add_column(head, justify="right")
    for k, inertia in choice.inertia.items():
        score = choice.silhouette.get(k)
        shown = "-" if score is None else f"{score:.4f}"
        mark = "chosen" if k == choice.num_experts else ""
        table.add_row(str(k), f"{inertia:.4f}", shown, mark)
    return table
