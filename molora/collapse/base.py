"""What a collapse method must provide.

A method turns the experts of one site into one static update. It sees the stacked
factors and, when calibration data is given, sums over its tokens (see moments.py). The
model itself is seen by ``prepare`` alone, for what is one for all sites.
"""

import abc
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import pydantic
from rich.progress import Progress
from torch import Tensor, nn

from molora.collapse.factors import LowRank, SiteFactors
from molora.collapse.moments import Evidence
from molora.registry import Registry
from molora.schema import Schema

if TYPE_CHECKING:
    from molora.collapse.calibration import Batch


class CollapseConfig(Schema):
    """Settings of every method; these three are read with calibration data only."""

    held_out: float = pydantic.Field(default=0.25, gt=0, lt=1)
    """Share of the calibration rows that the reported error is measured on."""
    tasks: list[str | int] | None = pydantic.Field(default=None, min_length=1)
    """Use only calibration rows of these tasks; None uses all rows."""
    memory_budget_mb: int = pydantic.Field(default=1024, ge=1)
    """MiB for the sums over tokens; sites are taken in groups that fit into it."""


class Experts(Protocol):
    """What every form of a site's experts has."""

    @property
    def path(self) -> str:
        """Module path of the site."""

    @property
    def num_experts(self) -> int:
        """E."""

    @property
    def even_E(self) -> Tensor:
        """Mean gates of a router that prefers nobody, float64."""


class Collapser(abc.ABC):
    """One way to turn a site's experts into one static update.

    Args:
        config: Settings.
    """

    Config: ClassVar[type[CollapseConfig]]
    needs_moments: ClassVar[bool] = False
    """Whether ``solve`` reads second moments of the tokens it may learn from."""
    searches: ClassVar[bool] = False
    """Whether it tries many updates on the data instead of solving for one."""
    reduces_rank: ClassVar[bool] = False
    """Whether the method means something where every site has one expert already."""
    note: ClassVar[str] = (
        "The error is that of a fit to the other rows, on the held-out rows; the "
        "model has the fit to all rows."
    )
    """How to read the errors, for the report."""

    def __init__(self, config: CollapseConfig):
        self.config = config

    def notes(self) -> list[str]:
        """How to read the result, for a report with calibration data."""
        return [self.note]

    def why_calibration(self) -> str | None:
        """Say what needs calibration data under these settings, or return None."""
        return None

    def check(self, factors: SiteFactors) -> None:
        """Refuse settings that do not fit a site, before any data is read.

        Raises:
            ConfigError: Names the setting and the site, or a missing library.
        """
        return None

    def prepare(
        self,
        model: nn.Module,
        factors: dict[str, SiteFactors],
        batches: list["Batch"],
        progress: Progress,
    ) -> dict[str, Any]:
        """Learn what is one for all sites, before any is solved.

        Args:
            model: The uncollapsed model, in eval mode; it must be the same afterwards.
            factors: The experts of every site.
            batches: Calibration rows.
            progress: Running bar to add a task to.

        Returns:
            JSON-ready details for the report.

        Raises:
            ConfigError: Settings that do not fit the model.
            DataError: Rows that the method cannot use.
        """
        return {}

    def tune(
        self, factors: SiteFactors, fit: Evidence, held: Evidence
    ) -> dict[str, float]:
        """Choose what is chosen by held-out error.

        Args:
            factors: The site's experts.
            fit: Evidence to learn from.
            held: Evidence to judge by; has moments.

        Returns:
            Values by name, given to ``solve`` and printed in the report.
        """
        return {}

    @abc.abstractmethod
    def solve(
        self, factors: SiteFactors, data: Evidence, tuned: dict[str, float]
    ) -> tuple[LowRank, dict[str, Any]]:
        """Compute the static update of one site.

        Args:
            factors: The site's experts.
            data: What was measured, or even gates when nothing was.
            tuned: What ``tune`` returned; empty without calibration data.

        Returns:
            The update, and JSON-ready details for the report.
        """


COLLAPSERS: Registry[Collapser] = Registry("collapse method")
