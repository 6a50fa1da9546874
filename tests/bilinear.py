"""Banks of bilinear experts by themselves, and the numbers they are checked against."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from molora.experts import EXPERTS, FactorExperts
from tests.oracle import FOLDER, near

FAMILIES: dict[str, dict[str, Any]] = {
    "lora": {"r": 3},
    "adalora": {"init_r": 3},
    "sora": {"r": 3},
    "alora": {"r": 3},
    "bilora": {"r": 3, "singular_values": "softmax"},
    "vera": {"r": 7},
    "aflora": {"r": 3},
    "lotr": {"r": 3},
    "melora": {"num_parts": 2, "r": [2, 1]},
    "prolora": {"r": 5, "in_chunks": 4, "out_chunks": 3},
}
"""Settings of every bilinear family with few ranks."""


def numbers(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a file, and the settings they were made with."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        hyper = json.loads(file.metadata()["hyper"])
        return {k: file.get_tensor(k) for k in file.keys()}, hyper  # noqa: SIM118


def bank(kind: str, wide_in: int, wide_out: int, **settings: Any) -> Any:
    """A bank by itself, in float64."""
    cls = EXPERTS[kind]
    assert issubclass(cls, FactorExperts)
    made = cls(
        cls.Config.from_dict({"kind": kind, **settings}),  # type: ignore[arg-type]
        in_features=wide_in,
        out_features=wide_out,
        generator=torch.Generator().manual_seed(0),
    )
    return made.double()


def randomised(experts: Any, seed: int = 0) -> Any:
    """Give every parameter that is trained random values."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in experts.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(values)
    return experts


def check_single(
    experts: Any, t: Mapping[str, Tensor], tensors: dict[str, Tensor], pre: str = ""
) -> None:
    """Compare one expert with a file: output, every gradient, merged weight.

    Args:
        experts: A bank of one expert.
        t: The file.
        tensors: What the file has for each parameter, by the name of the bank's, and
            ``grad.`` with that name for its gradient.
        pre: Put before the names of the layer.
    """
    for name, values in tensors.items():
        if not name.startswith("grad."):
            getattr(experts, name).data.copy_(values)
    x = t[pre + "x"].flatten(0, -2).clone().requires_grad_()
    weight, bias = t[pre + "base.weight"], t[pre + "base.bias"]
    y = experts(x, None, nn.functional.linear(x, weight, bias))
    assert near(y.detach(), t[pre + "y"].flatten(0, -2), "y")
    experts.zero_grad()
    (y * t[pre + "c"].flatten(0, -2)).sum().backward()
    assert near(x.grad, t[pre + "grad.x"].flatten(0, -2), "grad.x")
    for name, values in tensors.items():
        if name.startswith("grad."):
            got = getattr(experts, name.removeprefix("grad.")).grad
            assert near(got, values.expand_as(got), name)
    merged = weight + experts.delta_weight(0, weight)
    assert near(merged.detach(), t[pre + "merged.weight"], "merged")
