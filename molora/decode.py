"""The short way through a layer without gradients, for the plain case.

Between two layers of a decoding model their weights flow through the caches, so every
Python function and every operator starts cold, and their number is what an adapter
costs. This is ``MoloraLinear.forward`` with as few of them as there can be. On a CPU,
for one token, the router's choice is made on the host, and the factors of the experts
in use are all that is read. On a GPU, for any number of tokens, the router is one
launch and the update two. Whatever is not the plain case is left to ``forward``.

Shape legend
    T tokens   E experts   I in features   O out features   r rank of one expert
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as hooks_of

from molora.experts.factors import FactorExperts
from molora.kernels import lowrank_mixture
from molora.kernels.torch_path import cast
from molora.routers.base import LinearGateRouter

if TYPE_CHECKING:
    from molora.layer import MoloraLinear

HALF = (torch.bfloat16, torch.float16)

Choice = Callable[[list[float]], list[tuple[int, float]] | None]
"""Experts with their gates for the logits of a token; None where it cannot tell."""


class Plan(NamedTuple):
    """What a layer's decoding is made of, looked up once."""

    experts: Any
    router: Any
    choose: Choice | None
    """None: one expert with gate 1."""
    scale: float | None
    """None: this layer is not a plain case."""
    hooks: tuple[Any, ...] = ()
    """Hooks of what is not called as a module."""


def short_way(site: "MoloraLinear", x: Tensor) -> Tensor | None:
    """The layer's output without gradients, on a CPU for one token only.

    Args:
        site: The layer.
        x: [..., I].

    Returns:
        [..., O]; None where ``forward`` must see to it: several tokens, training, hooks
        on the router or the experts, a recording, other experts or routers.
    """
    if torch.compiler.is_compiling():
        return None
    if not x.is_cuda and not (x.is_cpu and x.numel() == site.in_features):
        return None
    modules, plan = site._modules, site.plan
    experts, router = modules["experts"], modules.get("router")
    if plan is None or plan.experts is not experts or plan.router is not router:
        plan = site.plan = _plan(site)
    if plan.scale is None or _is_special(site, plan, x):
        return None
    if x.is_cuda:
        return _on_gpu(site, x, plan)
    x_1I = cast(x.reshape(1, -1), plan.experts._parameters["A"].dtype)
    used = [(0, 1.0)]
    if plan.choose is not None:
        weight_EI = plan.router._modules["gate"]._parameters["weight"]
        chosen = plan.choose(F.linear(x_1I, weight_EI).tolist()[0])
        if chosen is None:
            return None
        used = chosen
    base: Tensor = modules["base"](x)  # type: ignore[misc]
    return _updated(base, x_1I, used, plan)


def _on_gpu(site: "MoloraLinear", x: Tensor, plan: Plan) -> Tensor | None:
    """What is left of ``forward`` where nothing but the output is asked for."""
    x_TI = x.reshape(-1, site.in_features)
    gates_TE, top_k = None, None
    if plan.choose is not None:
        routing = plan.router.in_one(x_TI)
        if routing is None:
            return None
        gates_TE, top_k = routing.gates, routing.top_k
    base: Tensor = site._modules["base"](x)  # type: ignore[misc]
    A, Bt = plan.experts._parameters["A"], plan.experts._parameters["Bt"]
    assert plan.scale is not None
    base_TO = base.reshape(-1, site.out_features)
    y_TO = lowrank_mixture(x_TI, A, Bt, gates_TE, plan.scale, base_TO, top_k=top_k)
    return y_TO.view(base.shape)


def _is_special(site: "MoloraLinear", plan: Plan, x: Tensor) -> bool:
    """Whether this call is not the plain case, though the layer is."""
    runtime, experts, router = site.runtime, plan.experts._parameters, plan.router
    if runtime.disabled or runtime.trace is not None:
        return True
    # a part may be in training mode by itself, and its scale may have been set
    drops = plan.experts.training or (router is not None and router.training)
    if site.training or drops or plan.experts.scale != plan.scale:
        return True
    if site.backup is not None or site.quantised is not None:
        return True
    # looked up each time: a copy of the layer has the same global hooks
    if hooks_of._global_forward_hooks or hooks_of._global_forward_pre_hooks:
        return True
    for hooks in plan.hooks:
        if hooks:
            return True
    base = site._modules["base"]._parameters.get("weight")  # type: ignore[union-attr]
    # a token in half precision is multiplied by experts in float32 as float32
    dtype = x.dtype
    wide = torch.float32 if dtype in HALF else dtype
    weights = [experts.get("A"), experts.get("Bt")]
    if router is not None:
        weights.append(router._modules["gate"]._parameters.get("weight"))
    alike = base is not None and base.dtype == dtype
    # an offloaded factor arrives when its module is called, which is not done here
    alike = alike and all(
        w is not None and w.dtype == wide and w.device == x.device for w in weights
    )
    return not alike or torch.is_autocast_enabled(x.device.type)


def _updated(
    base: Tensor, x_1I: Tensor, used: list[tuple[int, float]], plan: Plan
) -> Tensor:
    """Base output plus the updates of the experts in use."""
    A, Bt = plan.experts._parameters["A"], plan.experts._parameters["Bt"]
    assert plan.scale is not None
    y_1O = cast(base.reshape(1, -1), A.dtype)
    z_1r = F.linear(x_1I, A[0]) if A.shape[0] == 1 else None
    for expert, gate in used:
        own_1r = F.linear(x_1I, A[expert]) if z_1r is None else z_1r
        b_rO = Bt[expert if Bt.shape[0] > 1 else 0]
        y_1O = torch.addmm(y_1O, own_1r, b_rO, alpha=plan.scale * gate)
    return cast(y_1O, base.dtype).view(base.shape)


def _plan(site: "MoloraLinear") -> Plan:
    """Look at a layer's experts and router."""
    experts, router = site.experts, site._modules.get("router")
    other = Plan(experts, router, None, None)
    if not (isinstance(experts, FactorExperts) and site.host.by_token):
        return other
    scale = experts.plain_scale()
    if scale is None:
        return other
    called: list[nn.Module] = [experts]
    choose = None
    if experts.num_experts > 1:
        if not isinstance(router, LinearGateRouter) or router.needs_context:
            return other
        choose = router.chooser()
        if choose is None:
            return other
        called += [router, router.gate]
    hooks = []
    for module in called:
        hooks += [module._forward_hooks, module._forward_pre_hooks]
    return Plan(experts, router, choose, scale, tuple(hooks))
