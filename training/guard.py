"""What to do with an optimizer step whose gradient is not finite: leave it out."""

import logging
import math

logger = logging.getLogger(__name__)


class StepGuard:
    """Counts the optimizer steps that are left out, and says when to give up.

    Args:
        limit: Steps left out in a row at which the run stops.

    Attributes:
        in_row: Steps left out since the last good one.
        total: Steps left out in the whole run.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.in_row = 0
        self.total = 0

    @property
    def exhausted(self) -> bool:
        """Whether the run should stop."""
        return self.in_row >= self.limit

    def accepts(self, grad_norm: float, step: int) -> bool:
        """Judge one step by its global gradient norm.

        Args:
            grad_norm: Before clipping. One NaN or infinity in any gradient shows in it.
            step: Steps done so far, for the message.

        Returns:
            Whether the step may be taken.
        """
        if math.isfinite(grad_norm):
            self.in_row = 0
            return True
        self.in_row += 1
        self.total += 1
        logger.warning(
            "step %d: the gradient norm is %s, so the step is left out (%d in a row, "
            "%d in all; max_skipped_steps is %d)",
            step + 1,
            grad_norm,
            self.in_row,
            self.total,
            self.limit,
        )
        return False

    def state(self) -> dict[str, int]:
        """Counts, JSON-ready."""
        return {"in_row": self.in_row, "total": self.total}

    def restore(self, state: dict[str, int]) -> None:
        """Take over counts from ``state``."""
        self.in_row = state["in_row"]
        self.total = state["total"]
