"""Arrow: each token goes to the experts whose main input direction it lies along.

    v_e = top right singular vector of B_e A_e        no gradient
    z_e = |x . v_e| / temperature
    g = softmax over the K largest z                  0 elsewhere

B_e A_e is never formed: with A_e^T = Q_a R_a and B_e = Q_b R_b it has the singular
values of R_b R_a^T [r, r], and v_e = Q_a times the right singular vector of that.

Reference: Ostapenko et al. 2024, arXiv:2405.11157, section 4.2.
Shape legend: see base.py; O out features, r rank of one expert.
"""

from typing import Any

import pydantic
import torch
from torch import Tensor

from molora.context import ForwardContext
from molora.errors import ConfigError
from molora.kernels import router_logits
from molora.routers.base import ROUTERS, AbstractRouter, RouterConfig, Routing
from molora.routers.gates import require_finite


@ROUTERS.register("arrow", paper="arXiv:2405.11157")
class ArrowRouter(AbstractRouter):
    """Training-free: by the top right singular vector of each expert.

    Limitations: for experts that are products of two factors. Nothing is trained, so
    there is nothing to balance. Directions are found by an exact decomposition, not by
    15 steps of power iteration; they are found anew in every forward in training, and
    in evaluation when the factors change through autograd's in-place operations or
    ``train()`` is called. Experts that are still zero score 0. General knowledge
    is subtracted by ``molora.import_peft`` (general).
    """

    has_probs = False
    needs_trained = True
    own_site = True

    class Config(RouterConfig):
        """Settings of Arrow."""

        top_k: int = pydantic.Field(default=3, ge=1)
        """Experts used per token, at most num_experts."""
        temperature: float = pydantic.Field(default=1.0, gt=0)
        """Divides the scores; above 1 flattens the gates."""

    config: Config

    @classmethod
    def check(cls, config: RouterConfig, num_experts: int) -> str | None:
        """See base class."""
        assert isinstance(config, cls.Config)
        if config.top_k > num_experts:
            return f"router.top_k={config.top_k} exceeds num_experts={num_experts}"
        return super().check(config, num_experts)

    def bind(self, experts: Any) -> None:
        """See base class."""
        if not hasattr(experts, "factors"):
            raise ConfigError(
                f"site {self.site!r}: router.kind 'arrow' reads the two factors of "
                "each expert, which this experts.kind does not have; use lora, or "
                "another router"
            )
        if experts.factors()[0].shape[-1] != self.in_features:
            raise ConfigError(
                f"site {self.site!r}: router.kind 'arrow' compares tokens with the "
                "rows of A, and on an embedding A reads ids; use another router in an "
                "override for this layer"
            )
        # in a list: its parameters are not those of the router
        self._experts = [experts]
        self._known: tuple[Any, Tensor] | None = None

    def train(self, mode: bool = True) -> "ArrowRouter":
        """Switch mode, and forget the directions."""
        self._known = None
        return super().train(mode)

    def forward(self, x: Tensor, context: ForwardContext) -> Routing:
        """See base class."""
        scores_TE = router_logits(x, self.directions()).abs()
        scores_TE = require_finite(scores_TE, self.site)
        logits_TE = scores_TE / self.config.temperature
        kept_TK, ids_TK = logits_TE.topk(self.config.top_k)
        kept_TK = torch.softmax(kept_TK, -1)
        gates_TE = torch.zeros_like(logits_TE).scatter_(-1, ids_TK, kept_TK)
        return Routing(gates_TE, None, logits_TE, self.config.top_k)

    # it notices when an expert was changed
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def directions(self) -> Tensor:
        """Unit vectors v_e, [E, I]; zero for an expert that is zero."""
        A, Bt, _ = self._experts[0].factors()
        # the factors may be made anew each time; these are kept, so no id comes twice
        key = [(p, p._version, p.dtype) for p in self._experts[0].sources()]
        if self._known is None or not _same(self._known[0], key) or self.training:
            # autocast would round the products
            with torch.autocast(A.device.type, enabled=False):
                self._known = key, top_directions(A, Bt)
        return self._known[1]


def _same(before: list[Any], now: list[Any]) -> bool:
    """Whether these are the same tensors, unchanged."""
    return len(before) == len(now) and all(
        a[0] is b[0] and a[1:] == b[1:] for a, b in zip(before, now, strict=True)
    )


def top_directions(A: Tensor, Bt: Tensor) -> Tensor:
    """Top right singular vectors of B_e A_e.

    Args:
        A: [E or 1, r, I].
        Bt: [E or 1, r, O].

    Returns:
        [E, I] in at least float32; zero where the product is zero.
    """
    dtype = torch.promote_types(A.dtype, torch.float32)
    experts = max(len(A), len(Bt))
    A, Bt = (f.to(dtype).expand(experts, -1, -1) for f in (A, Bt))
    Qa_EIr, Ra_Err = torch.linalg.qr(A.mT)
    Rb_Err = torch.linalg.qr(Bt.mT, mode="r").R
    _, S_Er, Vh_Err = torch.linalg.svd(Rb_Err @ Ra_Err.mT)
    v_EI = (Qa_EIr @ Vh_Err[:, 0, :, None]).squeeze(-1)
    found_EI: Tensor = v_EI * (S_Er[:, :1] > 0)
    return found_EI
