"""GOAT experts: LoRA experts that start from chunks of the SVD of the frozen weight.

    W = U S V^T, cut into E segments of floor(min(O, I) / E) singular values; expert e
    takes the first r of segment e:

    A_e = diag(sqrt(S / (s rho))) V^T    B_e = U diag(sqrt(S / (s rho)))
    delta_e = s B_e A_e - C    C = init_cof * s * sum_j B_j A_j at the start

with s = alpha / r.

Reference: Fan et al. 2025, arXiv:2502.16894; with ``init_cof`` 1 / E and rho 10 as in
the authors' scripts. They subtract C from the stored weight; here it is a frozen term
of the bank, so that the base is never changed. With gates that sum to one both are the
same; where they sum to less, what is missing falls to the base.

The update is not zero at the start, but small where gates are even: C is what even
gates add.

Shape legend: see base.py; R = E r rows of the start.
"""

from typing import Literal

import pydantic
import torch
from torch import Tensor, nn

from molora.errors import WrapError
from molora.experts.base import EXPERTS, ExpertsConfig
from molora.experts.start import StartedExperts, require_values


@EXPERTS.register("goat", paper="arXiv:2502.16894")
class GOATExperts(StartedExperts):
    """LoRA experts initialised from segments of the base weight's spectrum.

    Limitations: an SVD of every target weight when a model is wrapped or loaded; as
    factors for collapse and export each expert has rank r + R.

    Args:
        config: Settings.
        in_features: I.
        out_features: O.
        generator: Not drawn from: the base weight gives the values.
    """

    class Config(ExpertsConfig):
        """Settings of GOAT experts."""

        kind: Literal["goat"] = "goat"
        """Registered name."""
        r: int = pydantic.Field(default=4, ge=1)
        """Rank of one expert."""
        lora_alpha: float = pydantic.Field(default=32.0, gt=0)
        """Numerator of the scale s = lora_alpha / r."""
        lora_dropout: float = pydantic.Field(default=0.0, ge=0, lt=1)
        """Dropout on the bank's input in training, one mask for all experts."""
        rho: float = pydantic.Field(default=10.0, gt=0)
        """Divides the singular values of the start."""
        init_cof: float | None = pydantic.Field(default=None, ge=0)
        """Share of the start that the base is corrected by; None means 1 / E."""

    starts_at_zero = False
    frozen = ("A_start", "Bt_start")

    def __init__(
        self,
        config: Config,
        *,
        in_features: int,
        out_features: int,
        generator: torch.Generator,
    ):
        super().__init__()
        E, r = config.num_experts, config.r
        if r > min(in_features, out_features) // E:
            raise WrapError(
                f"experts.r={r}: {E} experts cut the {min(in_features, out_features)} "
                f"singular values of a layer into segments of "
                f"{min(in_features, out_features) // E}; lower r or num_experts"
            )
        self.config = config
        self.num_experts = E
        self.lora_dropout = config.lora_dropout
        self.scale = config.lora_alpha / r
        self.A = nn.Parameter(torch.zeros(E, r, in_features))
        self.Bt = nn.Parameter(torch.zeros(E, r, out_features))
        share = 1 / E if config.init_cof is None else config.init_cof
        self.add_correction((E * r, in_features, out_features), -self.scale * share)

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        """See base class."""
        require_values(weight, "experts.kind goat")
        E, r = self.num_experts, self.config.r
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        U_OM, S_M, Vt_MI = torch.linalg.svd(wide, full_matrices=False)
        step = len(S_M) // E
        rows_R = torch.cat([torch.arange(e * step, e * step + r) for e in range(E)])
        rows_R = rows_R.to(weight.device)
        root_R1 = (S_M[rows_R] / (self.scale * self.config.rho)).sqrt().unsqueeze(1)
        self.keep_start(root_R1 * Vt_MI[rows_R], root_R1 * U_OM.t()[rows_R])
        self.A.copy_(self.A_start.view_as(self.A))
        self.Bt.copy_(self.Bt_start.view_as(self.Bt))

    def own(self) -> tuple[Tensor, Tensor, float | Tensor]:
        """See base class."""
        return self.A, self.Bt, self.scale

    def count(self) -> int:
        """See base class; the start is not trained."""
        return self.A.numel() + self.Bt.numel()
