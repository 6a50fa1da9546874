"""Balance objectives: values by hand, and the gradient that they add in backward."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

import molora
from molora.context import Runtime
from molora.errors import RoutingError
from molora.model import adapter_parameters, sites
from molora.routers import Routing
from molora.routers.balance import attach
from tests.registered import LOSSES, objective
from tests.registered import value as value_of

Factory = Callable[..., PreTrainedModel]
MODES = {"eager": None, "non-reentrant": False, "reentrant": True}


def routing(probs: Tensor, K: int, sparse: bool = True) -> Routing:
    """Routing that chooses the K likeliest experts of given probabilities."""
    gates = probs
    if sparse:
        gates = probs * torch.zeros_like(probs).scatter(-1, probs.topk(K).indices, 1.0)
    return Routing(gates, probs, probs.log(), K if sparse else None)


@pytest.mark.parametrize("E", [2, 5, 8])
def test_uniform_routing_costs_one_for_every_k(E: int) -> None:
    T = 3 * E
    for K in range(1, E + 1):
        gates = torch.zeros(T, E)
        for t in range(T):
            gates[t, [(t + j) % E for j in range(K)]] = 1 / K
        uniform = torch.full((T, E), 1 / E)
        made = Routing(gates, uniform, torch.zeros(T, E), 2)
        mask = torch.ones(T, dtype=torch.bool)
        mask[E:] = False
        for m in (None, mask):
            assert objective("switch")(made, m) == pytest.approx(1, abs=1e-6)
        # everything to the same K experts
        gates = torch.zeros(T, E)
        gates[:, :K] = 1 / K
        made = Routing(gates, gates, torch.zeros(T, E), 2)
        assert objective("switch")(made, None) == pytest.approx(E / K, rel=1e-6)


def test_switch_by_hand() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.4, 0.5, 0.1]])
    # top-2: {0,1} {1,2} {0,1}: f = [2, 3, 1] / 6, P = [1.0, 1.4, 0.6] / 3
    want = 3 * (2 * 1.0 + 3 * 1.4 + 1 * 0.6) / 6 / 3
    assert objective("switch")(routing(p, 2), None) == pytest.approx(want)
    # without the second token: f = [2, 2, 0] / 4, P = [0.9, 0.8, 0.3] / 2
    mask = torch.tensor([True, False, True])
    want = 3 * (0.9 + 0.8) / 2 / 2
    assert objective("switch")(routing(p, 2), mask) == pytest.approx(want)
    # soft: each token counts for its likeliest expert, f = [1, 2, 0] / 3
    want = 3 * (1 * 1.0 + 2 * 1.4) / 3 / 3
    assert objective("switch")(routing(p, 0, False), None) == pytest.approx(want)


def test_z_by_hand() -> None:
    z = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [9.0, 9.0]])
    made = Routing(z, z, z, None)
    lse = [math.log(2), math.log(4), 9 + math.log(2)]
    want = sum(v**2 for v in lse) / 3
    assert objective("z")(made, None) == pytest.approx(want, rel=1e-6)
    mask = torch.tensor([True, True, False])
    want = sum(v**2 for v in lse[:2]) / 2
    assert objective("z")(made, mask) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("T", [0, 4])
def test_no_real_token_gives_zero_with_a_graph(kind: str, T: int) -> None:
    z = torch.randn(T, 3, generator=torch.Generator().manual_seed(0))
    z.requires_grad_()
    p = torch.softmax(z, -1)
    # the first logit stands in for lambda
    made = Routing(p, p, z, None, z[:, 0])
    masks = [torch.zeros(T, dtype=torch.bool)] + ([None] if T == 0 else [])
    for mask in masks:
        value = value_of(objective(kind), made, mask)
        assert value == 0
        (grad,) = torch.autograd.grad(value, z, retain_graph=True)
        assert torch.equal(grad, torch.zeros(T, 3))


@pytest.mark.parametrize("kind", LOSSES)
def test_padding_has_no_gradient_and_no_weight(kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(9, 4, generator=g, dtype=torch.float64)
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 0, 0, 1]).bool()
    values, grads = [], []
    for logits, m in ((z, mask), (z[mask], None)):
        leaf = logits.clone().requires_grad_()
        value = value_of(objective(kind), routing_of(leaf), m)
        values.append(value.item())
        grads.append(torch.autograd.grad(value, leaf)[0])
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    assert torch.allclose(grads[0][mask], grads[1], atol=1e-14)
    assert grads[0][~mask].abs().sum() == 0


def routing_of(z: Tensor) -> Routing:
    p = torch.softmax(z, -1)
    gates = p * torch.zeros_like(p).scatter(-1, p.topk(2).indices, 1.0)
    return Routing(gates, p, z, 2, z[:, 0])


def test_attach_is_an_identity_that_adds_the_gradient() -> None:
    runtime = Runtime()
    y = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    y.requires_grad_()
    w = torch.tensor([2.0, 3.0], requires_grad=True)
    out = attach(y, w.square().sum(), 0.25, runtime)
    assert torch.equal(out, y)
    # the scale is read in backward: trainers set it between forward and backward
    runtime.balance_scale = 8.0
    out.sum().backward()
    assert w.grad is not None and w.grad.tolist() == [8.0, 12.0]
    assert y.grad is not None and torch.equal(y.grad, torch.ones(3, 4))


def config(
    targets: Any, weight: float | None = 1.0, kind: str = "switch", **kw: Any
) -> molora.AdapterConfig:
    raw = {
        "target_modules": targets,
        "experts": {"kind": "lora", "num_experts": 4, "r": 2},
        "router": {"kind": "topk"},
        "balance": [] if weight is None else [{"kind": kind, "weight": weight}],
    }
    return molora.AdapterConfig.from_dict(raw | kw)


def randomise(model: Any) -> None:
    g = torch.Generator().manual_seed(3)
    for name, p in adapter_parameters(model).items():
        p.data.normal_(0, 1.0 if "router" in name else 0.2, generator=g)


TARGETS = ["q_proj", "down_proj"]


def llama(make: Factory, mode: str = "eager", **settings: Any) -> Any:
    model: Any = molora.wrap(make(), config(TARGETS, **settings)).double()
    randomise(model)
    if MODES[mode] is not None:
        model.activation_checkpointing_enable({"use_reentrant": MODES[mode]})
    return model.train()


def batch(seed: int = 0, B: int = 3, S: int = 9) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (B, S), generator=g)
    mask = torch.ones(B, S, dtype=torch.long)
    mask[0, S - 4 :] = 0
    mask[1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids * mask}


def gradients(model: Any) -> dict[str, Tensor]:
    grads = {n: p.grad for n, p in adapter_parameters(model).items()}
    model.zero_grad()
    assert all(g is not None for g in grads.values())
    return grads  # type: ignore[return-value]


def same(a: dict[str, Tensor], b: dict[str, Tensor], tol: float = 1e-12) -> bool:
    assert a.keys() == b.keys()
    return all((a[n] - b[n]).abs().max() <= tol * (1 + b[n].abs().max()) for n in b)


def by_plain_autograd(
    make: Factory, data: dict[str, Tensor], kind: str, weight: float
) -> dict[str, Tensor]:
    """Loss plus weight * mean of the objective over sites, from the sites' inputs."""
    model = llama(make, weight=None)
    inputs: dict[str, Tensor] = {}
    for path, site in sites(model).items():
        site.register_forward_pre_hook(
            lambda m, args, path=path: inputs.update({path: args[0]})
        )
    loss = model(**data).loss
    real = data["attention_mask"].bool()
    for path, site in sites(model).items():
        z = inputs[path] @ site.router.gate.weight.t()  # type: ignore
        if kind == "z":
            value = torch.logsumexp(z, -1)[real].square().mean()
        else:
            p = torch.softmax(z, -1)[real]
            hot = torch.zeros_like(p).scatter(-1, p.topk(2).indices, 1.0)
            value = 4 * (hot.sum(0) / hot.sum() * p.mean(0)).sum()
        loss = loss + weight * value / len(inputs)
    loss.backward()
    return gradients(model)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["switch", "z"])
def test_model_gradient_is_that_of_the_summed_loss(
    kind: str, mode: str, tiny_llama: Factory
) -> None:
    data = batch()
    want = by_plain_autograd(tiny_llama, data, kind, 0.3)
    model = llama(tiny_llama, mode, weight=0.3, kind=kind)
    model.molora_runtime.stats = {}
    model(**data).loss.backward()
    got = gradients(model)
    assert same(got, want)
    without = llama(tiny_llama, weight=None)
    without(**data).loss.backward()
    assert not same(gradients(without), want, 1e-3)
    # a recomputation is not counted twice
    stats = model.molora_runtime.stats
    assert list(stats) == list(sites(model))
    for site in stats.values():
        assert (site.forwards, int(site.tokens)) == (1, 21)
        assert int(site.chosen_sum_E.sum()) == 42


@pytest.mark.parametrize("mode", MODES)
def test_two_forwards_before_one_backward_see_their_own_masks(
    mode: str, tiny_llama: Factory
) -> None:
    first, second = batch(1), batch(2, B=2, S=6)
    want: dict[str, Tensor] = {}
    for data in (first, second):
        model = llama(tiny_llama, weight=0.5)
        model(**data).loss.backward()
        grads = gradients(model)
        want = {n: want.get(n, 0) + g for n, g in grads.items()}
    model = llama(tiny_llama, mode, weight=0.5)
    (model(**first).loss + model(**second).loss).backward()
    assert same(gradients(model), want)
    assert model.molora_runtime.current is None


def test_accumulation_with_the_scale_is_the_mean(tiny_llama: Factory) -> None:
    data = [batch(1), batch(2)]
    model = llama(tiny_llama, weight=0.5)
    model.molora_runtime.balance_scale = 0.5
    for part in data:
        (model(**part).loss / 2).backward()
    got = gradients(model)
    want = [by_plain_autograd(tiny_llama, part, "switch", 0.5) for part in data]
    assert same(got, {n: (want[0][n] + want[1][n]) / 2 for n in got})


def by_hand(model: Any, reentrant: bool) -> None:
    """Checkpoint one layer without telling the model."""
    layer = model.model.layers[1]
    function = functools.partial(checkpoint, use_reentrant=reentrant)
    layer._gradient_checkpointing_func = function
    layer.gradient_checkpointing = True


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_by_hand_fails_loudly(
    reentrant: bool, tiny_llama: Factory
) -> None:
    model = llama(tiny_llama, weight=0.5)
    by_hand(model, reentrant)
    loss = model(**batch()).loss
    with pytest.raises(
        RoutingError,
        match=r"'model\.layers\.1\.self_attn\.q_proj': recomputed in backward without",
    ):
        loss.backward()


def test_recomputation_by_hand_is_fine_where_nothing_reads_the_mask(
    tiny_llama: Factory,
) -> None:
    model = llama(tiny_llama, weight=None)
    model(**batch()).loss.backward()
    want = gradients(model)
    by_hand(model, reentrant=False)
    model(**batch()).loss.backward()
    assert same(gradients(model), want)


@pytest.mark.parametrize("mode", MODES)
def test_a_frozen_router_with_a_coefficient_is_an_error(
    mode: str, tiny_llama: Factory
) -> None:
    model = llama(tiny_llama, mode)
    path = "model.layers.1.mlp.down_proj"
    for p in sites(model)[path].router.parameters():  # type: ignore[union-attr]
        p.requires_grad_(False)
    with pytest.raises(RoutingError, match=rf"{path}'.*'switch'.*Unfreeze the router"):
        # reentrant checkpointing has its first gradient path in backward
        model(**batch()).loss.backward()
    model.eval()
    model(**batch())
    model.train()
    with torch.no_grad():
        model(**batch())


def test_frozen_experts_leave_the_router_its_gradient(tiny_llama: Factory) -> None:
    model = llama(tiny_llama)
    for name, p in adapter_parameters(model).items():
        p.requires_grad_("router" in name)
    model(**batch()).loss.backward()
    want = by_plain_autograd(tiny_llama, batch(), "switch", 1.0)
    for name, p in adapter_parameters(model).items():
        if "router" in name:
            assert p.grad is not None
            assert torch.allclose(p.grad, want[name], atol=1e-12)


def test_the_coefficient_means_the_same_for_every_target_list() -> None:
    """Sites that read the same input with the same gate count as one."""

    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(5, 5) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(x) + self.b(x) + self.c(x)
            return y

    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    grads = []
    for targets in (["a"], ["a", "b"], ["a", "b", "c"]):
        model = molora.wrap(Parallel(), config(targets, weight=0.7)).train()
        for site in sites(model).values():
            site.router.gate.weight.data.copy_(weight)  # type: ignore
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
        x.requires_grad_()
        (model(x) * 0).sum().backward()
        grads.append(x.grad)
    assert grads[0] is not None and grads[0].abs().max() > 1e-3
    for grad in grads[1:]:
        assert grad is not None and torch.allclose(grad, grads[0], atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_of_padding_alone_is_harmless(mode: str, tiny_llama: Factory) -> None:
    model = llama(tiny_llama, mode)
    model.molora_runtime.stats = {}
    data = batch()
    data["attention_mask"] = torch.zeros_like(data["attention_mask"])
    data.pop("labels")
    (model(**data).logits * 0).sum().backward()
    for grad in gradients(model).values():
        assert torch.isfinite(grad).all()
        assert grad.abs().sum() == 0
    for site in model.molora_runtime.stats.values():
        assert int(site.tokens) == 0
        assert float(site.balance["switch"]) == 0


def test_balance_acts_in_training_only(tiny_llama: Factory) -> None:
    model = llama(tiny_llama).eval()
    model.molora_runtime.stats = {}
    model(**batch()).loss.backward()
    plain = llama(tiny_llama, weight=None).eval()
    plain(**batch()).loss.backward()
    assert same(gradients(model), gradients(plain), 0)
    assert model.molora_runtime.stats == {}


def test_two_objectives_add_up(tiny_llama: Factory) -> None:
    both = [{"kind": "switch", "weight": 0.5}, {"kind": "z", "weight": 0.1}]
    model = llama(tiny_llama, balance=both)
    model.molora_runtime.stats = {}
    model(**batch()).loss.backward()
    got = gradients(model)
    a = by_plain_autograd(tiny_llama, batch(), "switch", 0.5)
    b = by_plain_autograd(tiny_llama, batch(), "z", 0.1)
    plain = by_plain_autograd(tiny_llama, batch(), "z", 0.0)
    # Llama's norms round to float32, so gradients add up to that
    assert same(got, {n: a[n] + b[n] - plain[n] for n in got}, 1e-6)
    for site in model.molora_runtime.stats.values():
        assert set(site.balance) == {"switch", "z"}
