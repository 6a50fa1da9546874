"""The op under torch.library and torch.compile."""

from typing import Any

import pytest
import torch
from torch import Tensor

from molora.errors import ConfigError
from molora.kernels import (
    BACKENDS,
    choice,
    dispatch,
    lowrank_mixture,
    machine,
    operator,
)
from molora.kernels.operator import (
    lowrank_mixture_backward_op,
    lowrank_mixture_inference_op,
    lowrank_mixture_op,
)


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


@pytest.mark.parametrize("T", [0, 6])
@pytest.mark.parametrize("shared", ["", "A", "B"])
@pytest.mark.parametrize("scale_E", [None, SCALE_E])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(
    T: int, shared: str, scale_E: Tensor | None, dtype: torch.dtype
) -> None:
    made = arguments(T, dtype=dtype, shared=shared)
    rest = (0.7, scale_E, "auto", 2, 0.0, None)
    torch.library.opcheck(lowrank_mixture_op, (*made, *rest, [True] * 5))
    made = [tensor.detach() for tensor in made]
    torch.library.opcheck(lowrank_mixture_inference_op, (*made, *rest, [False] * 5))


@pytest.mark.usefixtures("exact_interpreter")
@pytest.mark.parametrize("backend", ["sorted", "triton", "triton_grouped"])
def test_opcheck_of_each_backend(backend: str) -> None:
    rest = (0.7, None, backend, 2, 0.3, torch.tensor(11), [True] * 5)
    torch.library.opcheck(lowrank_mixture_op, (*arguments(6), *rest))


def test_opcheck_of_one_expert_and_of_the_backward() -> None:
    x, base, A, Bt, gates = arguments(E=1)
    rest = (None, 0.0, None)
    args: tuple[Any, ...] = (x, None, A, Bt, None, 0.7, None, "torch", *rest)
    torch.library.opcheck(lowrank_mixture_op, (*args, [True] * 5))
    dy, kept = torch.randn(6, 12), torch.randn(6, 4).view(-1).view(torch.uint8)
    x, A, Bt, gates = (t.detach() for t in (x, A, Bt, gates))
    for needs in ([True] * 4, [True, False, False, False], [False] * 4):
        call = (dy, x, kept, torch.tensor(0), A, Bt, gates, 0.7, None, *rest, needs)
        torch.library.opcheck(lowrank_mixture_backward_op, call)


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


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the backends that compute from now on, forward and backward."""
    names: list[str] = []

    def noted(name: str, call: Any) -> Any:
        def noting(*args: Any, **rest: Any) -> Any:
            names.append(name)
            return call(*args, **rest)

        return noting

    for name, backend in BACKENDS.items():
        path: Any = backend.load()
        for part in ("forward", "backward"):
            if hasattr(path, part):
                call = noted(f"{name} {part}", getattr(path, part))
                monkeypatch.setattr(path, part, call)
    return names


def runs(function: Any, args: list[Tensor], trains: bool) -> list[Tensor]:
    """Result, and gradients of the arguments where it trains."""
    if not trains:
        with torch.inference_mode():
            return [function(*args)]
    y = function(*args)
    return [y.detach(), *torch.autograd.grad(y.sum(), args)]


def compiled(function: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")


@pytest.mark.usefixtures("exact_interpreter")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_a_named_backend_compiles(
    backend: str, dropout: float, used: list[str]
) -> None:
    def step(x: Tensor, base: Tensor, A: Tensor, Bt: Tensor, gates: Tensor) -> Tensor:
        options: Any = {"top_k": 2, "dropout": dropout, "seed": 2**40 + 3}
        return lowrank_mixture(x, A, Bt, gates, 0.5, base, backend, **options)

    trains = backend not in ("gather", "triton_gather")
    args = arguments()
    args[4].data[:, 0] = 0
    want = runs(step, args, trains)
    eager, used[:] = [*used], []
    torch.testing.assert_close(runs(compiled(step), args, trains), want)
    assert used == eager == [f"{backend} forward", f"{backend} backward"][: 1 + trains]


@pytest.mark.usefixtures("exact_interpreter")
@pytest.mark.parametrize(
    ("trains", "name"), [(True, "triton"), (False, "triton_gather")]
)
def test_a_graph_takes_the_form_that_eager_takes_on_a_gpu(
    trains: bool, name: str, used: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_gpu(backend: str, *call: Any) -> str:
        return backend if torch.compiler.is_compiling() else choice._auto_gpu(*call)

    monkeypatch.setattr(machine, "gpu", lambda device: machine.GPUS["sm_90"])
    monkeypatch.setattr(dispatch, "choose", as_gpu)
    monkeypatch.setattr(operator, "choose", as_gpu)

    def step(x: Tensor, base: Tensor, A: Tensor, Bt: Tensor, gates: Tensor) -> Tensor:
        return lowrank_mixture(x, A, Bt, gates, 0.5, base, top_k=2)

    args = arguments(2)
    args[4].data[:, 0] = 0
    want = runs(step, args, trains)
    eager, used[:] = [*used], []
    torch.testing.assert_close(runs(compiled(step), args, trains), want)
    assert used == eager and used[0] == f"{name} forward"


@pytest.mark.parametrize("tokens", [256, 4])
def test_a_graph_takes_the_form_that_eager_takes_on_a_cpu(
    tokens: int, used: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = machine.Machine(gemm=1e9, grouped=1e9, bandwidth=1e10, launch=1e-6)
    monkeypatch.setattr(machine, "cpu", lambda dtype, threads: slow)
    choice._known_on_cpu.cache_clear()
    A, Bt = torch.randn(64, 8, 128), torch.randn(64, 8, 64)

    def step(x: Tensor, gates: Tensor) -> Tensor:
        return lowrank_mixture(x, A, Bt, gates, 0.5, top_k=2)

    ids = torch.rand(tokens, 64).topk(2).indices
    gates = torch.zeros(tokens, 64).scatter(1, ids, 0.5).requires_grad_()
    args = [torch.randn(tokens, 128, requires_grad=True), gates]
    want = runs(step, args, True)
    eager, used[:] = [*used], []
    got = runs(compiled(step), args, True)
    choice._known_on_cpu.cache_clear()
    assert used == eager
    assert eager[0] == ("sorted forward" if tokens == 256 else "torch forward")
    # the torch form also has the gradient of gates that are zero, which nothing reads
    torch.testing.assert_close(got, want)


def test_what_is_wrong_is_said_inside_compile() -> None:
    def step(gates: Tensor, A: Tensor, Bt: Tensor, backend: str = "sorted") -> Tensor:
        return lowrank_mixture(x, A, Bt, gates, 0.5, base, backend, top_k=2)

    x, base, A, Bt, gates = arguments()
    with pytest.raises(ConfigError, match="'sorted' declined: .*r=3.*16 bytes"):
        compiled(step)(gates, A[:, :3], Bt[:, :3])
    for given, message in (
        ((torch.rand(5, 3), A, Bt), "shapes do not fit"),
        ((gates, A, Bt, "fast"), "'fast' is unknown"),
        ((gates, A, Bt, "reference"), "its backward is autograd"),
    ):
        with pytest.raises(Exception, match=message):
            compiled(step)(*given)


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
