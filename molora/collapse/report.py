"""What a collapse cost: errors per site, loss per task before and after."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from molora.schema import Schema


class SiteReport(Schema):
    """One site before and after."""

    experts: int
    """E before."""
    total_rank: int
    """R before, the ranks of all experts together."""
    rank: int
    """Rank of the one expert after."""
    gates: list[float]
    """Mean gate of each expert: measured, or even without calibration data."""
    weight_error: float | None
    """|W - W_mean| / |W_mean| in the Frobenius norm, W_mean the mean-gate update."""
    error: float | None = None
    """sqrt(sum |W x - d|^2 / sum |d|^2) on held-out tokens, d the mixture's update."""
    output_error: float | None = None
    """The same difference, relative to the layer's whole output."""
    details: dict[str, Any] = {}
    """What the method chose here: ridge, expert, weights."""


class CollapseReport(Schema):
    """One collapse. Errors are None where nothing was measured."""

    method: str
    """Registered name."""
    paper: str
    """Where the method comes from."""
    options: dict[str, Any]
    """All settings of the method."""
    gates: Literal["measured", "even"]
    """Whether the mean gates come from calibration data."""
    tokens_fit: int | None = None
    """Real tokens that the judged fit learned from."""
    tokens_held: int | None = None
    """Real tokens that the errors were measured on."""
    passes: int = 0
    """Passes over the calibration data that the memory budget asked for."""
    sites: dict[str, SiteReport]
    """By module path, in model order."""
    mean_error: float | None = None
    """Mean of the sites' errors."""
    worst_error: float | None = None
    """Largest of the sites' errors."""
    worst_site: str | None = None
    """Where it is."""
    losses: dict[str, dict[Literal["before", "after"], float]] = {}
    """What ``evaluate`` returned, by task, before and after the collapse."""
    prepared: dict[str, Any] = {}
    """What the method learned for all sites together, and what that was worth."""
    exact: bool
    """Proven equal up to rounding: every site had one expert and kept its rank."""
    notes: list[str]
    """How to read the numbers."""

    def table(self, worst: int | None = None) -> Table:
        """Sites as a table for rich.

        Args:
            worst: Show only this many sites, those with the largest errors.
        """
        title = f"Collapse by {self.method}"
        if self.mean_error is not None and self.worst_error is not None:
            title += f": mean error {self.mean_error:.3f}, worst {self.worst_error:.3f}"
        table = Table(title=title, caption="\n".join(self.notes))
        table.add_column("site", overflow="fold")
        for name in ("experts", "rank", "error", "of output", "in weights"):
            table.add_column(name, justify="right", no_wrap=True)
        rows = list(self.sites.items())
        if worst is not None:
            rows = sorted(rows, key=lambda item: -(_key(item[1])))[:worst]
        for path, site in rows:
            table.add_row(
                path,
                str(site.experts),
                f"{site.total_rank} -> {site.rank}",
                _shown(site.error),
                _shown(site.output_error),
                _shown(site.weight_error),
            )
        return table

    def loss_table(self) -> Table:
        """Loss per task before and after, for rich."""
        table = Table(title=f"Loss before and after the collapse by {self.method}")
        table.add_column("task")
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        for task, loss in self.losses.items():
            table.add_row(task, f"{loss['before']:.4f}", f"{loss['after']:.4f}")
        return table


def _key(site: SiteReport) -> float:
    first = site.weight_error if site.error is None else site.error
    return first or 0.0


def _shown(error: float | None) -> str:
    return "-" if error is None else f"{error:.4f}"


@dataclass(frozen=True)
class CollapseResult:
    """What ``molora.collapse`` returns; the model itself is changed in place."""

    report: CollapseReport

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON-ready values."""
        return self.report.to_dict()

    def table(self, worst: int | None = None) -> Table:
        """Sites as a table for rich; see ``CollapseReport.table``."""
        return self.report.table(worst)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON; an existing file is replaced in one step."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_text(json.dumps(self.to_dict(), indent=2) + "\n", "utf-8")
        draft.replace(path)
