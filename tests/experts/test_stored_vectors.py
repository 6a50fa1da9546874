"""(IA)^3 and lora_bias of PEFT, loralib's fused layers and merged LoRI adapters.

All against stored numbers.
"""

from typing import Any

import pytest
import torch

import molora
from molora.model import sites
from tests.oracle import DTYPES, Layer, load, near


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["ia3_in", "ia3_out"])
def test_vectors_of_ia3(name: str, dtype: torch.dtype) -> None:
    t = load(name)
    position = name.replace("ia3_in", "input").replace("ia3_out", "output")
    raw = {
        "target_modules": ["lin"],
        "experts": {"kind": "ia3", "position": position},
    }
    layer = Layer(t["base.weight"].clone(), t["base.bias"].clone())
    model: Any = molora.wrap(layer, molora.AdapterConfig.from_dict(raw)).to(dtype)
    site = sites(model)["lin"]
    vectors: Any = site.experts.vectors
    vectors.data.copy_(t["param.l"].view(1, -1))
    x = t["x"].to(dtype).requires_grad_()
    y = model(x[None])[0]
    (y * t["c"].to(dtype)).sum().backward()
    assert near(y.detach(), t["y"], "y")
    assert near(vectors.grad.view_as(t["grad.l"]), t["grad.l"], "grad.l")
    assert near(x.grad, t["grad.x"], "grad.x")
    molora.merge(model)
    assert near(site.weight.detach(), t["merged.weight"], "weight")
    assert near(site.bias.detach(), t.get("merged.bias", t["base.bias"]), "bias")


def test_lori_adapters_merge_as_the_weighted_sum() -> None:
    t = load("lori_merge")
    raw = {
        "target_modules": ["lin"],
        "experts": {"kind": "lora", "num_experts": 3, "r": 4, "lora_alpha": 8.0},
        "router": {"kind": "soft"},
    }
    model: Any = Layer(torch.zeros(10, 14).double(), None)
    model = molora.wrap(model, molora.AdapterConfig.from_dict(raw)).double()
    experts: Any = sites(model)["lin"].experts
    for task in range(3):
        experts.A.data[task] = t[f"A/{task}"]
        experts.Bt.data[task] = t[f"B/{task}"].t()
    molora.collapse(model, "linear", weights=[0.4, 0.3, 0.3], show_progress=False)
    # a collapse keeps its factors in float32
    delta = sites(model)["lin"].delta_weight()
    assert near(delta.float(), t["concat.delta"], "concat")


def test_a_lora_with_a_bias_is_a_sum() -> None:
    """B of the vector has a bias v, which the scale multiplies: a shift of s v."""
    t = load("lora_bias")
    scale = 5 / 3
    parts = [{"kind": "lora", "r": 3, "lora_alpha": 5.0}, {"kind": "bitfit"}]
    raw = {"target_modules": ["lin"], "experts": {"kind": "sum", "parts": parts}}
    layer = Layer(t["base.weight"].clone(), t["base.bias"].clone())
    model: Any = molora.wrap(layer, molora.AdapterConfig.from_dict(raw)).double()
    site = sites(model)["lin"]
    lora, bitfit = site.experts.parts  # type: ignore[misc]
    with torch.no_grad():
        lora.A.copy_(t["param.A"][None])
        lora.Bt.copy_(t["param.B"].t()[None])
        bitfit.shifts.copy_(scale * t["param.v"][None])
    x = t["x"].requires_grad_()
    y = model(x[None])[0]
    (y * t["c"]).sum().backward()
    assert near(y.detach(), t["y"], "y")
    assert near(x.grad, t["grad.x"], "grad.x")
    assert near(lora.A.grad[0], t["grad.A"], "grad.A")
    assert near(lora.Bt.grad[0].t(), t["grad.B"], "grad.B")
    assert near(scale * bitfit.shifts.grad[0], t["grad.v"], "grad.v")
    molora.merge(model)
    assert near(site.weight.detach(), t["merged.weight"], "weight")
    assert near(site.bias.detach(), t["merged.bias"], "bias")


def test_a_fused_layer_is_a_mask_in_blocks() -> None:
    """Blocks 0 and 2 of 3 have a LoRA of rank 2 each: B is [18, 4] with two blocks."""
    t = load("loralib_merged_linear")
    settings = {"kind": "lora", "r": 4, "lora_alpha": 10.0}
    raw = {
        "target_modules": ["lin"],
        "experts": {**settings, "trainability": {"B": "masked"}},
    }
    layer = Layer(t["base.weight"].clone(), t["base.bias"].clone())
    model: Any = molora.wrap(layer, molora.AdapterConfig.from_dict(raw)).double()
    site = sites(model)["lin"]
    experts: Any = site.experts
    # (rows of the output, ranks, rows of the file's B) of each block
    blocks = [(slice(0, 6), slice(0, 2), slice(0, 6))]
    blocks += [(slice(12, 18), slice(2, 4), slice(6, 12))]
    with torch.no_grad():
        experts.A.copy_(t["param.A"][None])
        # what the mask hides is not read, whatever it holds
        experts.Bt.fill_(7.0)
        experts.mask_Bt.fill_(False)
        for outs, ranks, rows in blocks:
            experts.Bt[0, ranks, outs] = t["param.B"][rows].t()
            experts.mask_Bt[0, ranks, outs] = True
    assert experts.count() == t["param.A"].numel() + t["param.B"].numel()
    x = t["x"].requires_grad_()
    y = model(x)
    (y * t["c"]).sum().backward()
    assert near(y.detach(), t["y"], "y")
    assert near(x.grad, t["grad.x"], "grad.x")
    assert near(experts.A.grad[0], t["grad.A"], "grad.A")
    grad_b = torch.cat([experts.Bt.grad[0, r, o].t() for o, r, _ in blocks])
    assert near(grad_b, t["grad.B"], "grad.B")
    assert not experts.Bt.grad[~experts.mask_Bt].any()
    molora.merge(model)
    assert near(site.weight.detach(), t["merged.weight"], "weight")
