"""BiLoRA experts: a pseudo-SVD whose singular values are trained on other data.

    delta_e(x) = P_e diag(f(Lambda_e)) Q_e x    Q = A, P = B

    raw      f(v) = v
    softmax  f(v) = softmax(v) over the ranks
    sigmoid  f(v) = sigmoid(v), nearly binary

The two levels (P and Q on one part of the data, Lambda on another) and the
orthogonality loss are ``training.recipe`` bilora; without it all train together. There
is no scale.

With raw, P and Q are drawn from N(0, 0.02^2) and Lambda is zero. The others have no
zero: there P is zero, and Lambda is even.

Reference: Qiang et al. 2024, arXiv:2403.13037, section 3.2; no code was published, and
the start is that of AdaLoRA, whose form this is.

Shape legend: see base.py.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

import pydantic
from torch import Tensor

from molora.experts.base import EXPERTS
from molora.experts.diagonal import DiagonalExperts
from molora.experts.factor_config import FactorConfig, Side
from molora.experts.factors import normal


@EXPERTS.register("bilora", paper="arXiv:2403.13037")
class BiLoRAExperts(DiagonalExperts):
    """E pseudo-SVDs whose singular values form a second level.

    Args:
        config: Settings.
        in_features: I.
        out_features: O.
        generator: Source of the initial values.
        places: See ``FactorExperts``.
    """

    MIDDLE = "Lambda"

    class Config(FactorConfig):
        """Settings of BiLoRA experts."""

        TENSORS: ClassVar[Mapping[str, Side]] = {
            "A": "in",
            "B": "out",
            "Lambda": "rank",
        }

        kind: Literal["bilora"] = "bilora"
        """Registered name."""
        r: int = pydantic.Field(default=8, ge=1)
        """Rank of one expert."""
        singular_values: Literal["raw", "softmax", "sigmoid"] = "raw"
        """f, what the singular values are of Lambda."""

        def zero_tensors(self) -> tuple[str, ...]:
            """See base class."""
            return ("Lambda",) if self.singular_values == "raw" else ("B",)

    config: Config

    def build(self, in_features: int, out_features: int) -> None:
        """See base class."""
        config = self.config
        r, raw = config.r, config.singular_values == "raw"
        self.form = config.singular_values
        self.add("A", (r, in_features), normal(0.02))
        self.add("B", (r, out_features), normal(0.02) if raw else None)
        self.add("Lambda", (r,))

    def diagonal(self) -> Tensor:
        """See base class."""
        values = self.value("Lambda")
        if self.form == "raw":
            return values
        return values.softmax(-1) if self.form == "softmax" else values.sigmoid()
