"""Banks, routers and objectives against numbers of other implementations.

What the files hold, and where they come from, stands in oracles/README.md.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import molora
from molora.context import ForwardContext
from molora.model import sites
from molora.routers import OBJECTIVES, TopKRouter
from tests.oracle import DTYPES, Layer, build, check, load, near


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["loramoe", "hydralora"])
def test_soft_mixtures(name: str, dtype: torch.dtype) -> None:
    t = load(name)
    check(t, *build(t, dtype, router={"kind": "soft"}))


@pytest.mark.parametrize("dtype", DTYPES)
def test_mola_with_its_balance_loss(dtype: torch.dtype) -> None:
    t = load("mola")
    router = {"kind": "topk", "top_k": int(t["top_k"])}
    model, site = build(t, dtype, router=router, balance=1.0)
    model.molora_runtime.stats = {}
    check(t, model, site)
    near(model.molora_runtime.stats["lin"].balance["switch"], t["aux"], "aux")


def mola_masked(t: dict[str, Tensor]) -> Tensor:
    """The documented correction: f and P over real tokens only."""
    p = torch.softmax(t["x"] @ t["plain.router"].T, -1).reshape(-1, 5)
    hot = torch.zeros_like(p).scatter(-1, p.topk(int(t["top_k"])).indices, 1.0)
    m = t["mask"].reshape(-1, 1).double()
    f = (hot * m).sum(0) / (hot * m).sum()
    return 5 * (f * (p * m).sum(0) / m.sum()).sum()


@pytest.mark.parametrize("dtype", DTYPES)
def test_mola_masked_balance_loss_and_its_gradient(dtype: torch.dtype) -> None:
    t = load("mola")
    router = {"kind": "topk", "top_k": int(t["top_k"])}
    model, site = build(t, dtype, router=router, balance=0.7)
    model.molora_runtime.stats = {}
    x = t["x"].to(dtype).requires_grad_()
    y = model(x, attention_mask=t["mask"])
    (y * 0).sum().backward()
    value = model.molora_runtime.stats["lin"].balance["switch"]
    near(value, t["alt.aux_masked"], "aux")
    # the loss is 0, so what is left is the gradient of the objective alone
    leaves = {n: t[n].double().requires_grad_() for n in ("x", "plain.router")}
    aux = mola_masked({**t, **leaves})
    near(aux.detach(), t["alt.aux_masked"])
    dx, dr = torch.autograd.grad(0.7 * aux, list(leaves.values()))
    near(x.grad, dx, "x")
    near(site.router.gate.weight.grad, dr, "router")
    assert x.grad is not None
    assert torch.equal(x.grad[t["mask"] == 0], torch.zeros_like(x[t["mask"] == 0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_mole_topk(dtype: torch.dtype) -> None:
    t = load("mole_topk")
    K = int(t["top_k"])
    # its f sums to K: the official loss is K times the one that is 1 when uniform
    model, site = build(t, dtype, router={"kind": "topk", "top_k": K}, balance=float(K))
    model.molora_runtime.stats = {}
    check(t, model, site)
    value = model.molora_runtime.stats["lin"].balance["switch"]
    near(value, t["alt.aux_switch_normalised"], "aux")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", ["soft", "topk"])
def test_molora_without_renormalisation(variant: str, dtype: torch.dtype) -> None:
    t = load("molora_mov")
    router: dict[str, Any] = {"kind": variant}
    if variant == "topk":
        router |= {"top_k": int(t["top_k"]), "renormalize": False}
    check(t, *build(t, dtype, router=router), out=f"{variant}.")


@pytest.mark.parametrize("dtype", DTYPES)
def test_molora_on_attention_is_the_same_layer_by_heads(dtype: torch.dtype) -> None:
    t = load("molora_mov")
    pre = "attention."
    model, site = build(t, dtype, router={"kind": "soft"}, pre=pre)
    x = t[pre + "x"].to(dtype).requires_grad_()
    y = model(x).view(t[pre + "c"].shape)
    (y * t[pre + "c"].to(dtype)).sum().backward()
    near(y.detach(), t[pre + "y"], "y")
    near(x.grad, t[pre + "grad.x"], "x")
    near(site.experts.A.grad, t[pre + "grad.A"], "A")
    near(site.experts.Bt.grad.transpose(1, 2), t[pre + "grad.B"], "B")
    near(site.router.gate.weight.grad, t[pre + "grad.router"], "router")


def test_molora_renormalised_gates() -> None:
    t = load("molora_mov")
    router = {"kind": "topk", "top_k": int(t["top_k"])}
    model, _ = build(t, torch.float64, router=router)
    with molora.record_routing(model) as trace:
        model(t["x"])
    near(trace.sites["lin"].gates[0], t["alt.topk.gates_renormalised"])


def scaling(wide: int, heads: int, experts: int, position: str) -> Any:
    """Identity layers of a number of heads under (IA)^3 mixtures."""
    raw = {
        "target_modules": r"\d",
        "experts": {"kind": "ia3", "num_experts": experts, "position": position},
        "router": {"kind": "soft"},
    }
    layers = nn.ModuleList(nn.Linear(wide, wide, bias=False) for _ in range(heads))
    for layer in layers:
        nn.init.eye_(layer.weight)  # type: ignore[arg-type]
    return molora.wrap(layers, molora.AdapterConfig.from_dict(raw))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", ["input", "output"])
@pytest.mark.parametrize("pre", ["mov.", "mov_attention."])
def test_mov(pre: str, position: str, dtype: torch.dtype) -> None:
    """A layer that is the identity leaves x times its gated vectors.

    The attention form has one router for all heads and vectors for each, which is one
    site for each head with the same router.
    """
    t = load("molora_mov")
    by_head = pre == "mov_attention."
    vectors = t[pre + "vectors"] if by_head else t[pre + "vectors"][None]
    heads, experts, wide = vectors.shape
    model = scaling(wide, heads, experts, position).to(dtype)
    for number, site in enumerate(sites(model).values()):
        with torch.no_grad():
            site.experts.vectors.copy_(vectors[number])  # type: ignore
            site.router.gate.weight.copy_(t[pre + "plain.router"])  # type: ignore
    x = t[pre + "x"].to(dtype).requires_grad_()
    parts = x.view(*x.shape[:2], heads, wide).unbind(2)
    y = torch.stack([m(part) for m, part in zip(model, parts, strict=True)], 2)
    (y.view(x.shape) * t[pre + "c"].to(dtype)).sum().backward()
    near(y.view(x.shape).detach(), t[pre + "y"], "y")
    near(x.grad, t[pre + "grad.x"], "x")
    found: list[Any] = list(sites(model).values())
    got = torch.stack([site.experts.vectors.grad for site in found])
    near(got if by_head else got[0], t[pre + "grad.vectors"], "vectors")
    routers = torch.stack([site.router.gate.weight.grad for site in found])
    near(routers.sum(0), t[pre + "grad.router"], "router")


@pytest.mark.parametrize("dtype", DTYPES)
def test_goat(dtype: torch.dtype) -> None:
    t = load("goat")
    r, K, scale = int(t["rank_per_expert"]), int(t["top_k"]), float(t["scale"])
    experts = {
        "kind": "goat",
        "num_experts": len(t["plain.router"]),
        "r": r,
        "lora_alpha": scale * r,
        "rho": float(t["rho"]),
        "init_cof": float(t["init_cof"]),
    }
    config = molora.AdapterConfig.from_dict(
        {
            "target_modules": ["lin"],
            "experts": experts,
            "router": {"kind": "topk", "top_k": K},
            # its f sums to K
            "balance": [{"kind": "switch", "weight": float(K)}],
        }
    )
    layer = Layer(t["W0"].to(dtype), t["base.bias"].to(dtype))
    model = molora.wrap(layer, config).to(dtype).train()
    site: Any = sites(model)["lin"]
    assert torch.equal(site.base.weight, t["W0"].to(dtype))
    # once more in this dtype: banks are made in float32
    site.experts.start(site.base.weight.detach())
    with torch.no_grad():
        site.router.gate.weight.copy_(t["plain.router"])
        A, Bt = site.experts.A, site.experts.Bt
        near(torch.einsum("ero,eri->eoi", Bt, A), t["init.BA"], "BA")
        start = site.experts.Bt_start[0].t() @ site.experts.A_start[0]
        left = site.base.weight + site.experts.correction * start
        near(left, t["init.base_weight"], "base weight")
        for e in range(len(A)):
            own = scale * t["init.BA"][e] - (t["W0"] - t["init.base_weight"])
            near(site.experts.delta_weight(e), own.to(dtype), "delta")
    x = t["x"].to(dtype).requires_grad_()
    near(model(x).detach(), t["y"], "y from the SVD")
    model.molora_runtime.stats = {}
    with torch.no_grad():
        # singular vectors have a free sign; the gradients belong to the stored ones
        A.copy_(t["init.A"])
        Bt.copy_(t["init.B"].transpose(1, 2))
    with molora.record_routing(model) as trace:
        y = model(x)
    near(y.detach(), t["y"], "y")
    near(trace.sites["lin"].gates[0], t["gates"], "gates")
    (y * t["c"].to(dtype)).sum().backward()
    near(A.grad, t["grad.A"], "A")
    near(Bt.grad.transpose(1, 2), t["grad.B"], "B")
    near(site.router.gate.weight.grad, t["grad.router"], "router")
    near(x.grad, t["grad.x"], "x")
    value = model.molora_runtime.stats["lin"].balance["switch"]
    near(value, t["alt.aux_divided_by_k"], "aux")


@pytest.mark.parametrize("dtype", DTYPES)
def test_ldmole_softmax_and_its_losses(dtype: torch.dtype) -> None:
    t = load("ldmole_softmax")
    t |= {f"m0.{k}": v for k, v in t.items() if k == "scale"}
    # its own balance loss is constant for soft gates, so it has no gradient
    model, site = build(t, dtype, router={"kind": "soft"}, pre="m0.")
    check(t, model, site, pre="m0.", out="m0.")
    for masked in (False, True):
        model, site = build(
            t, dtype, router={"kind": "soft"}, balance=1.0, kind="z", pre="m0."
        )
        model.molora_runtime.stats = {}
        mask = t["mask"] if masked else None
        (model(t["m0.x"].to(dtype), attention_mask=mask) * 0).sum().backward()
        value = model.molora_runtime.stats["lin"].balance["z"]
        near(value, t["alt.z_loss_masked"] if masked else t["z_loss"])
        if not masked:
            near(site.router.gate.weight.grad, t["m0.grad_zloss.router"])
    model, _ = build(t, dtype, router={"kind": "soft"}, balance=1.0, pre="m0.")
    model.molora_runtime.stats = {}
    model(t["m0.x"].to(dtype), attention_mask=t["mask"])
    value = model.molora_runtime.stats["lin"].balance["switch"]
    near(value, t["alt.aux_switch_top1"])


class Layers(nn.Module):
    """Six sites that read given tensors: their router logits are their input."""

    def __init__(self, widths: list[int]):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.Linear(w, w, bias=False) for _ in range(3)) for w in widths
        )

    def forward(
        self, inputs: list[Tensor], input_ids: Tensor, attention_mask: Any = None
    ) -> Tensor:
        total = torch.zeros(())
        for values, modules in zip(inputs, self.layers, strict=True):
            for value, module in zip(values, modules, strict=True):  # type: ignore
                total = total + module(value).sum() * 0
        return total


@pytest.mark.parametrize("masked", [False, True])
def test_mola_balance_is_averaged_over_modules(masked: bool) -> None:
    t = load("mola_balance")
    (n0, n1), (k0, k1) = t["num_experts"].tolist(), t["top_k"].tolist()
    config = molora.AdapterConfig.from_dict(
        {
            "target_modules": r"layers\.\d\.\d",
            "layout": {"shape": "inverted_triangle", "counts": [n0, n1]},
            "experts": {"kind": "lora", "r": 1},
            "router": {"kind": "topk", "top_k": k0},
            "balance": [{"kind": "switch", "weight": 0.5}],
            "overrides": [{"match": r"layers\.1\.", "router": {"top_k": k1}}],
        }
    )
    model: Any = molora.wrap(Layers([n0, n1]), config).double().train()
    for site in sites(model).values():
        assert site.router is not None
        nn.init.eye_(site.router.gate.weight)  # type: ignore
    model.molora_runtime.stats = {}
    logits = [t[f"logits.layer{i}"].view(3, 2, 11, -1) for i in (0, 1)]
    leaves = [value.clone().requires_grad_() for value in logits]
    ids = torch.zeros(2, 11)
    model(leaves, ids, attention_mask=t["mask"] if masked else None).backward()
    stats = model.molora_runtime.stats
    got = torch.stack([s.balance["switch"] for s in stats.values()]).view(2, 3)
    want = t["alt.aux_per_module_masked" if masked else "aux_per_module"]
    near(got, want)
    if not masked:
        near(got.mean(), t["alt.aux_mean_over_modules"])
    # gradient of 0.5 * mean over the six modules, by plain autograd
    losses = []
    twins = [value.clone().requires_grad_() for value in logits]
    for twin, k in zip(twins, (k0, k1), strict=True):
        m = t["mask"].double() if masked else torch.ones(2, 11).double()
        for z in twin:
            p = torch.softmax(z, -1)
            hot = torch.zeros_like(p).scatter(-1, p.topk(k).indices, 1.0) * m[..., None]
            f, mean_p = hot.sum((0, 1)) / hot.sum(), (p * m[..., None]).sum((0, 1))
            losses.append(p.shape[-1] * (f * mean_p / m.sum()).sum())
    (0.5 * torch.stack(losses).mean()).backward()
    for leaf, twin in zip(leaves, twins, strict=True):
        assert twin.grad is not None
        near(leaf.grad, twin.grad)


def test_objectives_read_only_the_routing() -> None:
    """The two losses of one file from its stored logits, without any model."""
    t = load("mola")
    router: Any = TopKRouter(
        TopKRouter.Config(kind="topk", top_k=int(t["top_k"])),
        in_features=5,
        num_experts=5,
        site="m",
        generator=torch.Generator(),
    )
    nn.init.eye_(router.gate.weight)
    logits = t["router_logits"].view(-1, 5)
    routing = router.double()(logits, ForwardContext())
    switch = OBJECTIVES["switch"](OBJECTIVES["switch"].Config(kind="switch", weight=1))
    near(switch(routing, None).detach(), t["aux"])
    masked = switch(routing, t["mask"].view(-1).bool())
    near(masked.detach(), t["alt.aux_masked"])
