"""Models with layers of bitsandbytes, made in memory."""

import copy
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

import molora
from molora.model import sites
from molora.quantized import bits_of, dequantised

SINGLE = {"kind": "lora", "r": 4, "lora_alpha": 8}
MIXTURE = {"kind": "lora", "num_experts": 3, "r": 4}


class Single(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.lin = layer

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        y: Tensor = self.lin(inputs_embeds)
        return y


def single(weight: Tensor) -> Single:
    """A model of one linear layer that holds a weight."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    return Single(linear)


def layer_of(
    kind: str, weight: Tensor, bias: Tensor | None = None, **settings: Any
) -> Any:
    """A layer of bitsandbytes that holds a weight, on the CPU."""
    sizes = {"input_features": weight.shape[1], "output_features": weight.shape[0]}
    if kind == "int8":
        made: Any = bnb.nn.Linear8bitLt(
            **sizes, bias=bias is not None, has_fp16_weights=False
        )
        made.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False)
    else:
        made = bnb.nn.Linear4bit(**sizes, bias=bias is not None, quant_type=kind)
        made.weight = bnb.nn.Params4bit(
            weight.clone(), quant_type=kind, module=made, **settings
        )
    if bias is not None:
        made.bias = nn.Parameter(bias.clone())
    return made.to("cpu").requires_grad_(False)


def quantise(model: nn.Module, kind: str) -> Any:
    """Put layers of bitsandbytes in the place of those of the decoder."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and path != "lm_head":
            held = layer_of(kind, layer.weight.detach()).train(layer.training)
            model.set_submodule(path, held)
    return model


def plain(model: nn.Module) -> Any:
    """The same function in ordinary layers."""
    model = copy.deepcopy(model)
    for path, layer in list(model.named_modules()):
        if bits_of(layer) is not None:
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
            linear.weight.data = dequantised(layer)
            model.set_submodule(path, linear)
    return model


def wrapped(model: Any, experts: dict[str, Any] = SINGLE, **more: Any) -> Any:
    """Wrap, and give the experts values as after training."""
    raw = {"target_modules": "all-linear", "experts": experts, **more}
    if experts.get("num_experts", 1) > 1:
        raw["router"] = {"kind": "topk", "top_k": 2, "init_range": 0.5}
    molora.wrap(model, molora.AdapterConfig.from_dict(raw), seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for site in sites(model).values():
            for parameter in site.experts.parameters():
                parameter.normal_(0, 0.1, generator=generator)
    return model
