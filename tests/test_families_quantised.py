"""Every expert family on 4-bit and 8-bit layers: as on the dequantised layer.

That the dequantised layer is right stands in test_quantized.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import molora
from molora.experts import EXPERTS
from molora.model import sites
from tests.bits import layer_of, plain
from tests.registered import VARIANTS, family_of, family_settings


class Layer(nn.Module):
    """A model of one numbered layer that holds its weight in a few bits."""

    def __init__(self, bits: str):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(64, 128, generator=generator) / 8
        self.layers = nn.ModuleList([layer_of(bits, weight)])

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        y: Tensor = self.layers[0](inputs_embeds)
        return y


def wrapped(model: nn.Module, kind: str, count: int) -> Any:
    raw = {
        "target_modules": [r"0"],
        "experts": family_settings(kind, count),
        "router": {"kind": "soft" if count > 1 else "none"},
    }
    molora.wrap(model, molora.AdapterConfig.from_dict(raw), seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * noise)
    return model.train()


def step(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(1, 5, 128, generator=generator).requires_grad_()
    y = model(x)
    y.square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}  # type: ignore[dict-item]


@pytest.mark.parametrize("bits", ["nf4", "int8"])
@pytest.mark.parametrize("kind", [*EXPERTS.names(), *VARIANTS])
def test_it_computes_what_it_does_on_the_dequantised_layer(
    kind: str, bits: str
) -> None:
    for count in (1, 3):
        quantised = Layer(bits)
        twin = plain(quantised)
        got, want = (
            step(wrapped(quantised, kind, count)),
            step(wrapped(twin, kind, count)),
        )
        assert got.keys() == want.keys() and len(got) > 2
        for name, value in want.items():
            # 8-bit layers multiply in half precision
            tol = 2e-2 if bits == "int8" else 1e-4
            off = (got[name] - value).norm()
            assert off <= tol * (1e-3 + value.norm()), (name, off)


@pytest.mark.parametrize("bits", ["nf4", "int8"])
@pytest.mark.parametrize("kind", [*EXPERTS.names(), *VARIANTS])
def test_it_merges_onto_the_dequantised_layer(kind: str, bits: str) -> None:
    quantised = Layer(bits)
    twin = wrapped(plain(quantised), kind, 1)
    model = wrapped(quantised, kind, 1)
    if not family_of(kind).linear:
        with pytest.raises(molora.errors.WrapError, match="no change of a weight"):
            molora.merge(model, base="dequantised")
        return
    molora.merge(model, base="dequantised")
    molora.merge(twin)
    (mine,), (theirs,) = sites(model).values(), sites(twin).values()
    assert (mine.weight - theirs.weight).abs().max() < 1e-4
    molora.unmerge(model)
    assert mine.base is mine.frozen_layer
