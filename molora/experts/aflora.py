"""AFLoRA experts: the form of VeRA with projections of their own, trained at first.

    delta_e(x) = s_u_e * (B_e (s_d_e * (A_e x)))

A and B start as in VeRA, s_d (``lambda_d``) at 0.1, s_u (``lambda_b``) at zero. The
vectors are always trained. A and B are frozen one after the other while training runs,
by the recipe ``aflora`` (training/recipes/aflora.py), or from the start with
``trainability: {A: frozen, B: frozen}``, which the authors do for square layers.

Reference: Liu et al. 2024, arXiv:2403.13269, equation 1.

Shape legend: see base.py.
"""

from typing import Literal

import pydantic

from molora.experts.base import EXPERTS
from molora.experts.factor_config import Trained
from molora.experts.vera import VeRAExperts


@EXPERTS.register("aflora", paper="arXiv:2403.13269")
class AFLoRAExperts(VeRAExperts):
    """E pairs of vectors around trained projections.

    Limitations: as VeRA. Without ``training.recipe: {kind: aflora}`` A and B are
    trained to the end.
    """

    peft_type = None

    class Config(VeRAExperts.Config):
        """Settings of AFLoRA experts."""

        kind: Literal["aflora"] = "aflora"  # type: ignore[assignment]
        """Registered name."""
        r: int = pydantic.Field(default=4, ge=1)
        """Rank of one expert."""
        shared: list[str] | dict[str, str] = []
        """See base class."""
        trainability: dict[str, Trained] = {}
        """See base class."""
