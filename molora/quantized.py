"""Layers that bitsandbytes holds in 4 or 8 bits.

    4 bits (NF4, FP4)   y = x W^T + b, W from 16 levels per block of 64 values
                        (Dettmers et al. 2023, arXiv:2305.14314)
    8 bits              W from 255 levels per output row; in eval the input as well
                        (Dettmers et al. 2022, arXiv:2208.07339)

Such layers are subclasses of nn.Linear. bitsandbytes is never imported here: a model
that holds its layers has done that.

Limitations: on a CPU, 8-bit layers multiply by the dequantised weight in training and
by rounded inputs in eval, which differs by about half a percent.

Shape legend
    I in features   O out features
"""

import copy
import functools
import importlib.util
import logging
import sys
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from molora.errors import ConfigError, WrapError
from molora.schema import nearest

SCHEMES = ("none", "nf4", "int8")
"""Values of ``model.quantization``."""
Bits = Literal[4, 8]


def bits_of(layer: nn.Module) -> Bits | None:
    """Bits of a layer of bitsandbytes; None for any other layer.

    An 8-bit layer that keeps its weight in half precision counts as any other.
    """
    bnb = sys.modules.get("bitsandbytes")
    if bnb is None:
        return None
    if isinstance(layer, bnb.nn.Linear4bit):
        return 4
    eight: Any = layer
    if isinstance(layer, bnb.nn.Linear8bitLt) and not eight.state.has_fp16_weights:
        return 8
    return None


def check_scheme(quantization: str) -> None:
    """Refuse a scheme that is not known, or whose library is not installed."""
    if quantization not in SCHEMES:
        raise ConfigError(
            f"quantization {quantization!r} is not known."
            f"{nearest(quantization, SCHEMES)} Known: {', '.join(SCHEMES)}"
        )
    if quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"quantization {quantization!r} needs bitsandbytes. Run: "
            "pip install 'molora[quantized]'"
        )


def is_nf4(layer: nn.Module) -> bool:
    """Whether a layer holds NF4 values in blocks of 64."""
    state = _weight(layer).quant_state if bits_of(layer) == 4 else None
    return state is not None and (state.quant_type, state.blocksize) == ("nf4", 64)


def loading(quantization: str, device: str | None) -> dict[str, Any]:
    """Arguments with which transformers quantises while it loads."""
    if quantization == "none":
        return {}
    if quantization == "nf4":
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
        )
    else:
        settings = BitsAndBytesConfig(load_in_8bit=True)
    # without a map transformers takes the first GPU that it sees
    return {"quantization_config": settings, "device_map": {"": device or "cpu"}}


def settle(model: PreTrainedModel, name: str, quantization: str) -> None:
    """Check that the model was quantised as asked, and let it compute in its dtype."""
    quantizer: Any = model.hf_quantizer
    layers = [module for module in model.modules() if bits_of(module) is not None]
    if quantizer.pre_quantized or not layers:
        reason = "is quantised already" if layers else "has no linear layer to quantise"
        raise ConfigError(
            f"base model {name!r} {reason}; leave quantization {quantization!r} out"
        )
    if quantization == "nf4":
        # "auto" is known only now
        quantizer.quantization_config.bnb_4bit_compute_dtype = model.dtype
        for layer in layers:
            layer.compute_dtype = model.dtype  # type: ignore[assignment]
    else:
        # it says in every forward of every layer that it rounds to half precision
        logger = logging.getLogger("bitsandbytes.autograd._functions")
        logger.setLevel(logging.ERROR)


def dequantised(layer: nn.Module) -> Tensor:
    """Weight [O, I] that a quantised layer multiplies by.

    4-bit weights come in the dtype that they were quantised from, 8-bit ones in
    float32.
    """
    bnb, held = sys.modules["bitsandbytes"], _weight(layer)
    if bits_of(layer) == 4:
        weight: Tensor = bnb.functional.dequantize_4bit(held.data, held.quant_state)
        return weight
    # the scale moves from the weight to the state in the first forward
    state: Any = layer.state
    scale = held.SCB if held.SCB is not None else state.SCB
    weight = bnb.functional.int8_vectorwise_dequant(held.data, scale)
    return weight


def requantised(layer: nn.Module, weight: Tensor) -> nn.Module:
    """A 4-bit layer like another one, with a weight of its own.

    Args:
        layer: Settings, bias, device and dtype are taken from it.
        weight: [O, I]; it is rounded to the dtype that the layer was quantised from.

    Raises:
        WrapError: The layer has a forward of its own, which would go on reading the
            old weight.
    """
    if "forward" in vars(layer) or "_hf_hook" in vars(layer):
        raise WrapError(
            "a 4-bit layer has hooks of accelerate (device_map with several devices or "
            "'auto'), which would compute with its old weight; load the base onto one "
            "device: device_map={'': 0} or load_base"
        )
    made, held = copy.copy(layer), _weight(layer)
    # the copy is flat
    made._parameters = dict(layer._parameters)
    fresh = sys.modules["bitsandbytes"].nn.Params4bit(
        weight.to(held.quant_state.dtype),
        requires_grad=False,
        blocksize=held.blocksize,
        compress_statistics=held.compress_statistics,
        quant_type=held.quant_type,
        quant_storage=held.quant_storage,
        module=made,
    )
    made.register_parameter("weight", fresh.to(held.device))
    return made


def tensors_of(layer: nn.Module) -> list[Tensor]:
    """Every tensor that the weight of a layer is made of, quantised or not."""
    held, bits = _weight(layer), bits_of(layer)
    if bits is None:
        return [held]
    if bits == 8:
        state: Any = layer.state
        return [held, held.SCB if held.SCB is not None else state.SCB]
    nested = held.quant_state.state2
    found = [
        *vars(held.quant_state).values(),
        *(vars(nested).values() if nested else ()),
    ]
    return [held, *(value for value in found if isinstance(value, Tensor))]


def known_weight(layer: nn.Module) -> Tensor:
    """What a fingerprint reads of a layer.

    Its weight; where it is quantised, a tensor on the meta device, of the shape that
    the weight had before.
    """
    if bits_of(layer) is None:
        return layer.get_parameter("weight")
    assert isinstance(layer, nn.Linear)
    shape = layer.out_features, layer.in_features
    # transformers notes which class it has replaced
    if issubclass(getattr(layer, "source_cls", nn.Linear), Conv1D):
        shape = shape[1], shape[0]
    return torch.empty(shape, device="meta")


def compute_dtype(layer: nn.Module, others: Iterable[nn.Parameter]) -> torch.dtype:
    """Dtype that a quantised layer computes in.

    Args:
        layer: A 4-bit layer says so itself.
        others: Parameters of the model without its banks: for an 8-bit layer the dtype
            of the first that has one counts; float32 where there is none.
    """
    own = getattr(layer, "compute_dtype", None)
    if isinstance(own, torch.dtype):
        return own
    dtypes = (other.dtype for other in others if other.is_floating_point())
    return next(dtypes, torch.float32)


def check(model: nn.Module) -> None:
    """Refuse 4-bit layers whose weight cannot be read as it should.

    Raises:
        WrapError: A weight that is not quantised yet, one that bitsandbytes has packed
            for inference, or a width that it reads wrongly on this CPU.
    """
    for path, layer in model.named_modules():
        if bits_of(layer) != 4:
            continue
        held = _weight(layer)
        if held.quant_state is None:
            raise WrapError(
                f"layer {path!r} is a 4-bit layer whose weight is not quantised yet; "
                "move the model to its device first: model.to('cpu') or 'cuda'"
            )
        if getattr(held.quant_state, "packing_format_for_cpu", False):
            raise WrapError(
                f"layer {path!r} ran in eval mode on the CPU, for which bitsandbytes "
                "has packed its weight in a form that passes no gradient. Load the "
                "base again and wrap it before running it, or use load_base"
            )
        wide = held.quant_state.shape[-1]
        if held.device.type == "cpu" and not _reads_width(wide):
            raise WrapError(
                f"layer {path!r}: bitsandbytes reads 4-bit weights of {wide} input "
                "features wrongly on this CPU. Use model.quantization int8 or none, or "
                "a GPU; widths that are multiples of 64 are right"
            )


def keep_unpacked(model: nn.Module) -> None:
    """Keep 4-bit layers on a CPU from packing their weights in eval mode.

    With AVX512-BF16, bitsandbytes packs a weight in place in the first forward in eval
    mode. From then on no gradient passes the layer, and what dequantising gives is
    not the weight.
    """
    for module in model.modules():
        if bits_of(module) == 4:
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


@functools.cache
def _reads_width(in_features: int) -> bool:
    """Whether 4-bit weights of this width come back on the CPU as they went in."""
    functional = sys.modules["bitsandbytes"].functional
    # one magnitude in each block of 64, which NF4 keeps exactly
    values = torch.arange(4 * in_features)
    exact = torch.where(values % 3 == 0, -1.0, 1.0) * 2.0 ** (values // 64 % 8)
    exact = exact.view(4, in_features)
    packed, state = functional.quantize_4bit(exact, quant_type="nf4")
    return torch.equal(functional.dequantize_4bit(packed, state), exact)


def relative(value: Tensor, reference: Tensor) -> float:
    """Distance of two tensors over the norm of the second."""
    wide = reference.detach().float()
    return float((value.detach().float() - wide).norm() / wide.norm())


def plain_linear(
    layer: nn.Module, weight: Tensor, dtype: torch.dtype, bias: Tensor | None = None
) -> nn.Linear:
    """An ordinary frozen layer in the place of a quantised one.

    Args:
        layer: The quantised layer; bias, device and mode are taken from it.
        weight: [O, I]; it is copied.
        dtype: Dtype of the new layer.
        bias: [O], instead of that of the layer.
    """
    held: Any = layer
    bias = held.bias if bias is None else bias
    made = nn.Linear(
        weight.shape[1], weight.shape[0], bias=bias is not None, device="meta"
    )
    for name, values in {"weight": weight, "bias": bias}.items():
        if values is not None:
            values = values.detach().to(held.weight.device, dtype, copy=True)
            setattr(made, name, nn.Parameter(values, requires_grad=False))
    return made.train(layer.training)


def drop_marks(model: nn.Module) -> None:
    """Let transformers know that a model is quantised no more."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
        for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            model.__dict__.pop(mark, None)


def _weight(layer: nn.Module) -> Any:
    return layer.weight
