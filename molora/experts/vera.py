"""VeRA experts: two vectors each, around one frozen pair of random projections.

    delta_e(x) = lambda_b_e * (B (lambda_d_e * (A x)))

A [r, I] and B [O, r] are those of the whole model, as wide as its widest target layer;
a layer reads the leading columns. They are drawn uniformly with bounds sqrt(6 / I) and
sqrt(6 / r). lambda_d is ``d_initial``, lambda_b is zero. There is no scale.

With ``trainability: {A: seeded, B: seeded}`` they are not saved but drawn again, from
``projection_prng_key`` and in the order of PEFT, so that folders that PEFT saved
without them load.

Reference: Kopiczko et al. 2023, arXiv:2310.11454, equation 2.

Shape legend: see base.py.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor

from molora.errors import WrapError
from molora.experts.base import EXPERTS
from molora.experts.factor_config import FactorConfig, Side, Trained
from molora.experts.factors import FactorExperts, uniform
from molora.experts.peft_form import PeftForm

_GAIN = 6**0.5


@EXPERTS.register("vera", paper="arXiv:2310.11454")
class VeRAExperts(FactorExperts):
    """E pairs of vectors that scale what shared random projections make of x.

    Limitations: B with the vectors of every expert folded in, [E, r, O], is made in
    every forward and kept for backward.

    Args:
        config: Settings.
        in_features: I.
        out_features: O.
        generator: Source of the initial values.
        places: See ``FactorExperts``.
    """

    peft_type: ClassVar[str | None] = "VERA"

    class Config(FactorConfig):
        """Settings of VeRA experts."""

        TENSORS: ClassVar[Mapping[str, Side]] = {
            "A": "in",
            "B": "out",
            "lambda_d": "rank",
            "lambda_b": "out",
        }
        ZERO: ClassVar[tuple[str, ...]] = ("lambda_b",)

        kind: Literal["vera"] = "vera"
        """Registered name."""
        r: int = pydantic.Field(default=256, ge=1)
        """Rank of the projections."""
        d_initial: float = 0.1
        """Start of lambda_d."""
        shared: list[str] | dict[str, str] = {"A": "model", "B": "model"}
        """See base class; the projections belong to the whole model."""
        trainability: dict[str, Trained] = {
            "A": "frozen",
            "B": "frozen",
        }
        """See base class; the projections are not trained."""

    config: Config

    def build(self, in_features: int, out_features: int) -> None:
        """See base class."""
        config = self.config
        r = config.r
        self.add("A", (r, in_features), uniform(self.features("A"), _GAIN))
        self.add("B", (r, out_features), _draw_up)
        self.add("lambda_d", (r,), lambda values, _: values.fill_(config.d_initial))
        self.add("lambda_b", (out_features,))

    def factors(self) -> tuple[Tensor, Tensor, float | Tensor]:
        """See base class; B holds both vectors, so that A can be shared."""
        d_Er1 = self.value("lambda_d").unsqueeze(-1)
        b_E1O = self.value("lambda_b").unsqueeze(1)
        return self.value("A"), self.value("B") * b_E1O * d_Er1, 1.0

    def to_peft(self, expert: int) -> PeftForm:
        """See base class.

        Raises:
            WrapError: The projections do not belong to the whole model.
        """
        config = self.config
        assert isinstance(config, VeRAExperts.Config)
        kinds = [config.trainability.get(name) for name in ("A", "B")]
        scopes = [config.scopes().get(name) for name in ("A", "B")]
        if scopes != ["model", "model"] or kinds[0] != kinds[1] or None in kinds:
            raise WrapError(
                "PEFT's VeRA has one pair of fixed projections for the whole model; "
                "set experts.shared: {A: model, B: model} and make both frozen or both "
                "seeded, or export as LoRA"
            )
        saved = kinds[0] == "frozen"
        settings = {
            "r": config.r,
            "d_initial": config.d_initial,
            "projection_prng_key": config.projection_prng_key or 0,
            "save_projection": saved,
        }
        tensors = {
            f"vera_{name}": self.value(name)[expert % len(self.value(name))].detach()
            for name in ("lambda_d", "lambda_b")
        }
        if not saved:
            return PeftForm("VERA", settings, tensors)
        A, Bt = (self._owners.get(n, self).whole(n)[0].detach() for n in ("A", "B"))
        whole = {"vera_A": A, "vera_B": Bt.t().contiguous()}
        return PeftForm("VERA", settings, tensors, whole)

    @classmethod
    def from_peft(
        cls,
        settings: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        in_features: int,
        out_features: int,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See base class; ``A`` and ``Bt`` are those of the layer that owns them.

        Where the folder holds no projections, the block says that they are seeded.
        """
        saved = "vera_A" in tensors
        block: dict[str, Any] = {
            "kind": "vera",
            "r": settings["r"],
            "d_initial": settings.get("d_initial", 0.1),
        }
        state = {
            name: tensors[f"vera_{name}"].unsqueeze(0)
            for name in ("lambda_d", "lambda_b")
        }
        if saved:
            state["A"] = tensors["vera_A"].unsqueeze(0)
            state["Bt"] = tensors["vera_B"].t().unsqueeze(0)
        else:
            block["trainability"] = {"A": "seeded", "B": "seeded"}
            block["projection_prng_key"] = settings["projection_prng_key"]
        return block, state


def _draw_up(values: Tensor, generator: torch.Generator) -> object:
    """U(-sqrt(6/r), sqrt(6/r)), drawn as [O, r], which is how PEFT stores B."""
    drawn = torch.empty_like(values.mT, memory_format=torch.contiguous_format)
    uniform(values.shape[1], _GAIN)(drawn, generator)
    return values.copy_(drawn.mT)
