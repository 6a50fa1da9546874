"""Experts with a diagonal between their factors, whose zeros are ranks not in use.

    delta_e(x) = s * B_e diag(d_e) A_e x

Shape legend: see base.py.
"""

import abc
from typing import ClassVar

import torch
from torch import Tensor

from molora.errors import WrapError
from molora.experts.factors import FactorExperts, with_middle


class DiagonalExperts(FactorExperts):
    """E triplets B diag(d) A with one scale."""

    MIDDLE: ClassVar[str]
    """Attribute that holds the diagonal, [E or 1, r]."""
    scale: float = 1.0

    @abc.abstractmethod
    def diagonal(self) -> Tensor:
        """Return d [E or 1, r]."""

    def factors(self) -> tuple[Tensor, Tensor, float | Tensor]:
        """See base class; the diagonal stands in one of the factors."""
        A, Bt = with_middle(self.value("A"), self.value("B"), self.diagonal())
        return A, Bt, self.scale

    def expert_factors(self, expert: int) -> tuple[Tensor, Tensor]:
        """See base class; ranks whose diagonal is zero are left out, one at least kept.

        Nothing changes by it.
        """
        A, Bt, diagonal = (
            whole[expert % len(whole)].detach().float()
            for whole in (self.value("A"), self.value("B"), self.diagonal())
        )
        live_r = diagonal != 0
        live_r[0] |= not live_r.any()
        b_rO = self.scale * diagonal.unsqueeze(1) * Bt
        return A[live_r], b_rO[live_r]

    @torch.no_grad()
    def mask_ranks(self, keep: Tensor) -> None:
        """Set the diagonal to zero where a rank is not kept.

        Args:
            keep: Bool, shaped as the diagonal.

        Raises:
            WrapError: It has another shape or is not bool.
        """
        middle = self._middle(keep)
        middle.mul_(keep)

    def _middle(self, keep: Tensor) -> Tensor:
        """The stored diagonal, once keep fits it."""
        owner = self._owners.get(self.MIDDLE, self)
        middle: Tensor = getattr(owner, self.MIDDLE)
        if keep.shape != middle.shape or keep.dtype != torch.bool:
            raise WrapError(
                f"mask_ranks: give a bool tensor {tuple(middle.shape)}, got "
                f"{keep.dtype} {tuple(keep.shape)}"
            )
        return middle
