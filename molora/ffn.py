"""Whole-FFN experts: each expert runs through the nonlinearity by itself.

With ``router.mix: block`` the target layers of one FFN form experts FFN_e, in which
every layer is the frozen one plus the low-rank update of expert e, and

    y(x) = sum_e g_e(x) FFN_e(x) + (1 - sum_e g_e(x)) FFN(x)

The layers that read x give one output for each expert that a token uses, its slots.
What stands between works on the slots element by element; the last layer mixes them. It
is linear, so the frozen part of it runs once, on the mixed slots:

    y = W sum_k g_k h_k + sum_k g_k s_k B_k A_k h_k

Reference: Li et al. 2024 (MixLoRA), arXiv:2404.15159, equations 4 to 7.
Shape legend
    T tokens   E experts   K slots of a token   N = T * K   I, O, F features
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from molora.errors import RoutingError, WrapError
from molora.kernels import call_frozen
from molora.routers import Routing

if TYPE_CHECKING:
    from molora.layer import MoloraLinear


class Slots(NamedTuple):
    """The experts that each token runs through."""

    weights: Tensor
    """[T, K]; with a slot of the frozen FFN alone, they sum to 1."""
    gates: Tensor
    """[N, E], 1 at the expert of the slot; all zero in that of the frozen FFN."""


def slots_of(routing: Routing, with_base: bool) -> Slots:
    """Slots of a routing; all experts have one where their number varies.

    Args:
        routing: Where T tokens go.
        with_base: Whether gates may sum to less than 1.
    """
    gates_TE = routing.gates
    T, E = gates_TE.shape
    weights_TK, ids_TK = gates_TE.topk(routing.top_k or E)
    one_TKE = torch.zeros_like(gates_TE).unsqueeze(1).repeat(1, ids_TK.shape[1], 1)
    one_TKE.scatter_(-1, ids_TK.unsqueeze(-1), 1.0)
    if with_base:
        rest_T1 = 1 - gates_TE.sum(-1, keepdim=True)
        weights_TK = torch.cat([weights_TK, rest_T1], 1)
        one_TKE = torch.cat([one_TKE, torch.zeros_like(one_TKE[:, :1])], 1)
    return Slots(weights_TK, one_TKE.view(-1, E))


def enter(site: "MoloraLinear", x: Tensor, slots: Slots) -> Tensor:
    """A layer that reads the FFN's input: one output per slot.

    Args:
        site: The layer.
        x: [..., I].
        slots: Of its T tokens.

    Returns:
        [..., K, O].
    """
    K = slots.weights.shape[1]
    base = call_frozen(site.base, x)
    x_NI, base_NO = (_per_slot(part, K) for part in (x, base))
    y_NO: Tensor = site.experts(x_NI, slots.gates, base_NO, 1)
    return y_NO.view(*x.shape[:-1], K, site.out_features)


def _per_slot(part: Tensor, K: int) -> Tensor:
    wide = part.shape[-1]
    return part.reshape(-1, 1, wide).expand(-1, K, -1).reshape(-1, wide)


def leave(site: "MoloraLinear", h: Tensor, slots: Slots) -> Tensor:
    """The layer that ends the FFN: mixes the slots.

    Args:
        site: The layer.
        h: [..., K, F].
        slots: Of its T tokens.

    Returns:
        [..., O].

    Raises:
        RoutingError: The slots did not arrive as they left.
    """
    T, K = slots.weights.shape
    F = site.in_features
    if h.dim() < 3 or h.shape[-2] != K or h.numel() != T * K * F:
        raise RoutingError(
            f"site {site.path!r}: got {tuple(h.shape)} where {T} tokens with {K} "
            "experts each were expected; what stands between the layers of this FFN "
            "does not keep them apart. Set router.mix: layer"
        )
    h_TKF = h.reshape(T, K, F)
    mixed_TF = torch.einsum("tkf,tk->tf", h_TKF, slots.weights.to(h.dtype))
    base = call_frozen(site.base, mixed_TF.view(*h.shape[:-2], F))
    gates_NE = slots.gates * slots.weights.reshape(-1, 1)
    delta_NO: Tensor = site.experts(h_TKF.reshape(-1, F), gates_NE, None, 1)
    delta_TO = delta_NO.view(T, K, -1).sum(1)
    return base + delta_TO.view(base.shape)


def ffns(banks: Mapping[str, "MoloraLinear"]) -> dict[str, dict[str, "MoloraLinear"]]:
    """Layers by the module that they make an FFN of whole experts in, in model order.

    Args:
        banks: Every target layer by path, in model order.
    """
    found: dict[str, dict[str, MoloraLinear]] = {}
    for path, bank in banks.items():
        decider = bank.decider
        if decider is not None and decider.config.mix == "block":
            found.setdefault(path.rpartition(".")[0], {})[path] = bank
    return found


def check_ffn(model: nn.Module, group: Mapping[str, "MoloraLinear"]) -> None:
    """Refuse layers that do not form an FFN whose experts can run side by side.

    The module that holds them is run on a few random numbers.

    Args:
        model: The base model, whose layers are not replaced yet.
        group: Target layers of one module by path, in model order.

    Raises:
        WrapError: See the message.
    """
    layers = list(group.values())
    first, last = layers[0], layers[-1]
    path = next(iter(group)).rpartition(".")[0]
    block = model.get_submodule(path)
    missing = _others(block, [site.base for site in group.values()])
    told = f"router.mix: block: {path!r} cannot be an expert as a whole"
    if missing:
        raise WrapError(
            f"{told}, because it also holds {missing}, which have no experts; give "
            "them experts if they are layers of the FFN, or set router.mix: layer "
            "there in an override"
        )
    for site_path, site in group.items():
        if not site.host.by_token:
            raise WrapError(
                f"{told}: {site_path!r} is no linear layer; give it one expert, or "
                "router.mix: layer, in an override"
            )
        if not site.experts.takes_layer:
            raise WrapError(
                f"{told}: the experts of {site_path!r} act on the layer's input; use "
                "experts.kind lora, or router.mix: layer"
            )
    if first is last or last.out_features != first.in_features:
        raise WrapError(
            f"{told}: it does not end in a layer as wide as its input; set "
            "router.mix: layer there in an override"
        )
    if first.base_weight().is_meta:
        raise WrapError(
            f"{told} before its weights are there, because the FFN is run once to "
            "check it; load the weights first"
        )
    if not _maps_tokens(block, first):
        raise WrapError(
            f"{told}: it does not map each token by itself, as an FFN does; set "
            "router.mix: layer there in an override"
        )


def _others(block: nn.Module, taken: Iterable[nn.Module]) -> list[str]:
    """Names of modules with weights in a block that are not among those taken."""
    known = {id(module) for module in taken}
    return [
        name
        for name, module in block.named_modules()
        if id(module) not in known and any(True for _ in module.parameters(False))
    ]


@torch.no_grad()
def _maps_tokens(block: nn.Module, first: "MoloraLinear") -> bool:
    """Whether tokens pass a block one by one, whatever dimensions come before."""
    weight = first.base_weight()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 2, first.in_features, generator=generator)
    x = x.to(weight.device, weight.dtype)
    modes = [(module, module.training) for module in block.modules()]
    block.eval()
    try:
        apart, joined = block(x), block(x.flatten(1, 2))
        alone = block(x[:, :1, 0])
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False
    finally:
        for module, training in modes:
            module.training = training
    results = (apart, joined, alone)
    if not all(isinstance(y, Tensor) for y in results) or apart.shape != x.shape:
        return False
    pairs = [(apart.flatten(1, 2), joined), (apart[:, :1, 0], alone)]
    slack = 1e-3 * float(apart.abs().max())
    return all(torch.allclose(a, b, rtol=1e-2, atol=slack) for a, b in pairs)
