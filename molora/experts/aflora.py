"""AFLoRA experts: the form of VeRA with projections of their own, trained at first.

    delta_e(x) = s_u_e * (B_e (s_d_e * (A_e x)))

A and B start as in VeRA, s_d (``lambda_d``) at 0.1, s_u (``lambda_b``) at zero. The
vectors are always trained; A and B are frozen one after the other by a schedule, or
from the start with ``trainability: {A: frozen, B: frozen}``, which the authors do for
square layers.

Reference: Liu et al. 2024, arXiv:2403.13269, equation 1.

Shape legend: see base.py.
"""

from typing import Literal

import pydantic

from molora.experts.base import EXPERTS
from molora.experts.vera import VeRAExperts


@EXPERTS.register("aflora", paper="arXiv:2403.13269")
class AFLoRAExperts(VeRAExperts):
    """E pairs of vectors around trained projections.

    Limitations: as VeRA; the schedule that freezes A and B belongs to training.
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
        trainability: dict[str, Literal["frozen", "seeded", "masked"]] = {}
        """See base class."""
