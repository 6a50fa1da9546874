"""What a bank of experts must provide, and what it gets for free.

Shape legend (this folder)
    T tokens   E experts   I in features   O out features   r rank of one expert
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import pydantic
import torch
from torch import Tensor

from molora.errors import WrapError
from molora.experts.peft_form import PeftForm
from molora.kept import Keeping
from molora.kernels import Layer, lowrank_mixture
from molora.registry import Registry
from molora.schema import Schema


class ExpertsConfig(Schema):
    """Settings of every expert family."""

    kind: str
    """Registered name."""
    num_experts: int = pydantic.Field(default=1, ge=1)
    """E, experts per target layer."""

    def adapted(self) -> "ExpertsConfig":
        """Settings of the family inside one that goes around others; else its own."""
        return self


class AbstractExperts(Keeping, abc.ABC):
    """E updates of one frozen layer.

    A family supplies ``forward`` and ``delta_weight``, and ``edit_input`` and
    ``delta_bias`` where it acts there; a bilinear one derives from ``BilinearExperts``
    and supplies ``factors`` only. One that begins from the frozen weight supplies
    ``start``.
    """

    Config: ClassVar[type[ExpertsConfig]]
    takes_layer: ClassVar[bool] = False
    """Whether ``forward`` also takes the frozen layer itself in place of its output;
    ``edit_input`` then changes nothing."""
    starts_at_zero: bool = True
    """Whether the update is zero before training."""
    frozen: tuple[str, ...] = ()
    """Parameters of its own that are saved and never trained."""
    linear: ClassVar[bool] = True
    """Whether an expert is a change of weight and bias, so that it can be merged."""
    adds: ClassVar[bool] = False
    """Whether ``forward`` adds a term that does not depend on ``base``, so that the
    term may stand in a sum of families."""
    reads_kernel: ClassVar[bool] = False
    """Whether it takes the sizes of a convolution's window as ``kernel``, and
    ``from_peft`` does."""
    peft_type: ClassVar[str | None] = None
    """Name of the method in PEFT; None where PEFT has it not."""
    num_experts: int
    in_nf4: bool = False
    """Whether the frozen layer is held in NF4; the bank sets it."""
    frozen_weight: Callable[[], Tensor]
    """Gives the frozen weight [O, I], dequantised; the bank sets it."""
    frozen_bias: Callable[[], Tensor | None]
    """Gives the frozen bias [O], if there is one; the bank sets it."""
    frozen_sources: Callable[[], list[Tensor]]
    """Gives every tensor that the frozen weight is made of; the bank sets it."""

    def start(self, weight: Tensor) -> None:
        """Take initial values from the frozen weight [O, I]; most families take none.

        Args:
            weight: In the dtype of the frozen layer.
        """
        return None

    def edit_input(
        self, x: Tensor, gates: Tensor | None, top_k: int | None = None
    ) -> Tensor:
        """Change what the frozen layer reads; x itself where nothing changes.

        Args:
            x: [T, I] inputs, which the router has read.
            gates: [T, E]; None means one expert with gate 1.
            top_k: As in ``forward``.

        Returns:
            [T, I] in the dtype of x.
        """
        return x

    def adapted(self) -> "AbstractExperts":
        """The experts inside these, where the family goes around others."""
        return self

    @abc.abstractmethod
    def forward(
        self,
        x: Tensor,
        gates: Tensor | None,
        base: Tensor,
        top_k: int | None = None,
    ) -> Tensor:
        """Add the gated updates to the base output.

        Args:
            x: [T, I] inputs.
            gates: [T, E]; None means one expert with gate 1.
            base: [T, O] output of the frozen layer for the edited input.
            top_k: At most so many gates of a token are not zero, and the gradient of
                the others is not read; None promises nothing.

        Returns:
            [T, O] in the dtype of base.
        """

    @abc.abstractmethod
    def delta_weight(self, expert: int, weight: Tensor) -> Tensor:
        """Dense update of one expert with its scale.

        Args:
            expert: Its number.
            weight: [O, I] of the frozen layer, which some families scale.

        Returns:
            [O, I], at least float32.
        """

    def delta_bias(self, expert: int, bias: Tensor) -> Tensor | None:
        """What one expert adds to the bias [O] of the frozen layer; None: nothing."""
        return None

    def restored(self) -> Tensor | None:
        """What quantising took from the frozen weight and every expert holds, [O, I].

        None: nothing of it. On the weight from before it would count twice.
        """
        return None

    @abc.abstractmethod
    def count(self) -> int:
        """Number of values that this bank trains."""

    def to_peft(self, expert: int) -> PeftForm:
        """One expert in PEFT's own format of the method.

        Raises:
            WrapError: PEFT has no such method.
        """
        raise WrapError(f"PEFT has no format for {type(self).__name__}")

    @classmethod
    def from_peft(
        cls,
        settings: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        in_features: int,
        out_features: int,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Read one layer of a PEFT adapter.

        Args:
            settings: PEFT's config, patterns of the layer applied.
            tensors: By what follows the module path, as in ``PeftForm``, with those
                outside the layers beside them.
            in_features: I.
            out_features: O.

        Returns:
            The ``experts`` block of a bank of one expert, and its state dict.

        Raises:
            WrapError: PEFT has no such method, or a variant that is not this one.
        """
        raise WrapError(f"PEFT has no format for {cls.__name__}")


class Part(NamedTuple):
    """Factors of one summand of the update of every expert."""

    A: Tensor
    """[E or 1, r, I]."""
    Bt: Tensor
    """[E or 1, r, O]."""
    scale: float | Tensor
    """A number or [E]."""
    dropout: float = 0.0
    """Dropout on its input in training."""


class BilinearExperts(AbstractExperts):
    """Experts of the form delta_e(x) = scale_e * B_e (A_e x).

    Everything but the factors is derived here, once.
    """

    takes_layer = True
    adds = True
    lora_dropout: float = 0.0

    @abc.abstractmethod
    def factors(self) -> tuple[Tensor, Tensor, float | Tensor]:
        """Return A [E or 1, r, I], Bt [E or 1, r, O], scale (number or [E])."""

    def forward(
        self,
        x: Tensor,
        gates: Tensor | None,
        base: Tensor | Layer | None,
        top_k: int | None = None,
    ) -> Tensor:
        """See base class. One dropout mask serves all experts.

        Given the layer, a function of x that gives [T, O], backward writes the gradient
        of x once for both. Given None, the result is the update alone.
        """
        return mixed(self.parts(), x, gates, base, top_k, self.training)

    def parts(self) -> list[Part]:
        """Summands that together are the factors, where dropout is not on all."""
        return [Part(*self.factors(), self.lora_dropout)]

    def scales(self) -> list[float]:
        """Scale of each expert."""
        scale = self.factors()[2]
        if isinstance(scale, Tensor):
            return [float(s) for s in scale]
        return [scale] * self.num_experts

    def expert_factors(self, expert: int) -> tuple[Tensor, Tensor]:
        """A [r, I] and scale * B^T [r, O] of one expert, float32, detached."""
        A, Bt, _ = self.factors()
        a_rI = A[expert % A.shape[0]].detach().float()
        b_rO = Bt[expert % Bt.shape[0]].detach().float()
        return a_rI, self.scales()[expert] * b_rO

    def delta_weight(self, expert: int, weight: Tensor | None = None) -> Tensor:
        """See base class; the frozen weight is not read."""
        A, Bt, _ = self.factors()
        wide = torch.promote_types(A.dtype, torch.float32)
        a_rI = A[expert % A.shape[0]].detach().to(wide)
        b_rO = Bt[expert % Bt.shape[0]].detach().to(wide)
        return self.scales()[expert] * (b_rO.t() @ a_rI)


def mixed(
    parts: Sequence[Part],
    x: Tensor,
    gates: Tensor | None,
    base: Tensor | Layer | None,
    top_k: int | None,
    training: bool,
) -> Tensor:
    """Add gated low-rank parts to the base output; see ``BilinearExperts.forward``."""
    for A, Bt, scale, dropout in parts:
        mine = gates
        if gates is not None and A.shape[0] == Bt.shape[0] == 1 < gates.shape[1]:
            # all experts have the same
            mine = gates.sum(-1, keepdim=True)
        base = lowrank_mixture(
            x,
            A,
            Bt,
            mine,
            scale,
            base,
            top_k=top_k if mine is gates else None,
            dropout=dropout if training else 0.0,
            seed=dropout_seed() if training and dropout else 0,
        )
    assert isinstance(base, Tensor)
    return base


def dropout_seed() -> int | Tensor:
    """Seed of one mask, of the global generator, which checkpointing rewinds."""
    drawn = torch.randint(2**62, ())
    # a compiled graph draws another one each time it runs
    return drawn if torch.compiler.is_compiling() else int(drawn)


EXPERTS: Registry[AbstractExperts] = Registry("expert family")
