"""One layer under experts of a family, compared with numbers and definitions.

T tokens, E experts, as in molora.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

import molora
from molora.model import sites

FOLDER = Path(__file__).parent / "oracles"
Delta = Callable[[int, Tensor], Tensor]
"""Update of one expert for [T, I], written down anew from its parameters."""


def vector(name: str, pre: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a file of oracles/, those under a prefix, and its settings."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        hyper = json.loads(file.metadata()["hyper"])
        names = [n for n in file.keys() if n.startswith(pre)]  # noqa: SIM118
        return {n.removeprefix(pre): file.get_tensor(n) for n in names}, hyper


def site_of(
    experts: Mapping[str, Any], weight: Tensor, bias: Tensor | None = None, E: int = 1
) -> Any:
    """A wrapped linear layer, all of it in the dtype of the weight."""
    layer = nn.Linear(*reversed(weight.shape), bias=bias is not None)
    layer.weight.data = weight.clone()
    if bias is not None:
        layer.bias.data = bias.clone()
    raw = {
        "target_modules": ["lin"],
        "experts": {**experts, "num_experts": E},
        "router": {"kind": "soft"} if E > 1 else {"kind": "none"},
    }
    model = nn.ModuleDict({"lin": layer})
    molora.wrap(model, molora.AdapterConfig.from_dict(raw)).to(weight.dtype)
    return sites(model)["lin"]


def layer_of(outs: int, ins: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weight and bias of a random layer in float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outs, ins, generator=generator, dtype=torch.float64)
    return weight, torch.randn(outs, generator=generator, dtype=torch.float64)


def disturb(site: Any, size: float = 0.3) -> None:
    """Random values for all parameters of the experts."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in site.experts.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(size * noise.to(parameter.dtype))


def run(site: Any, x: Tensor, gates: Tensor | None, top_k: int | None = None) -> Tensor:
    """The layer with given gates."""
    y: Tensor = site.host.run(site, x, x, gates, top_k)
    return y


def off(got: Tensor | None, want: Tensor) -> float:
    """Largest difference, relative to the largest entry where that is over 1."""
    assert got is not None
    assert got.shape == want.shape, (got.shape, want.shape)
    got, want = got.detach(), want.detach()
    worst = (got.double() - want.double()).abs().max() if want.numel() else 0.0
    size = want.abs().max() if want.numel() else 0.0
    return float(worst) / max(1.0, float(size))


def gates_of(T: int, E: int, top_k: int | None = None) -> Tensor:
    """Random gates in float64 that do not sum to one; at most top_k are not zero."""
    generator = torch.Generator().manual_seed(3)
    gates = torch.rand(T, E, generator=generator, dtype=torch.float64) + 0.1
    if top_k is None:
        # tokens without any expert, and experts that a token does not use
        gates[0] = 0
        gates[1, E - 1] = 0
        return gates
    chosen = gates.topk(top_k).indices
    return gates * torch.zeros_like(gates).scatter(1, chosen, 1.0)


def worst_of_sum(site: Any, delta: Delta, T: int = 6, top_k: int | None = None) -> Any:
    """Layer against base + sum_e g_e delta_e: the largest difference by what it is.

    Output and gradients of x, gates and every parameter of the experts. With top_k the
    gradients of gates that are zero are not read.
    """
    generator = torch.Generator().manual_seed(5)
    shape = T, site.in_features
    x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    E = site.experts.num_experts
    gates = gates_of(T, E, top_k).requires_grad_() if E > 1 else None
    got = run(site, x, gates, top_k)
    c = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    g_TE = torch.ones(T, 1, dtype=torch.float64) if gates is None else gates
    want = site.base(x)
    for e in range(E):
        want = want + g_TE[:, e : e + 1] * delta(e, x)
    leaves = {"x": x, **dict(site.experts.named_parameters())}
    leaves |= {} if gates is None else {"gates": gates}
    theirs = torch.autograd.grad((want * c).sum(), list(leaves.values()))
    ours = torch.autograd.grad((got * c).sum(), list(leaves.values()))
    found = {"y": off(got.detach(), want.detach())}
    for name, own, right in zip(leaves, ours, theirs, strict=True):
        if name == "gates" and top_k is not None:
            read = gates_of(T, E, top_k) != 0
            own, right = own * read, right * read
        found[name] = off(own, right)
    return found


def worst_of_vector(
    site: Any, t: dict[str, Tensor], grads: Mapping[str, Callable[[], Tensor]]
) -> dict[str, float]:
    """One expert against a file: output, gradients, merged weight.

    Args:
        site: With the parameters of the file.
        t: The file.
        grads: Our gradient in the file's layout by its name there.
    """
    x = t["x"].clone().requires_grad_()
    y = run(site, x, None)
    (y * t["c"]).sum().backward()
    found = {"y": off(y.detach(), t["y"]), "x": off(x.grad, t["grad.x"])}
    for name, grad in grads.items():
        found[name] = off(grad(), t[f"grad.{name}"])
    if "merged.weight" in t:
        merged = site.base.weight.detach() + site.delta_weight()
        found["merged"] = off(merged, t["merged.weight"])
    return found
