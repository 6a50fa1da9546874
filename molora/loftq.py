"""LoftQ: LoRA that starts at what quantising has taken from the base.

    from A = B = 0, repeat:    Q <- quantise(W - s B A)
                               s B A <- best part of rank r of W - Q

Reference: Li et al. 2023, arXiv:2310.08659, algorithm 1. PEFT takes s = 1 whatever
lora_alpha is; here the scale is divided out, so that Q + s B A is near W for any.

Shape legend: I in features, O out features, r rank, F values that are stored in blocks.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molora.errors import WrapError
from molora.experts import LoRAExperts
from molora.layer import MoloraLinear
from molora.model import sites

_BLOCK = 64


class LoftQ(NamedTuple):
    """A quantised weight, and the factors of what is missing."""

    Q: Tensor
    """[O, I], the values that the quantised layer multiplies by."""
    A: Tensor
    """[r, I]."""
    B: Tensor
    """[O, r]."""


def nf4(weight: Tensor, double: bool = False) -> Tensor:
    """Values that are left of a weight in NF4, blocks of 64, as bitsandbytes has them.

    Any shape, on the CPU as well.

    Args:
        weight: [O, I].
        double: Quantise the constants of the blocks too.

    Returns:
        The same shape and dtype.
    """
    # for widths that are no multiple of a block its kernel on the CPU is wrong
    functional: Any = importlib.import_module("bitsandbytes").functional
    missing = -weight.numel() % _BLOCK
    flat_F = nn.functional.pad(weight.reshape(-1), (0, missing))
    held, state = functional.quantize_4bit(
        flat_F.view(-1, _BLOCK), quant_type="nf4", compress_statistics=double
    )
    left: Tensor = functional.dequantize_4bit(held, state)
    return left.reshape(-1)[: weight.numel()].view(weight.shape).to(weight.dtype)


@torch.no_grad()
def loftq_factors(
    weight: Tensor,
    rank: int,
    *,
    iterations: int = 1,
    scale: float = 1.0,
    quantise: Callable[[Tensor], Tensor] = nf4,
) -> LoftQ:
    """Run the algorithm on one weight.

    Args:
        weight: W, [O, I].
        rank: r, at most the smaller of O and I.
        iterations: T, at least 1; 5 in the paper, 1 in PEFT.
        scale: s of the adapter.
        quantise: Gives the values that are left of a weight.

    Returns:
        Q, A and B in float32; the singular values are shared evenly by A and B.
    """
    wide_OI = weight.float()
    q_OI = quantise(wide_OI)
    a_rI, b_Or = _best_part(wide_OI - q_OI, rank, scale)
    for _ in range(iterations - 1):
        q_OI = quantise(wide_OI - scale * b_Or @ a_rI)
        a_rI, b_Or = _best_part(wide_OI - q_OI, rank, scale)
    return LoftQ(q_OI, a_rI, b_Or)


@torch.no_grad()
def loftq(model: nn.Module, original: Mapping[str, Tensor]) -> None:
    """Start LoRA experts at what the quantised base of a model lacks (T = 1).

    Every expert of a layer starts at the best part of rank r of W - Q, Q being the
    weight that the layer multiplies by. With gates that sum to one the model then is
    nearer to the original than its base; ``disabled`` and ``unwrap`` give that base.
    Further iterations would change Q, and a bank never changes its base.

    Args:
        model: A wrapped model with a quantised base and untrained LoRA experts.
        original: State dict of the model before it was quantised; other entries than
            the weights of target layers are not read.

    Raises:
        WrapError: The model is not wrapped, a layer's weight is missing or has another
            shape, or experts that cannot start there. Nothing is changed.
    """
    starts = {
        path: _best_part(
            _original(site, original) - site.experts.frozen_weight().float(),
            *_rank_and_scale(site),
        )
        for path, site in sites(model).items()
    }
    for path, site in sites(model).items():
        assert isinstance(site.experts, LoRAExperts)
        (a_rI, b_Or), values = starts[path], site.experts.value
        values("A").copy_(a_rI.expand_as(values("A")))
        values("B").copy_(b_Or.t().expand_as(values("B")))


def _best_part(rest_OI: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A [r, I] and B [O, r] with s B A nearest to a matrix."""
    u_OM, s_M, vt_MI = torch.linalg.svd(rest_OI, full_matrices=False)
    root_r = (s_M[:rank] / scale).sqrt()
    return root_r.unsqueeze(1) * vt_MI[:rank], u_OM[:, :rank] * root_r


def _original(site: MoloraLinear, original: Mapping[str, Tensor]) -> Tensor:
    """W of a layer, [O, I] float32."""
    key = f"{site.path}.weight"
    if key not in original:
        raise WrapError(
            f"loftq: original lacks {key!r}; give the state dict of the model before "
            "it was quantised"
        )
    stored = original[key].to(site.experts.frozen_weight().device)
    weight_OI = stored.t() if isinstance(site.base, Conv1D) else stored
    wanted = site.out_features, site.in_features
    if tuple(weight_OI.shape) != wanted:
        raise WrapError(
            f"loftq: {key!r} has the shape {tuple(weight_OI.shape)}, and the layer is "
            f"{wanted}; give the state dict of the same model"
        )
    return weight_OI.float()


def _rank_and_scale(site: MoloraLinear) -> tuple[int, float]:
    """Of the experts of a layer, which all get the same start."""
    experts, told = site.experts, f"loftq: site {site.path!r}"
    if not isinstance(experts, LoRAExperts):
        raise WrapError(f"{told} holds {type(experts).__name__}; it needs kind lora")
    config = experts.config
    ranks, scales = set(config.ranks()), set(config.scales())
    plain = config.init_lora_weights in (True, "kaiming", "gaussian")
    if len(ranks) > 1 or len(scales) > 1 or not plain or experts.places:
        raise WrapError(
            f"{told}: all experts get one start, which is that of this layer; it needs "
            "one r, one lora_alpha, init_lora_weights true and no tensor that layers "
            "share"
        )
    rank, directions = ranks.pop(), min(site.in_features, site.out_features)
    if rank > directions:
        raise WrapError(f"{told} has {directions} directions, fewer than r={rank}")
    return rank, scales.pop()
