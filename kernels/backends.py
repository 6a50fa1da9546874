"""The backends by name; a module is imported when it is first used."""

import functools
import importlib
import importlib.util
from typing import NamedTuple, Protocol

from torch import Tensor

from molora.kernels.gradients import Gradients, Needs


class Path(Protocol):
    """What the module of a backend defines."""

    def why_not(
        self,
        x: Tensor,
        A: Tensor,
        Bt: Tensor,
        gates: Tensor | None,
        scale: float | Tensor,
        base: Tensor | None,
        top_k: int | None,
    ) -> list[str]:
        """Every reason against a call, in words a user understands."""

    def forward(
        self,
        x: Tensor,
        base: Tensor | None,
        A: Tensor,
        Bt: Tensor,
        gates: Tensor | None,
        scale: float | Tensor,
        top_k: int | None,
        dropout: float,
        seed: int,
    ) -> tuple[Tensor, Tensor]:
        """Result, and what backward needs beside the arguments."""

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        z: Tensor,
        A: Tensor,
        Bt: Tensor,
        gates: Tensor | None,
        scale: float | Tensor,
        top_k: int | None,
        dropout: float,
        seed: int,
        needs: Needs,
        onto: Tensor | None = None,
    ) -> Gradients:
        """Gradients that are needed; that of x plus onto, which is not changed."""


class Backend(NamedTuple):
    """One way to compute the op."""

    module: str
    """Module that defines it."""
    needs: str | None = None
    """Package that the module imports and that may be missing."""

    def load(self) -> Path:
        """Import the module."""
        return _load(self.module)

    def is_installed(self) -> bool:
        """Whether the package that the module needs is there."""
        return self.needs is None or is_installed(self.needs)

    def why_not(
        self,
        x: Tensor,
        A: Tensor,
        Bt: Tensor,
        gates: Tensor | None,
        scale: float | Tensor,
        base: Tensor | None,
        top_k: int | None,
    ) -> list[str]:
        """Every reason against a call, a missing package among them."""
        if not self.is_installed():
            return [f"the package {self.needs} is not installed"]
        return self.load().why_not(x, A, Bt, gates, scale, base, top_k)


@functools.cache
def _load(module: str) -> Path:
    path: Path = importlib.import_module(module)
    return path


@functools.cache
def is_installed(package: str) -> bool:
    """Whether a package is there."""
    return importlib.util.find_spec(package) is not None


BACKENDS: dict[str, Backend] = {
    "torch": Backend("molora.kernels.torch_path"),
    "sorted": Backend("molora.kernels.sorted_path"),
    "gather": Backend("molora.kernels.gather_path"),
    "triton": Backend("molora.kernels.triton_dense", "triton"),
    "triton_grouped": Backend("molora.kernels.triton_grouped", "triton"),
    "triton_gather": Backend("molora.kernels.triton_gather", "triton"),
    "reference": Backend("molora.kernels.reference"),
}
"""Every backend; which of them ``auto`` takes is in choice.py."""
