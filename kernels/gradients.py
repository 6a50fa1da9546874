"""Which gradients a backward is asked for, and what it returns."""

from typing import NamedTuple

from torch import Tensor


class Needs(NamedTuple):
    """Whether each differentiable argument needs its gradient."""

    x: bool
    A: bool
    Bt: bool
    gates: bool


class Gradients(NamedTuple):
    """A gradient per differentiable argument, None where it was not needed."""

    x: Tensor | None
    A: Tensor | None
    Bt: Tensor | None
    gates: Tensor | None
