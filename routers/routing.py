"""Where each token goes: what a router returns.

Shape legend: see base.py.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Where each token goes. Kernels, objectives and reports read only this."""

    gates: Tensor
    """[T, E], at least float32, zero where an expert is not used."""
    full: Tensor | None
    """[T, E] distribution before selection; None where it is softmax(logits)."""
    logits: Tensor
    """[T, E] after noise and temperature."""
    top_k: int | None
    """Experts that a token uses at most, where the router selects (E where their number
    varies); None: it uses all. The gate of an expert that was not selected is zero and
    nothing reads its gradient."""
    sparsity: Tensor | None = None
    """[T] lambda of LD-MoLE, which sets how many experts a token uses; else None."""
    rows: Tensor | None = None
    """[B, E] distribution of each row that ``full`` mixes with softmax(logits); None
    where it mixes nothing in."""

    @property
    def probs(self) -> Tensor:
        """[T, E] full distribution before selection, for the balance objectives."""
        return torch.softmax(self.logits, -1) if self.full is None else self.full

    def assigned(self) -> Tensor:
        """Experts whose load a token counts for: the chosen ones, else the likeliest.

        Returns:
            [T, E] in the dtype of the gates, 1 where the token counts, else 0.
        """
        gates_TE = self.gates.detach()
        if self.top_k is not None:
            return gates_TE.sign()
        top_T1 = self.probs.argmax(-1, keepdim=True)
        return torch.zeros_like(gates_TE).scatter_(-1, top_T1, 1.0)

    def load(self, weight_T: Tensor | None) -> Tensor:
        """Number of real tokens assigned to each expert, [E].

        Args:
            weight_T: 1 at real tokens, 0 at padding; None when all are real.
        """
        assigned_TE = self.assigned()
        if weight_T is None:
            return assigned_TE.sum(0)
        return weight_T.to(assigned_TE.dtype) @ assigned_TE

    def per_token(self, repeats: int) -> "Routing":
        """The routing of rows as that of their tokens, equally many each."""
        values: list[Any] = [
            value.repeat_interleave(repeats, 0) if isinstance(value, Tensor) else value
            for value in self
        ]
        return Routing(*values)
