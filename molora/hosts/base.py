"""What a type of layer must tell so that a bank can sit on it.

Experts add to a linear map of I features to O. A host says what these are in its layer:
which rows the experts and the router read, how the output is put together, and how the
weight is a matrix [O, I].

Shape legend (this folder)
    T tokens   E experts   I in features   O out features   r rank of one expert
    R ranks of all experts   N batch   C channels   L output positions   V ids
"""

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from molora.experts import AbstractExperts, BilinearExperts
from molora.experts.base import ExpertsConfig
from molora.kernels import expand

if TYPE_CHECKING:
    from molora.context import ForwardContext
    from molora.layer import MoloraLinear


class Host(abc.ABC):
    """One type of layer; holds nothing, and is given the layer each time."""

    LAYERS: ClassVar[tuple[type[nn.Module], ...]]
    by_token: ClassVar[bool] = False
    """Whether the layer maps the last axis of its input, and x itself is what the
    experts read."""
    READS: ClassVar[str] = "rows"
    """What the layer reads, for messages."""
    SHOWN: ClassVar[tuple[str, ...]] = ()
    """Attributes of the layer that models read beside its weight; plain values."""
    PEFT: ClassVar[frozenset[str] | None] = None
    """Methods beside plain LoRA that PEFT has in the same form there; None: all."""
    LORA: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")
    """What PEFT calls the factors of a LoRA."""

    @abc.abstractmethod
    def sizes(self, layer: Any) -> tuple[int, int]:
        """I and O of the experts."""

    def width(self, layer: Any) -> int:
        """Features that the router reads."""
        return self.sizes(layer)[0]

    def kernel(self, layer: Any) -> tuple[int, ...]:
        """Sizes of the window whose C * k * k values are I; empty where there is none.

        PEFT splits C where a method takes I apart.
        """
        return ()

    def check(self, layer: Any, family: type[AbstractExperts]) -> None:
        """Refuse a layer or a family of experts that cannot be right there.

        Raises:
            WrapError: Says what would work.
        """
        return None

    def check_settings(self, settings: ExpertsConfig) -> None:
        """Refuse settings of experts that mean nothing there.

        Raises:
            WrapError: Names the field.
        """
        return None

    def begin(self, experts: AbstractExperts, generator: torch.Generator) -> None:
        """Give experts the start that they have on this type of layer."""
        return None

    def seen(self, layer: Any, x: Tensor) -> Tensor:
        """What the router reads, [..., features], by the layer's input."""
        return x

    def line_up(self, seen: Tensor, context: "ForwardContext", path: str) -> None:
        """Refuse tokens that the mask of the forward does not tell apart.

        Raises:
            RoutingError: They are not the positions of the batch.
        """
        return None

    @abc.abstractmethod
    def run(
        self,
        site: "MoloraLinear",
        x: Tensor,
        seen: Tensor | None,
        gates: Tensor | None,
        top_k: int | None,
    ) -> Tensor:
        """Base output plus update, [T, O].

        Args:
            site: The layer with its bank.
            x: Input of the layer.
            seen: What ``seen`` gave, where the router has read it.
            gates: [T, E]; None means one expert with gate 1.
            top_k: See ``AbstractExperts.forward``.
        """

    @abc.abstractmethod
    def rows(self, layer: Any, y: Tensor) -> Tensor:
        """The layer's output as [T, O]."""

    @abc.abstractmethod
    def shaped(self, layer: Any, y: Tensor, x: Tensor) -> Tensor:
        """[T, O] as the layer gives its output for x."""

    def weight_OI(self, weight: Tensor) -> Tensor:
        """The layer's weight as a matrix; a view."""
        return weight

    def stored(self, matrix_OI: Tensor, weight: Tensor) -> Tensor:
        """A matrix [O, I] in the shape of the layer's weight."""
        return matrix_OI

    def to_lora(self, layer: Any, a_rI: Tensor, b_Or: Tensor) -> dict[str, Tensor]:
        """Factors as PEFT names and shapes them."""
        return dict(zip(self.LORA, (a_rI, b_Or), strict=True))


def add_parts(
    experts: BilinearExperts,
    base: Tensor,
    gates: Tensor | None,
    shrink: Callable[[Tensor, float], Tensor],
    factor: float | Tensor = 1.0,
) -> Tensor:
    """Base plus the gated update of bilinear experts, by way of the rank space.

    Args:
        experts: Their parts are added one after the other.
        base: [T, O].
        gates: [T, E]; None means one expert with gate 1.
        shrink: Gives A x as [T, E * r or r] for A [E or 1, r, I] and a dropout.
        factor: Multiplies the update.

    Returns:
        [T, O] in the dtype of base.
    """
    T = len(base)
    for A, Bt, scale, dropout in experts.parts():
        mine = base.new_ones(T, 1, dtype=torch.float32) if gates is None else gates
        if A.shape[0] == Bt.shape[0] == 1 < mine.shape[1]:
            # all experts have the same
            mine = mine.sum(-1, keepdim=True)
        E = mine.shape[1]
        z_TR = shrink(A, dropout if experts.training else 0.0)
        if A.shape[0] < E:
            z_TR = z_TR.unsqueeze(1).expand(-1, E, -1).reshape(T, -1)
        base = expand(z_TR, Bt.expand(E, -1, -1), mine, scale * factor, base)
    return base
