"""Calls with top-k routing, and what they must give, for the tests of the kernels."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from molora.kernels.reference import reference


class Call(NamedTuple):
    """Arguments of a backend's forward."""

    x: Tensor
    base: Tensor | None
    A: Tensor
    Bt: Tensor
    gates: Tensor
    scale: float | Tensor
    top_k: int


def make(
    T: int,
    I: int,  # noqa: E741
    O: int,  # noqa: E741
    E: int,
    r: int,
    K: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Call:
    """Random call in which every token uses K of E experts."""
    g = torch.Generator().manual_seed(seed)
    logits, index = torch.randn(T, E, generator=g).topk(K, 1)
    return Call(
        torch.randn(T, I, generator=g).to(dtype),
        torch.randn(T, O, generator=g).to(dtype),
        torch.randn(E, r, I, generator=g) / I**0.5,
        torch.randn(E, r, O, generator=g) / r**0.5,
        torch.zeros(T, E).scatter(1, index, logits.softmax(1)),
        torch.rand(E, generator=g) + 0.5,
        K,
    )


def expected(call: Call, dy: Tensor, keep: Tensor | None = None) -> list[Tensor]:
    """Result and gradients of x, A, Bt and gates by the definition in float64.

    The gradient of a gate that is zero is zero: the token does not use the expert.
    """
    given = (call.x, call.A, call.Bt, call.gates)
    x, A, Bt, gates = (t.detach().double().requires_grad_() for t in given)
    read = x if keep is None else x * keep
    y = reference(read, A, Bt, gates, call.scale, call.base)
    gradients = torch.autograd.grad(y, (x, A, Bt, gates), dy.double())
    return [y.detach(), *gradients[:3], gradients[3] * (gates != 0)]


def rounded(call: Call, dy: Tensor) -> list[Tensor]:
    """The same with exact sums and one rounding for each tensor that is stored."""
    dtype = call.x.dtype

    def stored(t: Tensor) -> Tensor:
        return t.to(dtype).double()

    x, A, Bt, dy = call.x.double(), stored(call.A), stored(call.Bt), dy.double()
    weight = (call.gates.double() * call.scale)[:, :, None]
    z = stored(torch.einsum("ti,eri->ter", x, A))
    zg = stored(z * weight)
    y = torch.einsum("ter,ero->to", zg, Bt)
    h = torch.einsum("to,ero->ter", dy, Bt)
    dz = stored(h * weight)
    scale = torch.as_tensor(call.scale, dtype=torch.float64)
    return [
        stored(y if call.base is None else y + call.base.double()),
        stored(torch.einsum("ter,eri->ti", dz, A)),
        torch.einsum("ter,ti->eri", dz, x),
        torch.einsum("ter,to->ero", zg, dy),
        (h * z).sum(2) * scale * (call.gates != 0),
    ]


def error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    assert found.shape == wanted.shape
    return float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


def philox_keep(seed: int, p: float, T: int, I: int) -> Tensor:  # noqa: E741
    """Dropout mask by Philox4x32-10 (Salmon et al. 2011), with its scaling.

    The counter is the place of the element and the key the seed; the first word, as
    the distance of a signed number from 0 or -1, is the uniform number.
    """
    place = np.arange(T * I, dtype=np.uint64)
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    c = [place & low, place >> high, place * 0, place * 0]
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)
    for _ in range(10):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (second >> high) ^ c[1] ^ k0,
            second & low,
            (first >> high) ^ c[3] ^ k1,
            first & low,
        ]
        k0 = (k0 + np.uint64(0x9E3779B9)) & low
        k1 = (k1 + np.uint64(0xBB67AE85)) & low
    word = c[0].astype(np.uint32).view(np.int32)
    uniform = np.where(word < 0, ~word, word) * np.float32(4.6566127342e-10)
    return torch.from_numpy((uniform >= p) / (1 - p)).view(T, I)


def count_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched from now on, in order."""
    names: list[str] = []
    original = interpreter.GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    return names
