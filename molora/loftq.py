"""LoftQ: LoRA that starts at what quantising has taken from the base.

    from A = B = 0, repeat T times:    Q <- quantise(W - s B A)
                                       s B A <- best part of rank r of W - Q

Reference: Li et al. 2023, arXiv:2310.08659, algorithm 1. PEFT takes s = 1 whatever
lora_alpha is; here the scale is divided out, so that Q + s B A is near W for any.

``init_lora_weights: loftq`` is T = 1, ``loftq_iter_5`` is T = 5. The model computes
with Q: that of the base for T = 1, else another one, which is made when the model is
wrapped or loaded. The layers of the base are kept beside it, half a byte for each
weight more, for ``disabled`` and ``unwrap``. All experts have one start C = s B A, the
frozen term of start.py, so that with gates that sum to one

    Q + sum_e g_e s B_e A_e        is near W at the start, as with one expert

and with smaller sums what is missing falls to Q. Saved are the start and, for T > 1,
the iterate before it, from which Q follows: Q = quantise(W - C_last).

On a base in any other form (unquantised, 8 bits) a saved adapter is read as the change
that was learned, delta_e = s B_e A_e - C, which is added to the weights there. Merging
onto the original weights means the same.

Shape legend: I in features, O out features, r rank, F values that are stored in blocks,
M and N the smaller and the larger of I and O.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from molora.config import AdapterConfig
from molora.errors import CheckpointError, WrapError
from molora.experts import LoRAExperts
from molora.experts.start import loftq_steps
from molora.layer import MoloraLinear
from molora.originals import originals
from molora.progress import long_work
from molora.quantized import dequantised, keep_unpacked, requantised

_BLOCK = 64
_ADVICE = (
    "give the unquantised model as original, for example original=load_base(name)[0]"
)


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
    start = wide_OI, quantise(wide_OI)
    *_, (q_OI, a_rI, b_rO) = _iterates(*start, rank, scale, iterations, quantise)
    return LoftQ(q_OI, a_rI, b_rO.t())


def _iterates(
    wide_OI: Tensor,
    q_OI: Tensor,
    rank: int,
    scale: float,
    iterations: int,
    quantise: Callable[[Tensor], Tensor],
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Q, A [r, I] and B^T [r, O] of every iteration; the first Q is given."""
    for more in reversed(range(iterations)):
        a_rI, b_rO = _best_part(wide_OI - q_OI, rank, scale)
        yield q_OI, a_rI, b_rO
        if more:
            q_OI = quantise(_without(wide_OI, a_rI, scale * b_rO))


def steps_of(config: AdapterConfig) -> int:
    """Largest T of any layer, 0 where none starts from LoftQ."""
    kinds = [own for own in config.families() if isinstance(own, LoRAExperts.Config)]
    return max((loftq_steps(own.init_lora_weights) for own in kinds), default=0)


def begin(banks: Mapping[str, MoloraLinear], original: nn.Module | None) -> None:
    """Start the experts that ask for LoftQ, and give their layers Q.

    Args:
        banks: New banks by path, which are in no model yet.
        original: The model before quantisation.

    Raises:
        WrapError: A layer that is not held in NF4, no original or another model; an
            original that nothing reads; or experts inside of others.
    """
    found = asking(banks)
    for path, site in found.items():
        told = f"layer {path!r}: init_lora_weights: {_init(site)}"
        if not site.experts.in_nf4:
            raise WrapError(
                f"{told} starts at what NF4 (blocks of 64) takes from the weights, and "
                "this layer is not held so: load the base with model.quantization: nf4 "
                "(load_base(name, quantization='nf4')), or take another "
                "init_lora_weights, such as true or pissa"
            )
        if _experts(site).config.loftq_r is not None:
            raise WrapError(
                f"{told}: loftq_r stands in what molora.collapse has saved; drop it"
            )
        if original is None:
            raise WrapError(f"{told} reads the weights from before: {_ADVICE}")
    _refuse_unread(original, bool(found))
    if original is not None:
        weights = originals(original, _layers(found), "init_lora_weights: loftq")
        with long_work("LoftQ", len(found)) as step:
            for path, site in found.items():
                _start(site, weights[path])
                step()


@torch.no_grad()
def rebuild(banks: Mapping[str, MoloraLinear], original: nn.Module | None) -> None:
    """Give layers the Q that their loaded experts were trained on.

    Args:
        banks: Banks by path, with the values that were saved.
        original: The model before quantisation, needed for T > 1 on a base in NF4.

    Raises:
        WrapError: No original, another model, or an original that nothing reads.
    """
    found = {path: site for path, site in asking(banks).items() if _moves(site)}
    if found and original is None:
        path, site = next(iter(found.items()))
        raise WrapError(
            f"layer {path!r}: the adapter was trained with init_lora_weights: "
            f"{_init(site)}, on weights that this base does not hold: NF4 of the "
            f"original ones less a term. For this base {_ADVICE}; an unquantised one "
            "takes the adapter as it is"
        )
    _refuse_unread(original, bool(found))
    if original is not None:
        weights = originals(original, _layers(found), "init_lora_weights: loftq")
        for path, site in found.items():
            experts = _experts(site)
            wide_OI = weights[path].to(experts.A_last.device).float()
            rest_OI = _without(wide_OI, experts.A_last[0], experts.Bt_last[0])
            site.hold(_held(site, rest_OI))


def check_resumed(
    banks: Mapping[str, MoloraLinear], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Refuse saved experts that were trained on another Q than a model now has.

    Args:
        banks: Banks by path.
        tensors: What was saved, by its name in the model.

    Returns:
        The model's own iterates, of which it holds the Q, by their names; they equal
        the saved ones but for the rounding of the SVD.

    Raises:
        CheckpointError: The iterates from which Q follows differ.
    """
    own: dict[str, Tensor] = {}
    for path, site in asking(banks).items():
        names = [f"{path}.experts.{name}" for name in ("A_last", "Bt_last")]
        # what is missing is told where it is read
        if not _moves(site) or not all(name in tensors for name in names):
            continue
        a_rI, b_rO = (tensors[name][0].float() for name in names)
        experts = _experts(site)
        now_OI = (experts.Bt_last[0].t() @ experts.A_last[0]).detach().float().cpu()
        if (b_rO.t() @ a_rI - now_OI).norm() > 1e-4 * now_OI.norm():
            raise CheckpointError(
                f"{path}: the saved experts were trained on other 4-bit weights than "
                f"LoftQ ({_init(site)}) has made here, where the SVD rounds "
                "differently. Load them onto a plain base: "
                "molora.load(base, folder, trainable=True, original=...)"
            )
        for name, held in zip(names, (experts.A_last, experts.Bt_last), strict=True):
            own[name] = held.detach().cpu().clone()
    return own


def asking(banks: Mapping[str, MoloraLinear]) -> dict[str, MoloraLinear]:
    """Those of some layers whose experts start from LoftQ.

    Raises:
        WrapError: Experts inside of others do.
    """
    found = {}
    for path, site in banks.items():
        for part in site.experts.modules():
            if not isinstance(part, LoRAExperts):
                continue
            init = part.config.init_lora_weights
            if loftq_steps(init) and part is not site.experts:
                raise WrapError(
                    f"layer {path!r}: init_lora_weights: {init} is for kind lora by "
                    f"itself, not inside of {type(site.experts).__name__}"
                )
            if loftq_steps(init):
                found[path] = site
    return found


@torch.no_grad()
def _start(site: MoloraLinear, weight: Tensor) -> None:
    """Run the algorithm from the layer as it is held; keep the last two iterates."""
    experts, layers = _experts(site), [site.base]
    rank, scale = experts.config.ranks()[0], experts.config.scales()[0]

    def quantise(rest_OI: Tensor) -> Tensor:
        layers.append(_held(site, rest_OI))
        return dequantised(layers[-1]).float()

    wide_OI = weight.to(experts.A_start.device).float()
    start = wide_OI, dequantised(site.base).float()
    steps = loftq_steps(_init(site))
    *before, last = _iterates(*start, rank, scale, steps, quantise)
    if before:
        _, a_rI, b_rO = before[-1]
        experts.A_last.copy_(a_rI.unsqueeze(0))
        experts.Bt_last.copy_(scale * b_rO.unsqueeze(0))
    _, a_rI, b_rO = last
    experts.keep_start(a_rI, b_rO)
    experts.value("A").copy_(a_rI.expand_as(experts.value("A")))
    experts.value("B").copy_(b_rO.expand_as(experts.value("B")))
    experts.starts_at_zero = False
    if before:
        site.hold(layers[-1])


def _held(site: MoloraLinear, weight: Tensor) -> nn.Module:
    """The layer of the base with another weight."""
    keep_unpacked(site.given_layer)
    return requantised(site.given_layer, weight)


def _best_part(rest_OI: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A [r, I] and B^T [r, O] with s B A nearest to a matrix."""
    wide_OI = rest_OI.double()
    tall = wide_OI.shape[0] > wide_OI.shape[1]
    wide_MN = wide_OI.t() if tall else wide_OI
    # of the shorter side, in double precision: no less exact than an SVD in single
    u_MM = torch.linalg.eigh(wide_MN @ wide_MN.t()).eigenvectors
    u_rM = u_MM[:, -rank:].flip(1).t()
    scaled_rN = u_rM @ wide_MN
    s_r1 = scaled_rN.norm(dim=1, keepdim=True)
    root_r1 = (s_r1 / scale).sqrt()
    first = root_r1 * u_rM
    # s v over sqrt(s * scale); what is left of nothing is nothing
    tiny = torch.finfo(torch.float32).tiny
    second = scaled_rN / (s_r1 * scale).sqrt().clamp(min=tiny)
    a_rI, b_rO = (first, second) if tall else (second, first)
    return a_rI.to(rest_OI.dtype), b_rO.to(rest_OI.dtype)


def _without(wide_OI: Tensor, a_rI: Tensor, b_rO: Tensor) -> Tensor:
    """W - s B A, the scale being in B."""
    return wide_OI - b_rO.t() @ a_rI


def _experts(site: MoloraLinear) -> LoRAExperts:
    assert isinstance(site.experts, LoRAExperts)
    return site.experts


def _init(site: MoloraLinear) -> bool | str:
    return _experts(site).config.init_lora_weights


def _moves(site: MoloraLinear) -> bool:
    """Whether the experts stand on another Q than that of the base."""
    return site.experts.in_nf4 and loftq_steps(_init(site)) > 1


def _layers(found: Mapping[str, MoloraLinear]) -> dict[str, nn.Module]:
    return {path: site.given_layer for path, site in found.items()}


def _refuse_unread(original: nn.Module | None, is_read: bool) -> None:
    if original is not None and not is_read:
        raise WrapError(
            "original: nothing here reads the unquantised model; it is for "
            "init_lora_weights: loftq on a base in NF4, and on loading for "
            "loftq_iter_<T> with T > 1. Leave it out"
        )
