"""Factors of a convolution: a core for its window, a matrix for each channel axis.

    T[o, (i, k)] = sum_pq t[p, q, k] a[p, o] b[q, i]    k: all positions of the window

What LyCORIS calls Tucker, and PEFT ``use_effective_conv2d`` (Hyeon-Woo et al. 2021,
arXiv:2108.06098, proposition 3; Yeh et al. 2023, arXiv:2309.14859).
"""

import math

import torch
from torch import Tensor

from molora.errors import WrapError


def cored(core: Tensor, b: Tensor) -> Tensor:
    """The core times the input side: t [..., p, q, k] and b [..., q, i] to [p, i k]."""
    return torch.einsum("...pqk,...qi->...pik", core, b).flatten(-2)


def core_size(asked: bool, kernel: tuple[int, ...]) -> int:
    """Positions of the window that a core has; 0 where there is no core.

    As in PEFT there is none for a window of one position.

    Raises:
        WrapError: It is asked for on a layer that has no window.
    """
    if asked and not kernel:
        raise WrapError(
            "experts.use_effective_conv2d: is for convolutions, and this layer has no "
            "window; set it to false in an override for this layer"
        )
    return math.prod(kernel) if asked and math.prod(kernel) > 1 else 0


def window_of(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Axes of a core's window as PEFT stores them: a window of one axis has two."""
    return kernel if len(kernel) > 1 else (*kernel, 1)
