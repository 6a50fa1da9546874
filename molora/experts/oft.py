"""OFT experts: each one rotates what the layer reads, block by block.

    y = W (x + sum_e g_e (x R_e - x)) + b    R_e = blockdiag(R_e1 .. R_ek)

    exact:    R = (I - Q)(I + Q)^-1                          Q = U - U^T
    Neumann:  R = I + 2 Q + 2 Q^2 + .. + 2 Q^(t-2) + Q^(t-1)

Reference: Qiu et al. 2023, arXiv:2306.07280 (OFT, COFT); Qiu et al. 2025,
arXiv:2506.19847 (rotating the input, Cayley-Neumann); PEFT's conventions. One expert
with gate 1 is OFT with the merged weight W R^T. With ``side: output`` the weight is
R_e W, of the output without its bias.

The two branches turn opposite ways: the series of t terms tends to (I + Q)(I - Q)^-1,
which is the transpose of the exact R for the same Q. So ``use_cayley_neumann`` belongs
to trained values, and is saved with them. As in PEFT, t = 2 is I + 2 Q, and t = 3 is
the same as t = 4. Only the exact R is a rotation; the series is one up to ||Q||^(t-1).

COFT holds ||Q||_F of each of the k blocks within eps / sqrt(k): every forward in
training shrinks the parameter itself, outside autograd (projected gradient descent).

Shape legend: see base.py; n features that are rotated (I or O)   k blocks   b block
size.
"""

from collections.abc import Mapping
from typing import Any, Literal, Self

import pydantic
import torch
from torch import Tensor, nn

from molora.errors import WrapError
from molora.experts.base import EXPERTS, AbstractExperts, ExpertsConfig
from molora.experts.gated_sum import gated_sum
from molora.experts.peft_form import PeftForm

_TERMS, _EPS = 5, 6e-5
"""PEFT's defaults."""


@EXPERTS.register("oft", paper="arXiv:2306.07280")
class OFTExperts(AbstractExperts):
    """E block-diagonal rotations of the layer's input (or output).

    The frozen layer runs once, on the mixed input, so that a quantised one stays as it
    is. All rotations start as the identity.

    Limitations: the update has full rank, so a mixture has no low-rank collapse.
    Without a gradient R - I is kept, twice the bytes of the parameters, until they
    change (kept.py). With coft the parameter changes in forward, so a forward repeated
    by activation checkpointing reads it projected once more, the same up to rounding.

    Args:
        config: Settings.
        in_features: I.
        out_features: O.
        generator: Not drawn from: every rotation starts as the identity.

    Raises:
        WrapError: The blocks do not fit the features.
    """

    class Config(ExpertsConfig):
        """Settings of OFT experts."""

        kind: Literal["oft"] = "oft"
        """Registered name."""
        oft_block_size: int = pydantic.Field(default=32, ge=0)
        """Features of one block; 0 where r is given."""
        r: int = pydantic.Field(default=0, ge=0)
        """Number of blocks; 0 where oft_block_size is given."""
        use_cayley_neumann: bool = True
        """Take the series in place of the exact inverse; it turns the other way."""
        num_cayley_neumann_terms: int = pydantic.Field(default=_TERMS, ge=2)
        """Terms t of the series; one alone would be the identity."""
        coft: bool = False
        """Hold every rotation near the identity."""
        eps: float = pydantic.Field(default=_EPS, gt=0)
        """How far coft lets the blocks go together."""
        block_share: bool = False
        """One block for all places."""
        side: Literal["input", "output"] = "input"
        """What is rotated: the layer's input (PEFT), or its output without the bias
        (LyCORIS)."""

        @pydantic.model_validator(mode="after")
        def _all_are_read(self) -> Self:
            if (self.r == 0) == (self.oft_block_size == 0):
                raise ValueError(
                    "give r or oft_block_size, and set the other to 0: "
                    "r * oft_block_size is the number of features"
                )
            if self.eps != _EPS and not self.coft:
                raise ValueError("eps is read with coft: true only")
            given = self.num_cayley_neumann_terms != _TERMS
            if given and not self.use_cayley_neumann:
                raise ValueError(
                    "num_cayley_neumann_terms is read with use_cayley_neumann: true "
                    "only"
                )
            return self

    peft_type = "OFT"

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
        self.on_input = config.side == "input"
        wide = in_features if self.on_input else out_features
        name = "oft_block_size" if config.oft_block_size else "r"
        given = config.oft_block_size or config.r
        check_divides(f"experts.{name}={given}", given, wide, config.side)
        self.block = config.oft_block_size or wide // config.r
        self.blocks = wide // self.block
        if self.block == 1:
            raise WrapError(
                f"experts.{name}={given}: blocks of one feature cannot rotate; for a "
                f"layer of {wide} {config.side} features set oft_block_size to one of "
                f"{near_divisors(2, wide)}, and r to 0"
            )
        stored = 1 if config.block_share else self.blocks
        upper = self.block * (self.block - 1) // 2
        self.upper = nn.Parameter(torch.zeros(self.num_experts, stored, upper))

    def edit_input(
        self, x: Tensor, gates: Tensor | None, top_k: int | None = None
    ) -> Tensor:
        """See base class."""
        if not self.on_input:
            return x
        return (x + self._change(x, gates, top_k)).to(x.dtype)

    def forward(
        self,
        x: Tensor,
        gates: Tensor | None,
        base: Tensor,
        top_k: int | None = None,
    ) -> Tensor:
        """See base class."""
        if self.on_input:
            return base
        bias_O = self.frozen_bias()
        plain_TO = base if bias_O is None else base - bias_O
        return (base + self._change(plain_TO, gates, top_k)).to(base.dtype)

    def _change(
        self, values_Tn: Tensor, gates: Tensor | None, top_k: int | None
    ) -> Tensor:
        """sum_e g_e (values R_e - values), of the output with R_e^T."""
        turns = self.kept(self.turns)
        turns = turns if self.on_input else turns.mT
        return gated_sum(turned, values_Tn, [turns], gates, top_k)

    def turns(self) -> Tensor:
        """R - I, [E, k, b, b], at least float32."""
        upper = self.upper.to(torch.promote_types(self.upper.dtype, torch.float32))
        if self.config.coft:
            upper = self._held(upper)
        with torch.autocast(upper.device.type, enabled=False):
            Q = skew(upper, self.block)
            terms = self.config.num_cayley_neumann_terms
            neumann = self.config.use_cayley_neumann
            turns = neumann_turn(Q, terms) if neumann else cayley_turn(Q)
        return turns.expand(-1, self.blocks, -1, -1)

    def _held(self, upper: Tensor) -> Tensor:
        """The parameter within its bounds; its gradient is that of the bounded one."""
        bound = self.config.eps / upper.shape[1] ** 0.5
        with torch.no_grad():
            # each value stands twice in Q
            norm = upper.norm(dim=-1, keepdim=True) * 2**0.5
            held = torch.where(norm > bound, upper * (bound / norm), upper)
            if self.training:
                self.upper.copy_(held)
        return upper + (held - upper).detach()

    def delta_weight(self, expert: int, weight: Tensor) -> Tensor:
        """See base class: W R^T - W, or R W - W of the output."""
        turn = self.turns()[expert].detach().to(weight.dtype).mT
        return turned(weight, turn) if self.on_input else turned(weight.t(), turn).t()

    def count(self) -> int:
        """See base class: E n (b - 1) / 2, or E b (b - 1) / 2 with block_share."""
        return self.upper.numel()

    def to_peft(self, expert: int) -> PeftForm:
        """See base class."""
        if not self.on_input:
            raise WrapError(
                "experts.side=output: PEFT's OFT rotates the input; merge instead"
            )
        r = self.config.r
        settings = {"r": r, "oft_block_size": 0 if r else self.block}
        for name in _SHARED_SETTINGS:
            settings[name] = getattr(self.config, name)
        upper = self.upper[expert].detach().clone()
        return PeftForm("OFT", settings, {"oft_R.weight": upper})

    @classmethod
    def from_peft(
        cls,
        settings: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        in_features: int,
        out_features: int,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See base class. The flag of the branch has to stand in the settings."""
        missing = [name for name in _SHARED_SETTINGS if name not in settings]
        if missing:
            raise WrapError(
                f"the OFT adapter does not say {', '.join(missing)}; without "
                "use_cayley_neumann its rotations could be their inverses. Save it "
                "again with PEFT 0.18 or later"
            )
        upper = tensors["oft_R.weight"]
        # b (b - 1) / 2 values give b, also where PEFT adjusted the setting
        block = int((1 + (1 + 8 * upper.shape[1]) ** 0.5) / 2)
        experts: dict[str, Any] = {"kind": "oft", "r": 0, "oft_block_size": block}
        if settings.get("r") and settings["r"] * block == in_features:
            experts |= {"r": settings["r"], "oft_block_size": 0}
        for name in _SHARED_SETTINGS:
            experts[name] = settings[name]
        # PEFT writes these also where nothing reads them
        if not settings["coft"]:
            del experts["eps"]
        if not settings["use_cayley_neumann"]:
            del experts["num_cayley_neumann_terms"]
        return experts, {"upper": upper.unsqueeze(0)}


_SHARED_SETTINGS = (
    "use_cayley_neumann",
    "num_cayley_neumann_terms",
    "coft",
    "eps",
    "block_share",
)


def turned(values_Tn: Tensor, turn_kbb: Tensor) -> Tensor:
    """Values times a block-diagonal matrix, [T, n]."""
    k, b, _ = turn_kbb.shape
    parts_kTb = values_Tn.unflatten(-1, (k, b)).transpose(0, 1)
    return torch.bmm(parts_kTb, turn_kbb).transpose(0, 1).flatten(1)


def skew(upper: Tensor, block: int) -> Tensor:
    """Q = U - U^T [.., b, b] from the strict upper triangle of U, row by row."""
    i, j = torch.triu_indices(block, block, 1, device=upper.device)
    flat = upper.new_zeros(*upper.shape[:-1], block * block)
    U: Tensor = flat.index_copy(-1, i * block + j, upper).unflatten(-1, (block, block))
    return U - U.mT


def cayley_turn(Q: Tensor) -> Tensor:
    """R - I = -2 Q (I + Q)^-1 of R = (I - Q)(I + Q)^-1."""
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    turn: Tensor = torch.linalg.solve(eye + Q, -2 * Q, left=False)
    return turn


def neumann_turn(Q: Tensor, terms: int) -> Tensor:
    """R - I of the series of t terms, which turns the other way than the exact R."""
    if terms == 2:
        return 2 * Q
    power, total = Q, 2 * Q
    for _ in range(max(terms, 4) - 3):
        power = power @ Q
        total = total + 2 * power
    return total + power @ Q


def check_divides(setting: str, given: int, wide: int, side: str) -> None:
    """Refuse a block size or a number of blocks that does not divide the features."""
    if wide % given:
        raise WrapError(
            f"{setting} does not divide the {wide} {side} features of the layer; "
            f"near it do {near_divisors(given, wide)}"
        )


def near_divisors(given: int, wide: int) -> str:
    """Up to six divisors from 2 on that are near a number, in words."""
    found = [d for d in range(2, wide + 1) if wide % d == 0]
    near = sorted(sorted(found, key=lambda d: abs(d - given))[:6])
    return ", ".join(map(str, near))
