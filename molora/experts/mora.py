"""MoRA experts: a square matrix between fixed maps that compress and decompress.

    delta_e(x) = D(M_e C(x))    M_e [n, n] = 0 at the start
    n = int(sqrt((I + O) r) + 1/2)

so that M_e has about the parameters of a LoRA of rank r, and full rank n. The scale is
1. C and D have no parameters; with q = floor(I / n) and m = I - n q (O for D):

    strided     C  x, continued by its own first values to ceil(I / n) blocks of n; the
                   sum of the blocks
    contiguous  C  sums of neighbours: m groups of q + 1, then n - m of q
    tiled       D  z, z, ... cut to O
    interleaved D  the first m values q + 1 times each, the others q times

    type 1 strided, tiled    2 contiguous, interleaved    3 contiguous, tiled
    type 4 strided, interleaved
    type 6 the blocks of x are not summed: each is turned by the rotary embedding of its
           number, M_e is applied to it, and all of them are put side by side and cut to
           O, or tiled; n is rounded down to an even number

C and D are linear and common to all experts, so sum_e g_e M_e C(x) is computed in the
small space. There is no type 5.

Reference: Jiang et al. 2024, arXiv:2405.12130, section 3 and appendix; numbering, sizes
and the rotary table (float32) as in the authors' code.

Shape legend: see base.py; n side of M, b blocks of x.
"""

import math
from typing import Literal

import pydantic
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from molora.errors import WrapError
from molora.experts.base import EXPERTS, AbstractExperts, ExpertsConfig
from molora.experts.gated_sum import gated_sum

_STRIDED, _TILED = (1, 4), (1, 3)


@EXPERTS.register("mora", paper="arXiv:2405.12130")
class MoRAExperts(AbstractExperts):
    """E square matrices between fixed maps.

    Limitations: n must not exceed I; where it exceeds O (large r on a narrow layer),
    the surplus rows of M reach no output. PEFT has no format for it.

    Args:
        config: Settings.
        in_features: I.
        out_features: O.
        generator: Not drawn from: M starts at zero.

    Raises:
        WrapError: r makes M wider than the input.
    """

    class Config(ExpertsConfig):
        """Settings of MoRA experts."""

        kind: Literal["mora"] = "mora"
        """Registered name."""
        r: int = pydantic.Field(default=8, ge=1)
        """Rank of the LoRA with as many parameters as M."""
        mora_type: Literal[1, 2, 3, 4, 6] = 6
        """How the input is compressed and the output decompressed."""

    adds = True

    def __init__(
        self,
        config: Config,
        *,
        in_features: int,
        out_features: int,
        generator: torch.Generator,
    ):
        super().__init__()
        self.config = config
        self.num_experts = config.num_experts
        self.in_features, self.out_features = in_features, out_features
        self.side = _side(config.r, in_features + out_features, config.mora_type)
        if not 1 <= self.side <= in_features:
            fits = [
                r
                for r in range(1, config.r)
                if _side(r, in_features + out_features, config.mora_type) <= in_features
            ]
            works = f"r up to {fits[-1]} works" if fits else "no r works, leave it out"
            raise WrapError(
                f"experts.r={config.r}: M of a layer from {in_features} to "
                f"{out_features} features would have side {self.side}, more than its "
                f"{in_features} inputs; {works}"
            )
        self.M = nn.Parameter(torch.zeros(self.num_experts, self.side, self.side))

    def forward(
        self,
        x: Tensor,
        gates: Tensor | None,
        base: Tensor,
        top_k: int | None = None,
    ) -> Tensor:
        """See base class."""
        small = gated_sum(_squared, self._compress(x), [self.M], gates, top_k)
        return (base + self._decompress(small)).to(base.dtype)

    def _compress(self, x_TI: Tensor) -> Tensor:
        """C: [T, I] to [T, n], for type 6 to [T, b n]."""
        if self.config.mora_type in _STRIDED:
            return self._blocks(x_TI).sum(1)
        if self.config.mora_type == 6:
            return _turned(self._blocks(x_TI)).flatten(1)
        more = self.in_features % self.side
        few = self.in_features // self.side
        first = x_TI[:, : more * (few + 1)].unflatten(1, (more, few + 1))
        rest = x_TI[:, more * (few + 1) :].unflatten(1, (self.side - more, few))
        return torch.cat([first.sum(2), rest.sum(2)], 1)

    def _blocks(self, x_TI: Tensor) -> Tensor:
        """[T, b, n], the input continued by its own beginning."""
        missing = -self.in_features % self.side
        whole = torch.cat([x_TI, x_TI[:, :missing]], 1) if missing else x_TI
        blocks: Tensor = whole.unflatten(1, (-1, self.side))
        return blocks

    def _decompress(self, small: Tensor) -> Tensor:
        """D: to [T, O]."""
        wide, kind = self.out_features, self.config.mora_type
        if kind == 6 or kind in _TILED:
            return small.repeat(1, -(-wide // small.shape[1]))[:, :wide]
        more = wide % self.side
        few = wide // self.side
        first = small[:, :more].repeat_interleave(few + 1, 1)
        return torch.cat([first, small[:, more:].repeat_interleave(few, 1)], 1)

    @torch.no_grad()
    def delta_weight(self, expert: int, weight: Tensor) -> Tensor:
        """See base class: D M C, whose columns are the images of unit vectors."""
        wide = torch.promote_types(self.M.dtype, torch.float32)
        eye_II = torch.eye(self.in_features, dtype=wide, device=self.M.device)
        small = _squared(self._compress(eye_II), self.M[expert].to(wide))
        return self._decompress(small).t()

    def count(self) -> int:
        """See base class."""
        return self.M.numel()


def _side(r: int, features: int, kind: int) -> int:
    side = int(math.sqrt(features * r) + 0.5)
    return side // 2 * 2 if kind == 6 else side


def _squared(z: Tensor, M_nn: Tensor) -> Tensor:
    """M applied to [T, n], or to each block of [T, b n]."""
    return F.linear(z.unflatten(1, (-1, M_nn.shape[0])), M_nn).flatten(1)


def _turned(blocks: Tensor) -> Tensor:
    """Rotary embedding of [T, b, n] by the number of the block."""
    count, side = blocks.shape[1:]
    even_h = torch.arange(0, side, 2, device=blocks.device).float() / side
    angle_bh = torch.outer(
        torch.arange(count, device=blocks.device).float(), 1 / 10000**even_h
    )
    angle_bn = torch.cat([angle_bh, angle_bh], 1)
    low, high = blocks.chunk(2, -1)
    cos, sin = angle_bn.cos().to(blocks.dtype), angle_bn.sin().to(blocks.dtype)
    return blocks * cos + torch.cat([-high, low], -1) * sin
