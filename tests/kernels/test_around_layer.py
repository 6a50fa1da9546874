"""The op around a frozen layer: gradients of the plain composition, in one pass."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from molora.errors import ConfigError
from molora.kernels import choice, lowrank_mixture, machine, triton_tiles
from molora.kernels.cost_model import Shape, fastest
from tests.kernels.test_lowrank_mixture import by_einsum

BACKENDS = ["torch", "sorted", "reference"]
TRITON = ["triton", "triton_grouped"]


class Call:
    """Arguments of a call, and the plain composition of layer and update."""

    def __init__(self, T: int = 20, dtype: torch.dtype = torch.float64):
        g = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            made = torch.randn(*shape, generator=g, dtype=torch.float64)
            return made.to(dtype).requires_grad_()

        self.x, self.A, self.Bt = draw(T, 24), draw(6, 4, 24), draw(6, 4, 20)
        chosen = torch.rand(T, 6, generator=g).topk(2).indices
        gates = torch.zeros(T, 6).scatter(1, chosen, torch.rand(T, 2, generator=g))
        self.gates = gates.to(torch.promote_types(dtype, torch.float32))
        self.gates.requires_grad_()
        self.layer = nn.Linear(24, 20).to(dtype).requires_grad_(False)
        self.dy = torch.randn(T, 20, generator=g, dtype=torch.float64).to(dtype)
        self.leaves = (self.x, self.A, self.Bt, self.gates)

    def run(self, backend: str = "torch", layer: Any = None, **options: Any) -> Tensor:
        call = (self.x, self.A, self.Bt, self.gates, 0.7, layer or self.layer, backend)
        return lowrank_mixture(*call, top_k=2, **options)

    def plain(self) -> list[Tensor]:
        base = self.layer(self.x)
        y = by_einsum(self.x, self.A, self.Bt, self.gates, 0.7, base)
        grads = torch.autograd.grad(y, self.leaves, self.dy)
        return [y, *grads[:3], grads[3] * (self.gates != 0)]


def same(found: list[Tensor], wanted: list[Tensor], limit: float = 1e-12) -> bool:
    pairs = zip(found, wanted, strict=True)
    return all((one - other).norm() <= limit * other.norm() for one, other in pairs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_result_and_gradients(backend: str) -> None:
    call = Call(dtype=torch.float32 if backend == "sorted" else torch.float64)
    y = call.run(backend)
    dx, dA, dBt, dgates = torch.autograd.grad(y, call.leaves, call.dy)
    limit = 1e-5 if backend == "sorted" else 1e-12
    assert same([y, dx, dA, dBt, dgates * (call.gates != 0)], call.plain(), limit)


@pytest.mark.usefixtures("exact_interpreter", "poisoned")
@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_triton_adds_onto_the_gradient_of_the_layer(
    backend: str, dropout: float
) -> None:
    call = Call(dtype=torch.float32)
    given: dict[str, Any] = {"dropout": dropout, "seed": 2**40 + 3}
    y = call.run(backend, **given)
    found = torch.autograd.grad(y, call.leaves, call.dy)
    parts = (call.x, call.A, call.Bt, call.gates, 0.7, call.layer(call.x), backend)
    whole = lowrank_mixture(*parts, top_k=2, **given)
    wanted = torch.autograd.grad(whole, call.leaves, call.dy)
    assert same([y, *found], [whole, *wanted], 1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    call = Call()
    y = checkpoint(lambda x: call.run(), call.x, use_reentrant=reentrant)
    y.backward(call.dy)
    found = [leaf.grad for leaf in call.leaves]
    wanted = call.plain()
    assert all(grad is not None for grad in found)
    found[3] = found[3] * (call.gates != 0)
    assert same([y, *found], wanted)


def test_some_gradients_only_and_several_passes() -> None:
    call = Call()
    wanted, y = call.plain(), call.run()
    for place in (1, 2, 0, 1):
        leaf = call.leaves[place]
        found = torch.autograd.grad(y, leaf, call.dy, retain_graph=True)
        assert same([*found], [wanted[1 + place]])
    # two forwards before one backward, and x used by something else as well
    both = call.run() + 2 * call.run() + call.x.sum()
    dx = torch.autograd.grad(both, call.x, call.dy)[0]
    assert same([dx], [3 * wanted[1] + call.dy.sum()])


def test_a_pass_that_ends_at_the_layer_leaves_nothing_behind() -> None:
    call, seen = Call(), {}
    hook = call.layer.register_forward_hook(lambda m, i, o: seen.update(h=o))
    y = call.run()
    hook.remove()
    torch.autograd.grad(y, seen["h"], call.dy, retain_graph=True)
    # the layer's output is no function of A
    rest = torch.autograd.grad(seen["h"].sum(), call.A, allow_unused=True)
    assert rest[0] is None or not rest[0].any()


def test_a_layer_without_gradient_and_one_of_another_shape() -> None:
    call = Call()

    def cut(x: Tensor) -> Tensor:
        return call.layer(x.detach())

    y = call.run(layer=cut)
    wanted = call.plain()
    assert same(
        [y, *torch.autograd.grad(y, call.leaves[1:3], call.dy)],
        [wanted[0], *wanted[2:4]],
    )
    with pytest.raises(ConfigError, match=r"the layer makes \(20, 1\)"):
        call.run(layer=lambda x: x[:, :1])


def test_products_keep_their_precision_under_autocast() -> None:
    call = Call(dtype=torch.bfloat16)
    call.A.data, call.Bt.data = call.A.data.float(), call.Bt.data.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = call.run()
        parts = (call.x, call.A, call.Bt, call.gates, 0.7, call.layer(call.x))
        whole = lowrank_mixture(*parts, top_k=2)
    assert torch.equal(y, whole) and y.dtype == torch.bfloat16
    found = torch.autograd.grad(y, call.leaves, call.dy)
    wanted = torch.autograd.grad(whole, call.leaves, call.dy)
    assert same([t.float() for t in found], [t.float() for t in wanted], 1e-2)


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Name of the form that a GPU would take, for tensors that have no memory."""
    monkeypatch.setattr(machine, "gpu", lambda device: machine.GPUS["sm_90"])
    for name in ("triton", "triton_grouped", "triton_gather"):
        path = choice.BACKENDS[name].load()
        original = path.why_not

        def reasons(x: Tensor, *rest: Any, ask: Any = original) -> list[str]:
            return [r for r in ask(x, *rest) if "is on" not in r]

        monkeypatch.setattr(path, "why_not", reasons)
    yield choice._auto_gpu


def test_one_mask_for_a_forward_and_its_recomputation(
    like_a_gpu: Callable[..., str],
) -> None:
    """Forms draw different masks; a reentrant forward runs without grad mode."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    differed = 0
    for T, r, K in [(512, 256, 8), (512, 256, 2), (1, 16, 2), (8192, 16, 2)]:
        x = meta(T, 4096, dtype=torch.bfloat16).requires_grad_()
        A, Bt = (meta(8, r, 4096).requires_grad_() for _ in range(2))
        call = (x, A, Bt, meta(T, 8), 1.0, meta(T, 4096, dtype=torch.bfloat16), K)
        with torch.no_grad():
            first, plain = like_a_gpu(*call, True), like_a_gpu(*call, False)
        assert first == like_a_gpu(*call, True)
        differed += plain != like_a_gpu(*call, False)
    # without a mask the forms only round differently, and may differ
    assert differed


def test_the_choice_for_few_tokens_without_gradients_gathers() -> None:
    s = Shape(1, 4096, 4096, 64, 16, 2, 2, False)
    names = ["triton", "triton_grouped", "triton_gather", "torch on a GPU"]
    assert fastest(names, s, machine.GPUS["sm_90"]) == "triton_gather"


def test_pointers_beyond_2_gib_are_told_apart_on_amd(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small, large = torch.empty(8, device="meta"), torch.empty(2**29, device="meta")
    assert triton_tiles._pointer(small) == triton_tiles._pointer(large)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert triton_tiles._pointer(small) != triton_tiles._pointer(large)
