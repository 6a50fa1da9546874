"""Fixed random maps from P values to N >= P, drawn from a seed and never trained.

    random      y = F x                         F [N, P] ~ N(0, 1 / N)
    fastfood    y = (H G Pi H B x)[:N] / sqrt(N d)    d the power of two >= N

with x padded by zeros to d, B random signs, Pi a permutation, G ~ N(0, 1) on a diagonal
and H the Walsh-Hadamard matrix of ones and minus ones. Both are linear, and keep the
squared norm in expectation over their draw.

Reference: Le et al. 2013 (Fastfood); Chen et al. 2024 (SuperLoRA), arXiv:2403.11887.

Legend: N out, P in, d padded size
"""

import math

import torch
from torch import Tensor, nn


class FixedProjection(nn.Module):
    """Map the last axis of a tensor from P to N, and shuffle it.

    Nothing of it is saved: the same seed and sizes give the same map with the same
    version of torch.

    Args:
        kind: ``random``, ``fastfood``, or None for the identity (N = P).
        shuffle: Whether the N values are permuted afterwards.
        ins: P.
        outs: N.
        seed: Of the draw.
    """

    signs: Tensor
    gains: Tensor
    order: Tensor
    matrix: Tensor
    places: Tensor

    def __init__(self, kind: str | None, shuffle: bool, ins: int, outs: int, seed: int):
        super().__init__()
        self.kind, self.shuffle, self.ins, self.outs = kind, shuffle, ins, outs
        draw = torch.Generator().manual_seed(seed)
        fixed: dict[str, Tensor] = {}
        if kind == "random":
            fixed["matrix"] = torch.randn(outs, ins, generator=draw) / math.sqrt(outs)
        if kind == "fastfood":
            d = 1 << (outs - 1).bit_length()
            fixed["signs"] = torch.randint(2, (ins,), generator=draw) * 2.0 - 1
            fixed["order"] = torch.randperm(d, generator=draw)
            fixed["gains"] = torch.randn(d, generator=draw)
        if shuffle:
            fixed["places"] = torch.randperm(outs, generator=draw)
        for name, values in fixed.items():
            self.register_buffer(name, values, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., P] to [..., N]."""
        if self.kind == "random":
            x = x @ self.matrix.to(x.dtype).t()
        if self.kind == "fastfood":
            d = len(self.order)
            mixed = nn.functional.pad(x * self.signs.to(x.dtype), (0, d - self.ins))
            mixed = hadamard(mixed)[..., self.order] * self.gains.to(x.dtype)
            x = hadamard(mixed)[..., : self.outs] / math.sqrt(self.outs * d)
        return x[..., self.places] if self.shuffle else x


def hadamard(x: Tensor) -> Tensor:
    """H x along the last axis, of a size d that is a power of two; not normalised."""
    d = left = x.shape[-1]
    y = x.reshape(-1, d)
    while left > 1:
        # H_d is the Kronecker product of smaller ones: multiply the last axis, and put
        # it to the front, so that the next one is last
        size = min(left, 64)
        y = y.reshape(len(y), d // size, size) @ _matrix(size, x)
        y, left = y.transpose(1, 2).flatten(1), left // size
    return y.view(x.shape)


def _matrix(size: int, like: Tensor) -> Tensor:
    """H of one factor, by Sylvester's construction."""
    made = like.new_ones(1, 1)
    while len(made) < size:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made
