"""The routing kernels in the interpreter, against the formula in float64."""

import pytest
import torch
from torch import Tensor

from molora.kernels import triton_topk
from tests.kernels.routed import count_launches, error

pytestmark = pytest.mark.usefixtures("exact_interpreter", "poisoned")


def formula(
    x: Tensor, weight: Tensor, top_k: int, temperature: float, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """Logits and gates, with a softmax over those that share the gate."""
    logits = x @ weight.t() / temperature
    ids = logits.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    if renormalize:
        kept = torch.softmax(logits.gather(1, ids), -1)
    else:
        kept = torch.softmax(logits, -1).gather(1, ids)
    return logits, torch.zeros_like(logits).scatter(1, ids, kept)


def agrees(
    x: Tensor,
    weight: Tensor,
    top_k: int,
    renormalize: bool,
    temperature: float = 1.0,
    reads: str = "logits gates",
) -> bool:
    """Compare logits, gates and the gradients of a loss that reads some of them."""
    flag = torch.ones(1, dtype=torch.uint8)
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    rest = (top_k, temperature, renormalize)
    found = triton_topk.TopK.apply(*leaves, flag, *rest)  # type: ignore[no-untyped-call]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = formula(*exact, *rest)
    g = torch.Generator().manual_seed(1)
    names = ("logits", "gates")
    pulls = [torch.randn(wanted[0].shape, generator=g) for _ in names]
    # nothing is said of the gradient of a gate that is zero
    pulls[1] = torch.where(wanted[1] != 0, pulls[1], torch.nan)
    used = [i for i, name in enumerate(names) if name in reads]
    got = torch.autograd.grad(
        [found[i] for i in used], leaves, [pulls[i] for i in used]
    )
    right = torch.autograd.grad(
        [wanted[i] for i in used],
        exact,
        [pulls[i].double().nan_to_num() for i in used],
    )
    near = 1e-5 if x.dtype == torch.float32 else 5e-3
    outputs = zip(found, (value.detach() for value in wanted), strict=True)
    gradients = zip(got, right, strict=True)
    good = all(error(a, b) < 1e-5 for a, b in outputs)
    return good and all(error(a, b) < near for a, b in gradients) and bool(flag)


def make(T: int, I: int, E: int, seed: int = 0) -> tuple[Tensor, Tensor]:  # noqa: E741
    g = torch.Generator().manual_seed(seed)
    return torch.randn(T, I, generator=g), torch.randn(E, I, generator=g) / I**0.5


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(
    ("T", "I", "E", "K"),
    [
        pytest.param(1, 700, 8, 2, id="one token"),
        pytest.param(1, 40, 21, 3, id="one token, more experts than 16"),
        pytest.param(37, 65, 7, 2, id="ragged, prime experts"),
        pytest.param(300, 130, 8, 3, id="several parts of the gradient"),
        pytest.param(20, 64, 5, 5, id="every expert"),
        pytest.param(19, 24, 70, 1, id="one of many"),
    ],
)
def test_definition(T: int, I: int, E: int, K: int, renormalize: bool) -> None:  # noqa: E741
    assert agrees(*make(T, I, E), K, renormalize, temperature=0.7)


@pytest.mark.parametrize("reads", ["logits", "gates"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_a_loss_that_reads_one_of_the_two(reads: str, renormalize: bool) -> None:
    assert agrees(*make(33, 48, 6), 2, renormalize, reads=reads)


def test_half_precision_and_strides() -> None:
    x, weight = make(33, 48, 6)
    assert agrees(x.bfloat16(), weight, 2, True)
    assert agrees(x.half(), weight, 2, False)
    assert agrees(torch.cat([x, x + torch.nan], 1)[:, :48], weight, 2, True)
    assert agrees(x.t().contiguous().t(), weight, 2, True)


def test_no_tokens() -> None:
    x, weight = (t.requires_grad_() for t in make(0, 24, 4))
    flag = torch.ones(1, dtype=torch.uint8)
    logits, gates = triton_topk.TopK.apply(x, weight, flag, 2, 1.0, True)  # type: ignore[no-untyped-call]
    (gates.sum() + logits.sum()).backward()
    assert gates.shape == (0, 4) and x.grad is not None and x.grad.shape == (0, 24)
    assert weight.grad is not None and not weight.grad.any()


def test_of_equal_logits_the_first_experts_are_taken() -> None:
    weight = torch.ones(5, 16)
    flag = torch.ones(1, dtype=torch.uint8)
    _, gates = triton_topk.gates_of(torch.ones(3, 16), weight, flag, 2, 1.0, True)
    assert torch.equal(gates, torch.tensor([[0.5, 0.5, 0, 0, 0]]).expand(3, 5))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("T", [1, 40])
def test_a_logit_that_is_not_finite_clears_the_flag(T: int, value: float) -> None:
    x, weight = make(T, 24, 4)
    flag = torch.ones(1, dtype=torch.uint8)
    triton_topk.gates_of(x, weight, flag, 2, 1.0, True)
    assert flag == 1
    x[-1, 3] = value
    triton_topk.gates_of(x, weight, flag, 2, 1.0, True)
    assert flag == 0


def test_a_single_logit_that_is_not_finite_clears_the_flag() -> None:
    x, weight = make(1, 24, 4)
    weight[2, 5] = torch.inf
    flag = torch.ones(1, dtype=torch.uint8)
    logits, _ = triton_topk.gates_of(x, weight, flag, 2, 1.0, True)
    assert torch.isfinite(logits).sum() == 3 and flag == 0


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = (t.requires_grad_() for t in make(40, 24, 4))
    flag = torch.ones(1, dtype=torch.uint8)
    names = count_launches(monkeypatch)
    _, gates = triton_topk.TopK.apply(x, weight, flag, 2, 1.0, True)  # type: ignore[no-untyped-call]
    assert names == ["topk_gates"]
    gates.square().sum().backward()
    assert names == ["topk_gates", "topk_dx", "topk_dw"]
