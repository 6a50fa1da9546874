"""Small functions of gates and logits that routers share.

Shape legend: see base.py.
"""

import math
from typing import Any

import torch
from torch import Tensor

from molora.errors import RoutingError


def share(kept_TE: Tensor, chosen_TE: Tensor) -> Tensor:
    """Divide the kept values of each token by their sum.

    Args:
        kept_TE: Values, at least zero where chosen.
        chosen_TE: True where an expert is chosen.

    Returns:
        [T, E] gates: they sum to one, or are all zero for a token without a choice. No
        gradient is read where nothing was chosen.
    """
    zero = kept_TE.new_zeros(())
    kept_TE = torch.where(chosen_TE, kept_TE, zero)
    total_T1 = kept_TE.sum(-1, keepdim=True)
    gates_TE = kept_TE / total_T1.masked_fill(total_T1 == 0, 1.0)
    return torch.where(chosen_TE, gates_TE, zero)


def not_finite(site: str) -> str:
    """What to say where a logit is NaN or infinite."""
    return (
        f"site {site!r}: router logits are not finite. The layer's input or the "
        "router's weights hold NaN or infinity; lower the learning rate or look "
        "for the first layer that overflows."
    )


def require_finite(logits_TE: Tensor, site: str) -> Tensor:
    """Return the logits, or raise when one is not finite; asynchronous on devices.

    Raises:
        RoutingError: Names the site. On a device the error is the device's own.
    """
    if torch.compiler.is_compiling():
        # a result that is read, or the compiler would leave the check out
        checked_TE: Tensor = finite_op(logits_TE, site)
        return checked_TE
    on_cpu = logits_TE.device.type == "cpu"
    if on_cpu and len(logits_TE) == 1:
        # one token while decoding: cheaper to read than to sum
        if math.isfinite(sum(logits_TE.tolist()[0])):
            return logits_TE
    elif on_cpu and math.isfinite(logits_TE.sum().item()):
        return logits_TE
    message = not_finite(site)
    if on_cpu:
        raise RoutingError(message)
    torch._assert_async(torch.isfinite(logits_TE.sum()), message)
    return logits_TE


@torch.library.custom_op("molora::require_finite", mutates_args=())
def finite_op(logits: Tensor, site: str) -> Tensor:
    """A copy of the logits, checked when the compiled graph runs."""
    return require_finite(logits, site).clone()


@finite_op.register_fake
def _(logits: Tensor, site: str) -> Tensor:
    return torch.empty_like(logits)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


finite_op.register_autograd(_gradient)
