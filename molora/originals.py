"""The weights that a quantised model was made from, out of its unquantised twin.

Quantised as the layer was, they have to give the codes that it holds. A few differ
where one of the two was rounded to bfloat16 on its way and the other not: about 0.3 %
in 4 bits, 5 % in 8. Weights that were trained on are further away: a relative 1e-2
moves 3 % and 30 %, 3e-3 about 1 % and 9 %.

Limitations: a change smaller than that, or of layers that are not asked for, is taken
for rounding.

Shape legend
    I in features   O out features
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molora.errors import WrapError
from molora.quantized import bits_of

_ALLOWED = {4: 0.01, 8: 0.08}
"""By bits: the largest share of codes of a layer that rounding explains."""


def originals(
    model: nn.Module, layers: Mapping[str, nn.Module], reader: str
) -> dict[str, Tensor]:
    """Weights [O, I] of the unquantised model for some quantised layers of its twin.

    Args:
        model: The model before quantisation.
        layers: Quantised layers by path, as the base came with them.
        reader: Who asks, for messages.

    Raises:
        WrapError: A layer is missing, has another shape, is quantised as well, or
            gives other codes than those of the layer.
    """
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    for path, layer in layers.items():
        twin = modules.get(path)
        if not isinstance(twin, nn.Linear | Conv1D) or bits_of(twin) is not None:
            raise WrapError(
                f"{reader}: original has no unquantised linear layer {path!r}; give "
                "the model that was quantised, loaded without quantisation"
            )
        weight = twin.weight.detach()
        weight = weight.t() if isinstance(twin, Conv1D) else weight
        told = f"{reader}: original is another model: its layer {path!r}"
        _check_same(layer, weight, told)
        found[path] = weight
    return found


def _check_same(layer: nn.Module, weight: Tensor, told: str) -> None:
    """Refuse a weight [O, I] that a layer was not quantised from."""
    assert isinstance(layer, nn.Linear)
    shape = layer.out_features, layer.in_features
    if tuple(weight.shape) != shape:
        raise WrapError(
            f"{told} is {list(weight.shape)}, that of the base {list(shape)}; give "
            "the model that was quantised"
        )
    bits = bits_of(layer)
    assert bits is not None
    other = int((_codes(layer, weight) != _unpacked(layer, layer.weight)).sum())
    share, allowed = other / weight.numel(), _ALLOWED[bits]
    if share > allowed:
        raise WrapError(
            f"{told} gives {other:,} of {weight.numel():,} {bits}-bit codes other than "
            f"those that the base holds ({share:.1%}; rounding explains {allowed:.0%} "
            "at most). Give the weights that were quantised, for example "
            "original=load_base(name)[0] with the name and revision of the base, not a "
            "model that was trained or merged since"
        )


def _codes(layer: nn.Linear, weight: Tensor) -> Tensor:
    """Codes of a weight, quantised as a layer was."""
    functional: Any = sys.modules["bitsandbytes"].functional
    held: Any = layer.weight
    weight = weight.to(held.device)
    if bits_of(layer) == 8:
        codes: Tensor = functional.int8_vectorwise_quant(weight.half())[0]
        return codes
    packed, _ = functional.quantize_4bit(
        weight.to(held.quant_state.dtype).contiguous(),
        blocksize=held.quant_state.blocksize,
        quant_type=held.quant_state.quant_type,
    )
    return _unpacked(layer, packed)


def _unpacked(layer: nn.Linear, codes: Tensor) -> Tensor:
    """One code in each place; in 4 bits two of them share a byte."""
    if bits_of(layer) == 8:
        return codes.data
    bytes_ = codes.data.contiguous().view(torch.uint8).flatten()
    return torch.stack([bytes_ >> 4, bytes_ & 15], 1)
