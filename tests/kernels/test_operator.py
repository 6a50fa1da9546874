"""The op under torch.library and torch.compile."""

from typing import Any

import pytest
import torch
from torch import Tensor

from molora.kernels import lowrank_mixture
from molora.kernels.autograd import lowrank_mixture_backward_op, lowrank_mixture_op


def arguments(
    T: int = 6, E: int = 3, dtype: torch.dtype = torch.float32, shared: str = ""
) -> list[Any]:
    g = torch.Generator().manual_seed(0)
    made = [
        torch.randn(T, 8, generator=g).to(dtype),
        torch.randn(T, 12, generator=g).to(dtype),
        torch.randn(1 if shared == "A" else E, 4, 8, generator=g),
        torch.randn(1 if shared == "B" else E, 4, 12, generator=g),
        torch.rand(T, E, generator=g),
    ]
    return [tensor.requires_grad_() for tensor in made]


SCALE_E = torch.tensor([0.5, 1.0, 2.0])


@pytest.mark.parametrize("T", [0, 1, 6, 20])
@pytest.mark.parametrize("shared", ["", "A", "B"])
@pytest.mark.parametrize("scale_E", [None, SCALE_E])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(
    T: int, shared: str, scale_E: Tensor | None, dtype: torch.dtype
) -> None:
    args = (
        *arguments(T, dtype=dtype, shared=shared),
        0.7,
        scale_E,
        "torch",
        2,
        0.0,
        None,
    )
    torch.library.opcheck(lowrank_mixture_op, args)


def test_opcheck_of_one_expert_and_of_the_backward() -> None:
    x, base, A, Bt, gates = arguments(E=1)
    args: tuple[Any, ...] = (x, None, A, Bt, None, 0.7, None, "torch", None, 0.0, None)
    torch.library.opcheck(lowrank_mixture_op, args)
    dy = torch.randn(6, 12)
    z = torch.randn(6, 4)
    for needs in ([True] * 4, [True, False, False, False], [False] * 4):
        detached = (t.detach() for t in (x, z, A, Bt, gates))
        rest = (0.7, None, "torch", None, 0.0, None, needs)
        torch.library.opcheck(lowrank_mixture_backward_op, (dy, *detached, *rest))


@pytest.mark.parametrize("shared", ["", "A", "B"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_compiles_whole_and_equals_eager(shared: str, dynamic: bool) -> None:
    def step(x: Tensor, base: Tensor, A: Tensor, Bt: Tensor, gates: Tensor) -> Tensor:
        return lowrank_mixture(x, A, Bt, gates, SCALE_E, base, top_k=2).square()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (6, 20):
        results = []
        for function in (step, compiled):
            args = arguments(T, shared=shared)
            y = function(*args)
            y.sum().backward()
            results.append([y.detach(), *(a.grad for a in args)])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager)


@pytest.mark.parametrize("backend", ["reference", "sorted", "triton_grouped"])
def test_backends_without_fixed_sizes_decline_inside_compile(backend: str) -> None:
    def step(x: Tensor, base: Tensor, A: Tensor, Bt: Tensor, gates: Tensor) -> Tensor:
        return lowrank_mixture(x, A, Bt, gates, 0.5, base, backend, top_k=2)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=f"{backend}' declined: inside torch.compile"):
        compiled(*arguments())


def test_a_named_backend_compiles() -> None:
    def step(x: Tensor, base: Tensor, A: Tensor, Bt: Tensor, gates: Tensor) -> Tensor:
        return lowrank_mixture(x, A, Bt, gates, 0.5, base, "torch")

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    args = arguments()
    torch.testing.assert_close(compiled(*args), step(*args))


def test_compiles_under_autocast() -> None:
    def step(x: Tensor, base: Tensor, A: Tensor, Bt: Tensor, gates: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return lowrank_mixture(x, A, Bt, gates, 0.5, base.bfloat16())

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    args = arguments(20)
    got, want = compiled(*args), step(*args)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want)
