"""Whole-FFN experts (MixLoRA): the official layer's numbers, and the definition."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

import molora
from molora.errors import ConfigError, RoutingError, WrapError
from molora.model import adapter_parameters
from tests.oracle import DTYPES, load, near

Factory = Callable[..., PreTrainedModel]
NAMES = ("gate_proj", "up_proj", "down_proj")


class MLP(nn.Module):
    """The FFN of Llama."""

    def __init__(self, wide: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(wide, inner, bias=False)
        self.up_proj = nn.Linear(wide, inner, bias=False)
        self.down_proj = nn.Linear(inner, wide, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.gate_proj(x)) * self.up_proj(x)
        y: Tensor = self.down_proj(h)
        return y


class One(nn.Module):
    """A model of one FFN, with the argument names of a language model."""

    def __init__(self, wide: int, inner: int):
        super().__init__()
        self.mlp = MLP(wide, inner)

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        y: Tensor = self.mlp(inputs_embeds)
        return y


def official(t: dict[str, Tensor], dtype: torch.dtype, balance: float) -> Any:
    base = One(24, 40)
    for name in NAMES:
        getattr(base.mlp, name).weight.data = t[f"base.{name}.weight"].clone()
    E, r = t["plain.up_proj.A"].shape[:2]
    raw: dict[str, Any] = {
        "target_modules": list(NAMES),
        "experts": {
            "kind": "lora",
            "num_experts": E,
            "r": r,
            "lora_alpha": float(t["scale"]) * r,
        },
        "router": {
            "kind": "topk",
            "top_k": int(t["top_k"]),
            "scope": "block",
            "mix": "block",
        },
    }
    if balance:
        raw["balance"] = [{"kind": "switch", "weight": balance}]
    model: Any = molora.wrap(base, molora.AdapterConfig.from_dict(raw))
    model.to(dtype).train()
    with torch.no_grad():
        for name in NAMES:
            bank = getattr(model.mlp, name).experts
            bank.A.copy_(t[f"plain.{name}.A"])
            bank.Bt.copy_(t[f"plain.{name}.B"].transpose(1, 2))
        model.mlp.gate_proj.router.gate.weight.copy_(t["plain.router"])
    return model


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_official_layer(dtype: torch.dtype) -> None:
    """Outputs, gates, loss and every gradient; its loss is not divided by k."""
    t = load("mixlora_ffn")
    model = official(t, dtype, balance=float(t["top_k"]))
    x = t["x"].to(dtype).requires_grad_()
    model.molora_runtime.stats = {}
    with molora.record_routing(model) as trace:
        y = model(x, attention_mask=t["mask"])
    (y * t["c"].to(dtype)).sum().backward()
    near(y.detach(), t["y"], "y")
    assert list(trace.sites) == [f"mlp.{name}" for name in NAMES]
    for record in trace.sites.values():
        near(record.gates[0], t["gates"], "gates")
    (stats,) = model.molora_runtime.stats.values()
    near(stats.balance["switch"].view(()), t["alt.aux_divided_by_k"].view(()))
    near(x.grad, t["grad.x"], "grad.x")
    for name in NAMES:
        bank = getattr(model.mlp, name).experts
        near(bank.A.grad, t[f"grad.{name}.A"], name)
        near(bank.Bt.grad.transpose(1, 2), t[f"grad.{name}.B"], name)
    near(model.mlp.gate_proj.router.gate.weight.grad, t["grad.router"], "router")


ROUTERS = {
    "topk": {"kind": "topk"},
    "soft": {"kind": "soft"},
    "topp": {"kind": "topp", "top_p": 0.5},
    "top1": {"kind": "topk", "top_k": 1, "renormalize": False},
    "sequence": {"kind": "topk", "input": "sequence"},
}


def build(make: Factory, router: dict[str, Any], **settings: Any) -> Any:
    raw = {
        "target_modules": list(NAMES),
        "experts": {"kind": "lora", "num_experts": 4, "r": 2},
        "router": {"scope": "block", "mix": "block", **router},
        **settings,
    }
    model: Any = molora.wrap(make(), molora.AdapterConfig.from_dict(raw)).double()
    g = torch.Generator().manual_seed(3)
    for name, p in adapter_parameters(model).items():
        p.data.normal_(0, 1.0 if "router" in name else 0.3, generator=g)
    return model.eval()


def ids() -> Tensor:
    return torch.randint(3, 128, (2, 5), generator=torch.Generator().manual_seed(0))


def by_definition(mlp: Any, x: Tensor, gates: Tensor) -> Tensor:
    """sum_e g_e FFN_e(x) + (1 - sum_e g_e) FFN(x), every expert on every token."""

    def ffn(expert: int | None) -> Tensor:
        def lin(name: str, v: Tensor) -> Tensor:
            site = getattr(mlp, name)
            W = site.base.weight
            if expert is not None:
                A, Bt, scale = site.experts.factors()
                W = W + scale * Bt[expert].t() @ A[expert]
            return F.linear(v, W)

        return lin("down_proj", F.silu(lin("gate_proj", x)) * lin("up_proj", x))

    y = (1 - gates.sum(-1, keepdim=True)) * ffn(None)
    for e in range(gates.shape[-1]):
        y = y + gates[..., e : e + 1] * ffn(e)
    return y


@pytest.mark.parametrize("name", list(ROUTERS))
def test_every_router_is_the_definition(name: str, tiny_llama: Factory) -> None:
    model = build(tiny_llama, ROUTERS[name])
    seen: list[tuple[Any, Tensor, Tensor]] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda m, args, y: seen.append((m, args[0], y)))
    with molora.record_routing(model) as trace:
        model(ids())
    for (mlp, x, y), record in zip(seen, list(trace.sites.values())[::3], strict=True):
        want = by_definition(mlp, x, record.gates[0].double())
        # recorded gates are float32
        assert (y - want).abs().max() < 1e-6 * want.abs().max()


def test_overflow_goes_through_the_base_alone(tiny_llama: Factory) -> None:
    router = {"kind": "topk", "capacity": 1.0}
    model = build(tiny_llama, router).train()
    seen: list[tuple[Any, Tensor, Tensor]] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda m, args, y: seen.append((m, args[0], y)))
    with molora.record_routing(model) as trace:
        model(ids())
    cut = 0
    for (mlp, x, y), record in zip(seen, list(trace.sites.values())[::3], strict=True):
        gates = record.gates[0].double()
        cut += int((gates.sum(-1) < 0.99).sum())
        want = by_definition(mlp, x, gates)
        assert (y - want).abs().max() < 1e-6 * want.abs().max()
    assert cut > 0


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_gradients_are_those_of_the_definition(
    checkpointing: bool | None, tiny_llama: Factory
) -> None:
    model = build(tiny_llama, {"kind": "topk"}).train()
    if checkpointing is not None:
        model.activation_checkpointing_enable({"use_reentrant": checkpointing})
    model(input_ids=ids(), labels=ids()).loss.backward()
    got = {n: p.grad.clone() for n, p in adapter_parameters(model).items()}
    model.zero_grad()
    for layer in model.model.layers:
        layer.mlp.forward = _definition(layer.mlp)
    model(input_ids=ids(), labels=ids()).loss.backward()
    for name, p in adapter_parameters(model).items():
        # Llama's norms round to float32
        assert (got[name] - p.grad).abs().max() < 1e-6 * (1 + p.grad.abs().max())
        assert p.grad.abs().max() > 0


def _definition(mlp: Any) -> Any:
    def forward(x: Tensor) -> Tensor:
        p = torch.softmax(x.double() @ mlp.gate_proj.router.gate.weight.t(), -1)
        kept = torch.zeros_like(p).scatter(-1, p.topk(2).indices, 1.0) * p
        return by_definition(mlp, x, kept / kept.sum(-1, keepdim=True))

    return forward


def test_one_expert_is_kept_exactly(tiny_llama: Factory) -> None:
    model = build(tiny_llama, {"kind": "topk"})
    gates = torch.tensor([0.0, 0.0, 1.0, 0.0]).double().expand(2, 5, -1)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        want = by_definition(model.model.layers[1].mlp, x, gates)
    with pytest.raises(WrapError, match="no update of its layers equals"):
        molora.collapse(model, method="linear", rank=2)
    molora.collapse(model, method="select", expert=2)
    with torch.no_grad():
        got = model.model.layers[1].mlp(x)
    assert (got - want).abs().max() < 1e-6 * want.abs().max()


def test_decoding_saving_and_switching_off(tiny_llama: Factory, tmp_path: Any) -> None:
    model = build(tiny_llama, {"kind": "topk"})
    base = tiny_llama().double()
    with torch.no_grad():
        full = model(ids()).logits
        out = model(ids()[:, :3], use_cache=True)
        for i in (3, 4):
            out = model(ids()[:, i : i + 1], past_key_values=out.past_key_values)
        assert (out.logits[:, 0] - full[:, -1]).abs().max() < 1e-10
        with molora.disabled(model):
            assert torch.equal(model(ids()).logits, base(ids()).logits)
        model.float().save_pretrained(tmp_path / "a")
        again = molora.load(tiny_llama(), tmp_path / "a").eval()
        assert torch.equal(again(ids()).logits, model(ids()).logits)


def test_gpt2_has_ffns_too(tiny_gpt2: Factory) -> None:
    raw = {
        "target_modules": ["mlp.c_fc", "mlp.c_proj"],
        "experts": {"kind": "lora", "num_experts": 3, "r": 2},
        "router": {"kind": "soft", "scope": "block", "mix": "block"},
    }
    model: Any = molora.wrap(tiny_gpt2(), molora.AdapterConfig.from_dict(raw))
    for name, p in adapter_parameters(model).items():
        p.data.normal_(0, 0.3 if "router" in name else 0.5)
    model.double().eval()
    mlp = next(m for n, m in model.named_modules() if n.endswith("h.0.mlp"))
    x = torch.randn(1, 4, mlp.c_fc.in_features).double()
    context = molora.context.ForwardContext()
    with torch.no_grad(), model.molora_runtime.use(context, 0):
        got = mlp(x)
        gates = mlp.c_fc.routing(x, context).gates.view(1, 4, 3)
        want = torch.zeros_like(got)
        for e in range(3):
            h = x
            for site in (mlp.c_fc, mlp.c_proj):
                A, Bt, scale = site.experts.factors()
                h = site.base(h) + scale * (h @ A[e].t()) @ Bt[e]
                h = mlp.act(h) if site is mlp.c_fc else h
            want += gates[..., e : e + 1] * h
    assert (got - want).abs().max() < 1e-10 * want.abs().max()


def test_what_is_no_ffn_is_refused(tiny_llama: Factory) -> None:
    router = {"kind": "topk"}
    with pytest.raises(ConfigError, match="mix: block has no meaning with scope: site"):
        build(tiny_llama, {**router, "scope": "site"})
    with pytest.raises(WrapError, match=r"self_attn.*does not map each token"):
        build(
            tiny_llama, router, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
        )
    with pytest.raises(WrapError, match=r"\['gate_proj'\], which have no exp"):
        build(tiny_llama, router, target_modules=["up_proj", "down_proj"])
    with pytest.raises(WrapError, match="act on the layer's input"):
        build(tiny_llama, router, experts={"kind": "ia3", "num_experts": 4})
    model = build(tiny_llama, router)
    mlp = model.model.layers[0].mlp
    context = molora.context.ForwardContext()
    with model.molora_runtime.use(context, 0):
        h = mlp.up_proj
        mlp.gate_proj(torch.zeros(1, 3, 32).double())
        assert h(torch.zeros(1, 3, 32).double()).shape[:3] == (1, 3, 2)
        with pytest.raises(RoutingError, match="3 tokens with 2 experts each"):
            mlp.down_proj(torch.zeros(1, 3, 1, mlp.down_proj.in_features).double())
