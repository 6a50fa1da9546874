"""The sum over experts that recomputes: gradients, what it keeps, precision."""

import pytest
import torch
from torch import Tensor

from molora.experts.gated_sum import gated_sum
from tests.families import gates_of, off

T, E, M, N = 7, 3, 4, 5


def update(values: Tensor, up: Tensor, shift: Tensor) -> Tensor:
    """A nonlinear one."""
    return torch.tanh(values @ up + shift)


def leaves(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(T, M), (E, M, N), (E, N)]
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [leaf.to(dtype).requires_grad_() for leaf in made]


def explicit(x: Tensor, up: Tensor, shift: Tensor, gates: Tensor) -> Tensor:
    parts = [gates[:, e, None] * update(x, up[e], shift[e]) for e in range(E)]
    return torch.stack(parts).sum(0)


def test_gradients_are_those_of_finite_differences() -> None:
    gates = gates_of(T, E).requires_grad_()

    def function(x: Tensor, up: Tensor, shift: Tensor, gates: Tensor) -> Tensor:
        return gated_sum(update, x, [up, shift], gates)

    assert torch.autograd.gradcheck(function, (*leaves(), gates))


@pytest.mark.parametrize("top_k", [None, 2])
def test_it_is_the_explicit_sum(top_k: int | None) -> None:
    x, up, shift = leaves()
    gates = gates_of(T, E, top_k).requires_grad_()
    got = gated_sum(update, x, [up, shift], gates, top_k)
    want = explicit(x, up, shift, gates)
    c = torch.randn(T, N, dtype=torch.float64)
    ours = torch.autograd.grad((got * c).sum(), [x, up, shift, gates])
    theirs = list(torch.autograd.grad((want * c).sum(), [x, up, shift, gates]))
    if top_k is not None:
        theirs[-1] = theirs[-1] * (gates != 0)
    assert off(got, want) < 1e-12
    for own, right in zip(ours, theirs, strict=True):
        assert off(own, right) < 1e-12


def test_tokens_without_the_expert_are_not_computed() -> None:
    rows = []

    def counted(values: Tensor, up: Tensor) -> Tensor:
        rows.append(len(values))
        return values @ up

    x, up, _ = leaves()
    gated_sum(counted, x, [up], gates_of(T, E, 1), 1)
    assert sum(rows) == T
    rows.clear()
    gated_sum(counted, x, [up], gates_of(T, E, 1))
    assert rows == [T] * E


def test_it_keeps_its_inputs_alone() -> None:
    x, up, shift = leaves()
    gates = gates_of(T, E).requires_grad_()
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = gated_sum(update, x, [up, shift], gates)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, up, shift, gates)}
    y.sum().backward()
    assert x.grad is not None


def test_what_is_frozen_gets_no_gradient() -> None:
    x, up, shift = leaves()
    gates = gates_of(T, E)
    gated_sum(update, x, [up, shift.detach()], gates).sum().backward()
    want = torch.autograd.grad(explicit(x, up, shift, gates).sum(), [x, up])
    assert shift.grad is None and gates.grad is None
    assert off(x.grad, want[0]) < 1e-12 and off(up.grad, want[1]) < 1e-12


@pytest.mark.parametrize("gated", [True, False])
def test_autocast_narrows_and_keeps_float64(gated: bool) -> None:
    gates = gates_of(T, E).float() if gated else None
    for dtype, wanted in [
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float64),
    ]:
        x, up, shift = leaves(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            y = gated_sum(update, x, [up, shift], gates)
        assert y.dtype == wanted
        y.sum().backward()
        assert x.grad is not None and x.grad.dtype == dtype
        assert up.grad is not None and up.grad.dtype == dtype


def test_a_compiled_graph_gives_the_same() -> None:
    x, up, shift = leaves()
    gates = gates_of(T, E)
    compiled = torch.compile(gated_sum, backend="eager", fullgraph=True)
    assert off(
        compiled(update, x, [up, shift], gates), explicit(x, up, shift, gates)
    ) < (1e-12)
