"""(IA)^3 of PEFT, and merged LoRI adapters, against stored numbers."""

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
