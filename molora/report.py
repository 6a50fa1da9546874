"""What the routers do: tables, JSON, a picture, a text coloured by expert.

The numbers are defined in usage.py.
"""

from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from molora.errors import RoutingError
from molora.records import RoutingTrace
from molora.token_strip import TokenStrip as TokenStrip
from molora.token_strip import pieces as pieces
from molora.token_strip import token_strip as token_strip
from molora.usage import Use, layer_of, task_use

OVERALL = "all tokens"
"""How the use by all tokens together is called beside the tasks."""

UNNAMED = "(no task)"
"""How tokens without a task are called where others have one."""

WIDEST = 12
"""Tables give every expert a column up to this many experts."""


class RoutingReport:
    """The numbers of one recording.

    Attributes:
        overall: Use by all tokens.
        tasks: Use by task; empty when the recording named no tasks.

    Args:
        trace: What ``molora.record_routing`` recorded.

    Raises:
        RoutingError: Nothing was recorded.
    """

    def __init__(self, trace: RoutingTrace):
        counts = [record.tokens.items() for record in trace.sites.values()]
        names = list(dict.fromkeys(n for c in counts for n, tokens in c if tokens))
        if not names:
            raise RoutingError(
                "no routing was recorded: run the model on at least one real token "
                "inside molora.record_routing"
            )
        self.overall = task_use(trace, names)
        self.tasks = {
            name or UNNAMED: task_use(trace, [name]) for name in names if names != [""]
        }

    def to_dict(self) -> dict[str, Any]:
        """All numbers, JSON-ready."""
        return {
            "overall": self.overall.to_dict(),
            "tasks": {name: use.to_dict() for name, use in self.tasks.items()},
        }

    def task_table(self) -> Table:
        """Mean gates, task by expert, averaged over sites."""
        rows = {**self.tasks, OVERALL: self.overall}
        return _table(
            "Use of the experts by task (mean gate over sites)",
            ("task", "tokens"),
            {name: (f"{use.tokens:,}", use.mean()) for name, use in rows.items()},
        )

    def layer_table(self, task: str | None = None) -> Table:
        """Mean gates, layer by expert.

        Args:
            task: A key of ``tasks``; all tokens by default.
        """
        use = self.overall if task is None else self.tasks[task]
        in_layer = [layer_of(path) for path in use.sites]
        return _table(
            f"Use of the experts by layer (mean gate, {task or OVERALL})",
            ("layer", "sites"),
            {
                name: (str(in_layer.count(name)), mean)
                for name, mean in use.layers().items()
            },
        )


def save_heatmap(trace: RoutingTrace, path: str | Path) -> None:
    """Draw mean gates, experts by layers, one panel per task, and save them as PNG.

    Args:
        trace: A recording.
        path: File to write.

    Raises:
        RoutingError: Nothing was recorded.
        ConfigError: The file cannot be written.
    """
    # imported where used: matplotlib takes half a second
    from molora.heatmap import draw

    report = RoutingReport(trace)
    draw(report.tasks or {OVERALL: report.overall}, path)


def _table(
    title: str, heads: tuple[str, str], rows: dict[str, tuple[str, Use]]
) -> Table:
    experts = max(len(use.gate) for _, use in rows.values())
    wide = experts <= WIDEST
    # twelve columns must fit into 80 characters
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0)
    table.add_column(heads[0])
    shown = [f"e{e}" for e in range(experts)] if wide else ["most used"]
    for head in (heads[1], "entropy", "live", *shown):
        table.add_column(head, justify="right")
    for name, (count, use) in rows.items():
        gates = [f"{gate:.2f}" for gate in use.gate]
        if not wide:
            gates = [f"e{use.busiest} ({gates[use.busiest]})"]
        table.add_row(name, count, f"{use.entropy:.2f}", f"{use.live:.1f}", *gates)
    return table
