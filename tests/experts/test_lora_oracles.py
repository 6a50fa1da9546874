"""LoRA banks against stored numbers of PEFT; see ../oracles/README.md."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import molora
from molora.kernels import lowrank_mixture
from molora.model import sites

FOLDER = Path(__file__).parent.parent / "oracles"
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
DTYPES = [torch.float64, torch.float32]


def layer(t: dict[str, Tensor]) -> nn.Linear:
    """The base layer of a file."""
    weight, bias = t["base.weight"], t.get("base.bias")
    made = nn.Linear(*reversed(weight.shape), bias=bias is not None)
    made.weight.data = weight.clone()
    if bias is not None:
        made.bias.data = bias.clone()
    return made


def near(got: Tensor | None, want: Tensor, what: str = "") -> bool:
    assert got is not None, what
    assert got.shape == want.shape, what
    tol = TOLERANCE[got.dtype] * max(1.0, float(want.abs().max()))
    worst = float((got.double() - want.double()).abs().max())
    assert worst <= tol, (what, worst, tol)
    return True


def single(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        hyper = json.loads(file.metadata()["hyper"])
        return {k: file.get_tensor(k) for k in file.keys()}, hyper  # noqa: SIM118


def check_single(site: Any, t: dict[str, Tensor]) -> None:
    """Compare one expert's output, gradients and merged weight."""
    dtype = site.experts.A.dtype
    with torch.no_grad():
        site.experts.A.copy_(t["param.A"])
        site.experts.Bt.copy_(t["param.B"].t())
    x = t["x"].to(dtype).requires_grad_()
    y = site(x)
    (y * t["c"].to(dtype)).sum().backward()
    assert near(y.detach(), t["y"], "y")
    assert near(x.grad, t["grad.x"], "x")
    assert near(site.experts.A.grad[0], t["grad.A"], "A")
    assert near(site.experts.Bt.grad[0].t(), t["grad.B"], "B")
    # updates are folded in float32
    assert near(
        (site.base.weight + site.delta_weight()).detach().float(), t["merged.weight"]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["lora", "lora_nobias_tall", "lora_rs"])
def test_one_expert_is_lora(name: str, dtype: torch.dtype) -> None:
    t, hyper = single(name)
    raw = {
        "target_modules": ["lin"],
        "experts": {
            "kind": "lora",
            "r": hyper["r"],
            "lora_alpha": hyper["alpha"],
            "use_rslora": name == "lora_rs",
        },
    }
    config = molora.AdapterConfig.from_dict(raw)
    model = nn.ModuleDict({"lin": layer(t)})
    molora.wrap(model, config).to(dtype)
    site: Any = sites(model)["lin"]
    assert site.experts.scales() == pytest.approx([hyper["scale"]])
    assert site.router is None
    check_single(site, t)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks_and_alphas_by_layer(dtype: torch.dtype) -> None:
    t, hyper = single("lora_patterns")
    model: Any = nn.Module()
    model.layers = nn.ModuleList()
    for number in range(3):
        model.layers.append(nn.Module())
        for name in ("q_proj", "v_proj", "up"):
            path = f"layers.{number}.{name}/"
            own = {k.split("/")[1]: v for k, v in t.items() if k.startswith(path)}
            setattr(model.layers[number], name, layer(own))
    resolved = hyper["resolved"]
    config = molora.AdapterConfig.from_dict(
        {
            "target_modules": hyper["target_modules"],
            "experts": {"kind": "lora", "r": hyper["r"], "lora_alpha": hyper["alpha"]},
            # the last would match every layer, but the first match wins
            "overrides": [
                {
                    "match": f"^{path}$",
                    "experts": {"r": s["r"], "lora_alpha": s["alpha"]},
                }
                for path, s in resolved.items()
                if (s["r"], s["alpha"]) != (hyper["r"], hyper["alpha"])
            ]
            + [{"match": ".", "experts": {"use_rslora": False}}],
        }
    )
    molora.wrap(model, config).to(dtype)
    found: dict[str, Any] = sites(model)  # type: ignore[assignment]
    assert found.keys() == resolved.keys()
    for path, site in found.items():
        assert site.experts.scales() == pytest.approx([resolved[path]["scale"]])
        own = {k.split("/")[1]: v for k, v in t.items() if k.startswith(path + "/")}
        check_single(site, own)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_adapter_per_row_of_different_ranks(dtype: torch.dtype) -> None:
    t = load_file(FOLDER / "batched_adapters.safetensors")
    x, A, B = (t[n].to(dtype) for n in ("x", "plain.A", "plain.B"))
    ids = t["adapter_ids"]
    gates = torch.zeros(7, 4, dtype=dtype)
    gates[torch.arange(7), ids.clamp(min=0)] = (ids >= 0).to(dtype)
    base = nn.functional.linear(x, t["base.weight"].to(dtype), t["base.bias"].to(dtype))
    leaves = [x.requires_grad_(), A.requires_grad_(), B.requires_grad_()]
    delta = lowrank_mixture(
        x.reshape(77, -1),
        A,
        B.transpose(1, 2),
        gates.repeat_interleave(11, 0),
        t["scales"].to(dtype),
    )
    y = base + delta.view(base.shape)
    assert near(y.detach(), t["y"])
    (delta.view(base.shape) * t["c"].to(dtype)).sum().backward()
    assert near(leaves[1].grad, t["grad.A"])
    assert near(leaves[2].grad, t["grad.B"])
    dx = t["grad.x"] - t["c"] @ t["base.weight"]
    assert near(leaves[0].grad, dx)


def test_per_expert_ranks_and_scales_in_a_bank() -> None:
    """The same file through the configuration: lists of ranks and alphas."""
    t = load_file(FOLDER / "batched_adapters.safetensors")
    ranks = t["plain.rank"].tolist()
    config = molora.AdapterConfig.from_dict(
        {
            "target_modules": ["lin"],
            "experts": {
                "kind": "lora",
                "num_experts": 4,
                "r": ranks,
                "lora_alpha": [
                    float(s) * r for s, r in zip(t["scales"], ranks, strict=True)
                ],
            },
            "router": {"kind": "soft"},
        }
    )
    model = molora.wrap(nn.ModuleDict({"lin": layer(t)}), config).double()
    experts: Any = sites(model)["lin"].experts
    with torch.no_grad():
        experts.A.copy_(t["plain.A"])
        experts.Bt.copy_(t["plain.B"].transpose(1, 2))
    for row, expert in enumerate(t["adapter_ids"].tolist()):
        gates = torch.zeros(11, 4, dtype=torch.float64)
        if expert >= 0:
            gates[:, expert] = 1
        base = nn.functional.linear(t["x"][row], t["base.weight"], t["base.bias"])
        assert near(experts(t["x"][row], gates, base).detach(), t["y"][row])
