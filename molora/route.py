"""How a target layer gets its routing: from its own router, or from another layer's.

With ``router.scope: block`` the target layers of one module (an attention, an FFN)
share one router, with ``model`` all of them do. The first of them, in the order of the
model, leads: its router reads its input, and the others follow within the same forward.

With ``router.input`` sequence or task a router routes rows: the mean input over the
prompt of each row, or its task one-hot. All tokens of a row get that routing.

Shape legend
    B rows   T = B * S tokens   E experts   I in features   N tasks
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from molora.config import SiteConfig
from molora.context import ForwardContext
from molora.errors import RoutingError, WrapError
from molora.routers import Routing
from molora.routers.base import AbstractRouter


def leaders(settings: Mapping[str, SiteConfig]) -> dict[str, str]:
    """Find the layer whose router decides for each routed layer.

    Args:
        settings: Of every target layer by module path, in model order.

    Returns:
        Path of the leader, which may be the layer itself, by path.

    Raises:
        WrapError: Layers that would share one routing have other settings of the router
            or other numbers of experts.
    """
    first: dict[tuple[str, str], str] = {}
    found = {}
    for path, site in settings.items():
        if site.experts.num_experts == 1:
            continue
        scope = site.router.scope
        if scope == "site":
            found[path] = path
            continue
        group = path.rpartition(".")[0] if scope == "block" else ""
        leader = found[path] = first.setdefault((scope, group), path)
        other = settings[leader]
        for name, mine, theirs in (
            ("router", site.router, other.router),
            ("num_experts", site.experts.num_experts, other.experts.num_experts),
        ):
            if mine != theirs:
                raise WrapError(
                    f"sites {leader!r} and {path!r} share one routing "
                    f"(router.scope: {scope}) and have different settings of {name}; "
                    "give them the same, or set router.scope: site"
                )
    return found


def decide(router: AbstractRouter, x: Tensor, context: ForwardContext) -> Routing:
    """Route by a layer's own router.

    Args:
        router: Its router.
        x: Input of the layer, [..., I].
        context: The running forward.

    Returns:
        The routing of the T tokens.

    Raises:
        RoutingError: The prompt or the tasks of the rows cannot be told; see the
            router for more.
    """
    kind = router.config.input
    if kind == "token":
        if router.reads_prompt:
            # flat tokens no longer tell that they stand in another order
            context.token_rows(x.shape, router.site)
        routing: Routing = router(x.reshape(-1, x.shape[-1]), context)
        return routing
    if kind == "sequence":
        rows = context.prompt_mean(x, router.site)
    else:
        rows = _one_hot(router, x, context)
    routing = router(rows, context)
    tokens = x.numel() // x.shape[-1]
    return routing.per_token(tokens // len(rows))


def _one_hot(router: AbstractRouter, x: Tensor, context: ForwardContext) -> Tensor:
    """Tasks of the rows, [B, N]."""
    known = router.config.tasks
    tasks = context.token_rows(x.shape, router.site).tasks
    missing = sorted(set(tasks or ()) - set(known))
    if tasks is None or missing:
        what = f"{missing} are unknown" if tasks else "none is given"
        raise RoutingError(
            f"site {router.site!r}: router.input: task needs the task of every row and "
            f"knows {known}; {what}. Run inside molora.tasks(model, [...])"
        )
    index_B = torch.tensor([known.index(task) for task in tasks], device=x.device)
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.one_hot(index_B, len(known)).to(wide)


def follow(
    leader: AbstractRouter, tokens: int, context: ForwardContext, path: str
) -> Routing:
    """Take the routing that another layer made in this forward.

    Args:
        leader: Router of that layer.
        tokens: T, how many the layer that follows sees.
        context: The running forward.
        path: Module path of the layer that follows, for messages.

    Raises:
        RoutingError: The leader has not run in this forward, saw other tokens, or is
            out of reach of the gradient.
    """
    scope = leader.config.scope
    early = leader.reads_base_pass
    routing = context.routes.get(path if early else leader.site)
    if routing is None and early:
        raise RoutingError(
            f"site {path!r} is routed by the first pass of a forward of the model "
            f"(router.kind {leader.config.kind!r}), and there was none; call the whole "
            "model"
        )
    if routing is None:
        raise RoutingError(
            f"site {path!r} follows the routing of {leader.site!r} (router.scope: "
            f"{scope}), which has not run before it in this forward: either the layer "
            "was called by itself (call the whole model), or this model runs its "
            "layers in another order than they are registered in (set router.scope: "
            "site)"
        )
    if tokens != len(routing.gates):
        other = "" if early else ", or set router.scope: site"
        raise RoutingError(
            f"site {path!r} sees {tokens} tokens and follows the routing of "
            f"{leader.site!r} (router.scope: {scope}), which saw "
            f"{len(routing.gates)}; add it to exclude_modules{other}"
        )
    if torch.is_grad_enabled() != routing.gates.requires_grad:
        _refuse_lost_gradient(leader, path)
    return routing


def _refuse_lost_gradient(leader: AbstractRouter, path: str) -> None:
    """A reentrant checkpoint cuts what was computed before it off from its gradient."""
    if any(p.requires_grad for p in leader.parameters()):
        raise RoutingError(
            f"site {path!r} follows the routing of {leader.site!r}, which no gradient "
            "reaches: activation checkpointing with use_reentrant=True cuts it off. "
            "Set gradient_checkpointing_kwargs: {use_reentrant: false}"
        )
