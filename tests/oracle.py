"""Numbers of other implementations, and a one-layer model with their parameters."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import molora
from molora.context import ForwardContext
from molora.model import sites

FOLDER = Path(__file__).parent / "oracles"
"""What the files hold, and where they come from, stands in its README.md."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
DTYPES = [torch.float64, torch.float32]


class Layer(nn.Module):
    """A model of one layer, with the argument names of a language model."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.lin = nn.Linear(*reversed(weight.shape), bias=bias is not None)
        self.lin.weight.data = weight
        if bias is not None:
            self.lin.bias.data = bias

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        y: Tensor = self.lin(inputs_embeds)
        return y


def load(name: str) -> dict[str, Tensor]:
    """Tensors of one file; float64 results replace those of float32 steps."""
    t = load_file(FOLDER / f"{name}.safetensors")
    return t | {k.removeprefix("f64."): v for k, v in t.items() if k[:4] == "f64."}


def near(got: Tensor | None, want: Tensor, what: str = "") -> bool:
    assert got is not None, what
    assert got.shape == want.shape, what
    tol = TOLERANCE[got.dtype] * max(1.0, float(want.abs().max()))
    worst = float((got.double() - want.double()).abs().max())
    assert worst <= tol, (what, worst, tol)
    return True


def build(
    t: dict[str, Tensor],
    dtype: torch.dtype,
    *,
    router: dict[str, Any],
    balance: float | None = None,
    kind: str = "switch",
    settings: dict[str, Any] | None = None,
    pre: str = "",
) -> tuple[Any, Any]:
    """A wrapped one-layer model with the parameters of a file, and its site."""
    A, B, R = t[pre + "plain.A"], t[pre + "plain.B"], t[pre + "plain.router"]
    weight = t.get(pre + "base.weight", torch.zeros(B.shape[1], A.shape[-1]).double())
    raw: dict[str, Any] = {
        "target_modules": ["lin"],
        "experts": {
            "kind": "lora",
            "num_experts": len(B),
            "r": A.shape[-2],
            "lora_alpha": float(t["scale"]) * A.shape[-2],
            "shared": ["A"] if A.dim() == 2 else [],
        },
        "router": router,
    }
    if balance is not None:
        raw["balance"] = [{"kind": kind, "weight": balance, **(settings or {})}]
    config = molora.AdapterConfig.from_dict(raw)
    model = molora.wrap(Layer(weight.clone(), t.get(pre + "base.bias")), config)
    model.to(dtype).train()
    site: Any = sites(model)["lin"]
    with torch.no_grad():
        site.experts.A.copy_(A if A.dim() == 3 else A[None])
        site.experts.Bt.copy_(B.transpose(1, 2))
        site.router.gate.weight.copy_(R)
    return model, site


def check(
    t: dict[str, Tensor], model: Any, site: Any, *, pre: str = "", out: str = ""
) -> dict[str, Tensor | None]:
    """Compare output, gates and every gradient; return the gradients."""
    dtype = site.experts.A.dtype
    x = t[pre + "x"].detach().to(dtype).requires_grad_()
    with molora.record_routing(model) as trace:
        y = model(x)
    (y * t[pre + "c"].to(dtype)).sum().backward()
    near(y.detach(), t[out + "y"], "y")
    near(trace.sites["lin"].gates[0], t[out + "gates"], "recorded gates")
    gates = site.router(x.detach().flatten(0, 1), ForwardContext()).gates.detach()
    near(gates.view_as(t[out + "gates"]), t[out + "gates"], "gates")
    dA, dB = site.experts.A.grad, site.experts.Bt.grad.transpose(1, 2)
    dA = dA if t[out + "grad.A"].dim() == 3 else dA[0]
    got = {"A": dA, "B": dB, "router": site.router.gate.weight.grad, "x": x.grad}
    for name, value in got.items():
        near(value, t[f"{out}grad.{name}"], f"grad.{name}")
    return got
