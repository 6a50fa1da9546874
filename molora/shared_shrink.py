"""Target layers of one block that read the same tensor share one shrink.

Layers that follow one routing (``router.scope: block``) have the same gates, so their
updates differ only in their factors, and z = x A^T of all of them is one product. Which
layers read the leader's very tensor is noted in the first forward; from the next one on
the leader computes z for them as well. Nothing is assumed: a layer that gets another
tensor computes its own.

Not shared: in training with dropout (each layer has a mask of its own), factors that
experts share, calls for which ``lowrank_mixture`` takes another form than the
concatenated one, compiled graphs, and ``torch.inference_mode``.

Shape legend
    T tokens   R ranks together   I, O features
"""

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from molora.experts.base import BilinearExperts
from molora.kernels import call_frozen, expand, form_of, shrink
from molora.routers import Routing

if TYPE_CHECKING:
    from molora.context import ForwardContext
    from molora.layer import MoloraLinear


class Shrunk(NamedTuple):
    """What a leader left for the layers that read its tensor."""

    x: "weakref.ref[Tensor]"
    """The tensor that it read."""
    version: int
    """Its version, which a change in place raises."""
    z: dict[str, Tensor]
    """[T, R] by layer; each takes its own away."""


def update(
    site: "MoloraLinear", x: Tensor, routing: Routing, context: "ForwardContext"
) -> Tensor | None:
    """Output of a layer from a shared shrink; None where it computes by itself.

    Args:
        site: A layer with ``router.scope: block``.
        x: Its input, [..., I].
        routing: Where its tokens go.
        context: The running forward.

    Returns:
        [T, O].
    """
    # a tensor of inference mode does not tell when it was changed in place
    if torch.compiler.is_compiling() or x.is_inference():
        return None
    leader = site.leader or site
    # ids and pixels are not tokens to multiply
    if not leader.host.by_token:
        return None
    if leader is site:
        _begin(site, x, routing, context)
    shrunk = context.shrunk.get(leader.path)
    if shrunk is None:
        return None
    if shrunk.x() is not x or shrunk.version != x._version:
        leader.reads_same.discard(site.path)
        return None
    if site is not leader:
        leader.reads_same.add(site.path)
    z_TR = shrunk.z.pop(site.path, None)
    if z_TR is None:
        return None
    _, Bt, scale = _factors(site)
    base = call_frozen(site.base, x)
    return expand(z_TR, Bt, routing.gates, scale, base.reshape(-1, site.out_features))


def _begin(
    leader: "MoloraLinear", x: Tensor, routing: Routing, context: "ForwardContext"
) -> None:
    """Compute z of the layers that read x, as far as they can share it."""
    # a recomputation must do what its forward did, whatever was noted since
    plan = context.shrink_plans.setdefault(leader.path, frozenset(leader.reads_same))
    takers = [
        site
        for site in (leader, *leader.followers)
        if site is leader or site.path in plan
    ]
    z: dict[str, Tensor] = {}
    x_TI = x.reshape(-1, leader.in_features)
    if len(takers) > 1 and all(_able(site, x_TI, routing) for site in takers):
        parts = shrink(x_TI, [_factors(site)[0] for site in takers])
        z = {site.path: part for site, part in zip(takers, parts, strict=True)}
    context.shrunk[leader.path] = Shrunk(weakref.ref(x), x._version, z)


def _able(site: "MoloraLinear", x: Tensor, routing: Routing) -> bool:
    experts: Any = site.experts
    plain = isinstance(experts, BilinearExperts) and (
        type(experts).forward is BilinearExperts.forward
    )
    if not (plain and site.host.by_token) or (
        experts.training and experts.lora_dropout
    ):
        return False
    A, Bt, scale = _factors(site)
    if not A.shape[0] == Bt.shape[0] == routing.gates.shape[1]:
        return False
    return form_of(x, A, Bt, routing.gates, scale, routing.top_k) == "torch"


def _factors(site: "MoloraLinear") -> tuple[Tensor, Tensor, float | Tensor]:
    experts = site.experts
    assert isinstance(experts, BilinearExperts)
    A, Bt, scale = experts.factors()
    return A, Bt, scale if isinstance(scale, Tensor) else float(scale)
