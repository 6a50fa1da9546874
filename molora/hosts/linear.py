"""Linear layers: nn.Linear, the quantised ones of bitsandbytes, and GPT-2's Conv1D.

Shape legend: see base.py.
"""

import functools
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molora.hosts.base import Host
from molora.kernels import Layer, call_frozen

if TYPE_CHECKING:
    from molora.layer import MoloraLinear


class LinearHost(Host):
    """nn.Linear; the quantised layers of bitsandbytes are that too."""

    LAYERS: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    by_token = True

    def sizes(self, layer: Any) -> tuple[int, int]:
        """See base class."""
        return layer.in_features, layer.out_features

    def run(
        self,
        site: "MoloraLinear",
        x: Tensor,
        seen: Tensor | None,
        gates: Tensor | None,
        top_k: int | None,
    ) -> Tensor:
        """See base class."""
        x_TI = x.reshape(-1, site.in_features)
        y: Tensor = site.experts(
            x_TI, gates, base_of(site, x, x_TI, gates, top_k), top_k
        )
        return y

    def rows(self, layer: Any, y: Tensor) -> Tensor:
        """See base class."""
        return y.reshape(-1, y.shape[-1])

    def shaped(self, layer: Any, y: Tensor, x: Tensor) -> Tensor:
        """See base class."""
        return y.view(*x.shape[:-1], y.shape[-1])


class Conv1DHost(LinearHost):
    """GPT-2's Conv1D, a linear layer that stores its weight as [I, O]."""

    LAYERS: ClassVar[tuple[type[nn.Module], ...]] = (Conv1D,)

    def sizes(self, layer: Any) -> tuple[int, int]:
        """See base class."""
        return layer.weight.shape[0], layer.weight.shape[1]

    def weight_OI(self, weight: Tensor) -> Tensor:
        """See base class."""
        return weight.t()

    def stored(self, matrix_OI: Tensor, weight: Tensor) -> Tensor:
        """See base class."""
        return matrix_OI.t()


def base_of(
    site: "MoloraLinear",
    x: Tensor,
    x_TI: Tensor,
    gates: Tensor | None,
    top_k: int | None = None,
) -> Tensor | Layer:
    """Output of the frozen layer as [T, O], or that layer where experts call it."""
    differentiable = x.requires_grad and torch.is_grad_enabled()
    frozen = not any(p.requires_grad for p in site.base.parameters())
    if differentiable and site.experts.takes_layer and frozen:
        return functools.partial(_frozen, site, x.shape)
    edited_TI = site.experts.edit_input(x_TI, gates, top_k)
    y = call_frozen(site.base, x if edited_TI is x_TI else edited_TI.view(x.shape))
    return y.reshape(-1, site.out_features)


def _frozen(site: "MoloraLinear", shape: torch.Size, x_TI: Tensor) -> Tensor:
    """The frozen layer from [T, I] to [T, O]; it sees x as the model shaped it."""
    y = call_frozen(site.base, x_TI.view(shape))
    return y.reshape(-1, site.out_features)
