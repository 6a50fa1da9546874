"""Recorded runs of other implementations, and models that begin as they did."""

import json
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

import molora
from tests.oracle import FOLDER, load


class Sites(nn.Module):
    """Linear layers beside one another, each with an input and a target of its own."""

    def __init__(self, t: dict[str, Tensor], names: list[str]):
        super().__init__()
        self.t = t
        for name in names:
            weight, bias = t[f"{name}/base.weight"], t[f"{name}/base.bias"]
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
            self.add_module(name, layer)

    def forward(self, inputs_embeds: Tensor | None = None) -> Tensor:
        """Sum of the mean squared errors of all layers."""
        errors = []
        for name, layer in self.named_children():
            y = layer(self.t[f"{name}/x"])
            errors.append((y - self.t[f"{name}/target"]).square().mean())
        return torch.stack(errors).sum()


def hyper(name: str) -> dict[str, Any]:
    """Settings of a recorded run."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["hyper"])
    return found


def begun(name: str, experts: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """A model of the layers of a trace in float64, wrapped, and the trace."""
    t = load(name)
    names = list(hyper(name)["sites"])
    raw = {"target_modules": names, "experts": experts}
    model = molora.wrap(Sites(t, names), molora.AdapterConfig.from_dict(raw))
    return model.double(), t
