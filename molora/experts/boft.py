"""BOFT experts: each one rotates what the layer reads, by m butterfly factors.

    y = W (x + sum_e g_e (x R_e - x)) + b    R_e = F_(m-1) .. F_1 F_0
    F_i = P_i blockdiag(C_i1 .. C_ik) P_i^T  C = (I - S)(I + S)^-1, S = (V - V^T) / 2

P_i brings together the halves of blocks that lie 2^i blocks' halves apart: of each
2^i b neighbours in the order (half, group) it makes groups of two halves. So a product
of m factors mixes 2^(m-1) b features.

PEFT adds a trained scale s per output, which leaves the bias alone:

    delta_e(x) = s_e * (W R_e^T x) - W x

With ``side: output`` it is s_e * (R_e W x) - W x.

Reference: Liu et al. 2023, arXiv:2311.06243, without s; PEFT's conventions. One expert
with gate 1 is BOFT with the merged weight s * (W R^T). PEFT warns and takes m = 1
where its CUDA extension is not built; here every m runs everywhere.

Shape legend: see base.py; n features that are rotated (I or O)   m factors   k blocks
b block size   c half a block   G = 2^i   N = n / (b G).
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal, Self

import pydantic
import torch
from torch import Tensor, nn

from molora.errors import WrapError
from molora.experts.base import EXPERTS, AbstractExperts, ExpertsConfig
from molora.experts.gated_sum import gated_sum
from molora.experts.magnitude import magnified
from molora.experts.oft import cayley_turn, check_divides, near_divisors, turned
from molora.experts.peft_form import PeftForm


@EXPERTS.register("boft", paper="arXiv:2311.06243")
class BOFTExperts(AbstractExperts):
    """E butterfly rotations of the layer's input (or output).

    All rotations start as the identity. With ``output_scale: false`` the frozen layer
    runs once, on the mixed input, so that a quantised one stays as it is.

    Limitations: with output_scale several experts have to run the frozen weight each,
    on the tokens that use them, and a quantised weight is dequantised for it (not with
    one expert, and not with side: output). The update has full rank, so a mixture has
    no low-rank collapse. Without a gradient C - I is kept, as large as the parameters,
    until they change (kept.py). PEFT reads m > 1 only where its CUDA extension is
    built. Of the b^2 stored values of a block b (b - 1) / 2 are free.

    Args:
        config: Settings.
        in_features: I.
        out_features: O.
        generator: Not drawn from: every rotation starts as the identity.

    Raises:
        WrapError: Blocks or factors do not fit the features.
    """

    class Config(ExpertsConfig):
        """Settings of BOFT experts."""

        kind: Literal["boft"] = "boft"
        """Registered name."""
        boft_block_size: int = pydantic.Field(default=4, ge=0)
        """Features of one block; 0 where boft_block_num is given."""
        boft_block_num: int = pydantic.Field(default=0, ge=0)
        """Number of blocks; 0 where boft_block_size is given."""
        boft_n_butterfly_factor: int = pydantic.Field(default=1, ge=1)
        """Factors m; one alone is block-diagonal."""
        output_scale: bool = True
        """Train PEFT's scale of every output; false is the paper's BOFT."""
        side: Literal["input", "output"] = "input"
        """What is rotated: the layer's input (PEFT), or its output without the bias
        (LyCORIS)."""

        @pydantic.model_validator(mode="after")
        def _one_is_given(self) -> Self:
            if (self.boft_block_num == 0) == (self.boft_block_size == 0):
                raise ValueError(
                    "give boft_block_size or boft_block_num, and set the other to 0: "
                    "boft_block_size * boft_block_num is the number of features"
                )
            return self

    peft_type = "BOFT"

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
        self.num_experts = E = config.num_experts
        self.on_input = config.side == "input"
        self.out_features = out_features
        wide = in_features if self.on_input else out_features
        block = _block_size(config, wide)
        shape = config.boft_n_butterfly_factor, wide // block, block, block
        self.V = nn.Parameter(torch.zeros(E, *shape))
        self.scale: nn.Parameter | None = None
        if config.output_scale:
            self.scale = nn.Parameter(torch.ones(E, out_features))

    def edit_input(
        self, x: Tensor, gates: Tensor | None, top_k: int | None = None
    ) -> Tensor:
        """See base class."""
        # scaled experts do not share a run of the frozen layer
        alone = self.scale is None or gates is None
        if not self.on_input or not alone:
            return x
        turns = self.kept(self.turns)
        return (x + gated_sum(change, x, [turns], gates, top_k)).to(x.dtype)

    def forward(
        self,
        x: Tensor,
        gates: Tensor | None,
        base: Tensor,
        top_k: int | None = None,
    ) -> Tensor:
        """See base class."""
        if self.on_input and self.scale is None:
            return base
        bias_O = self.frozen_bias()
        y = base
        if self.scale is not None:
            y = magnified(base, bias_O, gates, self.scale)
        scales = [] if self.scale is None else [self.scale]
        if not self.on_input:
            plain_TO = base if bias_O is None else base - bias_O
            parameters = [self.kept(self.turns).mT, *scales]
            y = y + gated_sum(_change_back, plain_TO, parameters, gates, top_k)
        elif gates is not None:
            parameters = [self.kept(self.turns), *scales]
            y = y + gated_sum(self._through, x, parameters, gates, top_k)
        return y.to(base.dtype)

    def _through(self, x_TI: Tensor, turns: Tensor, scale_O: Tensor) -> Tensor:
        """One expert's s * W (x R - x), [T, O]."""
        weight = self.frozen_weight().to(x_TI.dtype)
        return nn.functional.linear(change(x_TI, turns), weight) * scale_O

    def turns(self) -> Tensor:
        """C - I, [E, m, k, b, b], at least float32."""
        V = self.V.to(torch.promote_types(self.V.dtype, torch.float32))
        with torch.autocast(V.device.type, enabled=False):
            return cayley_turn((V - V.mT) / 2)

    def delta_weight(self, expert: int, weight: Tensor) -> Tensor:
        """See base class: s * (W R^T) - W, or s * (R W) - W of the output."""
        turns = self.turns()[expert].detach().to(weight.dtype)
        rows = weight if self.on_input else weight.t()
        delta = change(rows, turns.mT, back=True)
        delta = delta if self.on_input else delta.t()
        if self.scale is None:
            return delta
        scale_O1 = self.scale[expert].detach().unsqueeze(1).to(weight.dtype)
        return delta * scale_O1 + weight * (scale_O1 - 1)

    def count(self) -> int:
        """See base class: E m n b, and E O with output_scale."""
        return sum(parameter.numel() for parameter in self.parameters())

    def to_peft(self, expert: int) -> PeftForm:
        """See base class; where no scale is trained, PEFT's is 1."""
        if not self.on_input:
            raise WrapError(
                "experts.side=output: PEFT's BOFT rotates the input; merge instead"
            )
        V = self.V[expert].detach().clone()
        scale = V.new_ones(1, self.out_features)
        if self.scale is not None:
            scale = self.scale[expert].detach().clone()
        number = self.config.boft_block_num
        settings = {
            "boft_block_size": 0 if number else V.shape[-1],
            "boft_block_num": number,
            "boft_n_butterfly_factor": V.shape[0],
        }
        tensors = {"boft_R": V, "boft_s": scale.reshape(-1, 1)}
        note = None
        if len(V) > 1:
            note = (
                f"PEFT reads boft_n_butterfly_factor={len(V)} only where its CUDA "
                "extension (fbd) is built; elsewhere it warns, takes one factor, "
                "and loading fails with a size mismatch of boft_R"
            )
        return PeftForm("BOFT", settings, tensors, note=note)

    @classmethod
    def from_peft(
        cls,
        settings: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        in_features: int,
        out_features: int,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See base class. Sizes are those of the tensors.

        PEFT's setting of m may be larger than what it trained.
        """
        V, scale = tensors["boft_R"], tensors["boft_s"]
        number = int(settings.get("boft_block_num") or 0)
        experts = {
            "kind": "boft",
            "boft_block_size": 0 if number else V.shape[-1],
            "boft_block_num": number,
            "boft_n_butterfly_factor": V.shape[0],
            "output_scale": True,
        }
        return experts, {"V": V.unsqueeze(0), "scale": scale.reshape(1, -1)}


def change(
    values_Tn: Tensor,
    turns: Tensor,
    scale: Tensor | None = None,
    back: bool = False,
) -> Tensor:
    """Rotated values less the values, times a scale of each feature.

    Args:
        values_Tn: What is rotated.
        turns: C - I of every factor, [m, k, b, b].
        scale: [n]; None scales nothing.
        back: Apply the factors in the other order, so that transposed turns give R^T.
    """
    order = range(len(turns)) if back else reversed(range(len(turns)))
    total: Tensor | None = None
    for i in order:
        here = values_Tn if total is None else values_Tn + total
        moved = _factor(here, turns[i], i)
        total = moved if total is None else total + moved
    assert total is not None
    return total if scale is None else total * scale


_change_back = functools.partial(change, back=True)
"""With transposed turns, what R values is for columns of values."""


def _factor(values_Tn: Tensor, turn_kbb: Tensor, i: int) -> Tensor:
    """Values times F_i, less the values."""
    if i == 0:
        return turned(values_Tn, turn_kbb)
    b, G = turn_kbb.shape[-1], 2**i
    grouped_TNGhc = values_Tn.unflatten(-1, (-1, 2, G, b // 2)).transpose(2, 3)
    moved_Tn = turned(grouped_TNGhc.flatten(1), turn_kbb)
    moved_TNGhc: Tensor = moved_Tn.unflatten(-1, (-1, G, 2, b // 2))
    return moved_TNGhc.transpose(2, 3).flatten(1)


def _block_size(config: BOFTExperts.Config, wide: int) -> int:
    """Features of one block, where blocks and factors fit."""
    name = "boft_block_size" if config.boft_block_size else "boft_block_num"
    given = config.boft_block_size or config.boft_block_num
    check_divides(f"experts.{name}={given}", given, wide, config.side)
    block = config.boft_block_size or wide // config.boft_block_num
    if block == 1:
        raise WrapError(
            f"experts.{name}={given}: blocks of one feature cannot rotate; for a layer "
            f"of {wide} {config.side} features set boft_block_size to one of "
            f"{near_divisors(2, wide)}, and boft_block_num to 0"
        )
    most = 1
    while block % 2 == 0 and wide % (block * 2**most) == 0:
        most += 1
    if config.boft_n_butterfly_factor > most:
        odd = " (an odd block has no halves)" if block % 2 else ""
        raise WrapError(
            f"experts.boft_n_butterfly_factor={config.boft_n_butterfly_factor}: "
            f"{wide} {config.side} features in blocks of {block} take at most {most}"
            f"{odd}; the features have to be a multiple of the block times "
            "2^(factors - 1)"
        )
    return block
