"""DoRA banks: PEFT's numbers, mixtures by dense definition, PEFT form, refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

import molora
from molora.errors import ConfigError, WrapError
from molora.experts.base import AbstractExperts
from molora.experts.dora import DoRAExperts
from molora.hosts.linear import base_of
from molora.model import adapter_parameters, sites
from tests.oracle import DTYPES, FOLDER, Layer, near

Factory = Callable[..., PreTrainedModel]
IDS = torch.arange(1, 25).view(2, 12)


def wrapped(
    layer: nn.Linear, E: int = 1, router: str = "none", **inner: Any
) -> tuple[Any, Any]:
    """A model of one layer under DoRA experts, and its site."""
    config = {
        "target_modules": ["lin"],
        "experts": {
            "kind": "dora",
            "num_experts": E,
            "inner": {"kind": "lora", "r": 3} | inner,
        },
        "router": {"kind": router},
    }
    model = nn.ModuleDict({"lin": layer})
    molora.wrap(model, molora.AdapterConfig.from_dict(config))
    return model, sites(model)["lin"]


def random_layer(bias: bool = True) -> nn.Linear:
    generator = torch.Generator().manual_seed(4)
    made = nn.Linear(10, 7, bias=bias, dtype=torch.float64)
    for values in made.parameters():
        values.data.normal_(0, 0.5, generator=generator)
    return made


def shake(model: nn.Module) -> torch.Generator:
    """Give every trained value another one."""
    generator = torch.Generator().manual_seed(1)
    for values in model.parameters():
        if values.requires_grad:
            draw = torch.randn(values.shape, generator=generator, dtype=values.dtype)
            with torch.no_grad():
                values.add_(0.4 * draw)
    return generator


def single(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        hyper = json.loads(file.metadata()["hyper"])
        return {k: file.get_tensor(k) for k in file.keys()}, hyper  # noqa: SIM118


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["dora", "dora_rs"])
def test_one_expert_is_dora(name: str, dtype: torch.dtype) -> None:
    t, hyper = single(name)
    inner = {"r": hyper["r"], "lora_alpha": hyper["alpha"]}
    lin = Layer(t["base.weight"], t["base.bias"]).lin
    model, site = wrapped(lin, **inner, use_rslora=name == "dora_rs")
    model.to(dtype)
    experts = site.experts
    with torch.no_grad():
        experts.inner.A.copy_(t["param.A"])
        experts.inner.Bt.copy_(t["param.B"].t())
        experts.magnitude.copy_(t["param.m"])
    x = t["x"].to(dtype).requires_grad_()
    y = site(x)
    (y * t["c"].to(dtype)).sum().backward()
    assert near(y.detach(), t["y"], "y")
    assert near(x.grad, t["grad.x"], "x")
    assert near(experts.inner.A.grad[0], t["grad.A"], "A")
    assert near(experts.inner.Bt.grad[0].t(), t["grad.B"], "B")
    assert near(experts.magnitude.grad[0], t["grad.m"], "m")
    merged = site.base.weight.detach() + site.delta_weight()
    assert near(merged, t["merged.weight"], "merged")


def test_magnitudes_start_at_the_norms_of_the_rows() -> None:
    t, _ = single("dora_init")
    _, site = wrapped(Layer(t["base.weight"], None).lin, 4, "soft")
    assert near(site.experts.norms(t["base.weight"])[2], t["param.m"])
    # parameters are float32
    for m_O in site.experts.magnitude.detach():
        assert near(m_O, t["param.m"].float())


def dense_sum(site: Any, x: Tensor, gates: Tensor, deltas: list[Tensor]) -> Tensor:
    """The mixture by its definition, every V_e formed."""
    W, b = site.base.weight, site.base.bias
    y = x @ W.t() + (0 if b is None else b)
    for e, delta in enumerate(deltas):
        V = W + delta
        ratio = site.experts.magnitude[e] / V.norm(dim=1).detach()
        y = y + gates[:, e : e + 1] * (x @ (ratio[:, None] * V - W).t())
    return y


def lora_deltas(inner: Any) -> list[Tensor]:
    A, Bt, scale = inner.factors()
    E = inner.num_experts
    scales = scale if isinstance(scale, Tensor) else [scale] * E
    return [scales[e] * Bt[e % len(Bt)].t() @ A[e % len(A)] for e in range(E)]


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "ranks": {"r": [3, 1, 2], "lora_alpha": [2.0, 3.0, 5.0]},
    "hydra": {"shared": ["A"]},
    "shared_b": {"shared": ["B"]},
}


@pytest.mark.parametrize("x_grad", [True, False])
@pytest.mark.parametrize("router", ["soft", "topk"])
@pytest.mark.parametrize("case", CASES)
def test_a_mixture_by_its_definition(case: str, router: str, x_grad: bool) -> None:
    model, site = wrapped(random_layer(case != "hydra"), 3, router, **CASES[case])
    model.double()
    generator = shake(model)
    x, c = (torch.randn(9, n, generator=generator).double() for n in (10, 7))
    leaves = dict(site.named_parameters())
    if x_grad:
        leaves["x"] = x.requires_grad_()
    with molora.record_routing(model) as trace:
        y = site(x)
    gates = trace.sites["lin"].gates[0].double().view(9, 3)
    deltas = lora_deltas(site.experts.inner)
    # routers compute in float32
    assert (y - dense_sum(site, x, gates, deltas)).abs().max() < 1e-5
    # gates of its own, so that their gradient is compared in float64
    free = gates.detach().clone().requires_grad_()
    trained = [p for p in leaves.values() if p.requires_grad]
    trained = [p for p in trained if p is not site.router.gate.weight] + [free]
    layer = base_of(site, x, x, free)
    top_k = 2 if router == "topk" else None
    y, dense = site.experts(x, free, layer, top_k), dense_sum(site, x, free, deltas)
    assert near(y.detach(), dense.detach())
    got = torch.autograd.grad((y * c).sum(), trained)
    want = torch.autograd.grad((dense * c).sum(), trained)
    for mine, theirs in zip(got[:-1], want[:-1], strict=True):
        assert near(mine, theirs)
    # nothing reads the gradient of a gate that is zero
    assert near(got[-1] * (gates > 0), want[-1] * (gates > 0), "gates")


def test_without_a_base_it_is_the_update_alone() -> None:
    model, site = wrapped(random_layer(), 2, "soft")
    model.double()
    generator = shake(model)
    x, gates = (torch.rand(5, n, generator=generator).double() for n in (10, 2))
    update = site.experts(x, gates, None)
    want = dense_sum(site, x, gates, lora_deltas(site.experts.inner)) - site.base(x)
    assert near(update.detach(), want.detach())


def test_around_a_sum() -> None:
    parts = [{"kind": "lora", "r": 2}, {"kind": "lora", "r": 1, "lora_alpha": 3.0}]
    settings = {"kind": "sum", "parts": parts}
    raw = {
        "target_modules": ["lin"],
        "experts": {"kind": "dora", "num_experts": 3, "inner": settings},
        "router": {"kind": "soft"},
    }
    model: Any = nn.ModuleDict({"lin": random_layer()})
    site = sites(molora.wrap(model, molora.AdapterConfig.from_dict(raw)))["lin"]
    model.double()
    generator = shake(model)
    x, c = (torch.randn(6, n, generator=generator).double() for n in (10, 7))
    gates = torch.rand(6, 3, generator=generator).double().requires_grad_()
    experts: Any = site.experts
    leaves = [gates, *experts.parameters()]
    y = experts(x, gates, site.base(x))
    both = [lora_deltas(part) for part in experts.inner.parts]
    want = dense_sum(site, x, gates, [a + b for a, b in zip(*both, strict=True)])
    assert near(y.detach(), want.detach())
    got = torch.autograd.grad((y * c).sum(), leaves)
    theirs = torch.autograd.grad((want * c).sum(), leaves)
    for mine, right in zip(got, theirs, strict=True):
        assert near(mine, right)


class Dense(AbstractExperts):
    """A dense update for each expert, one of the families that are not low-rank."""

    def __init__(self, E: int):
        super().__init__()
        self.num_experts = E
        generator = torch.Generator().manual_seed(2)
        values = 0.3 * torch.randn(E, 7, 10, generator=generator)
        self.D = nn.Parameter(values.double())

    def forward(
        self, x: Tensor, gates: Tensor | None, base: Tensor, top_k: int | None = None
    ) -> Tensor:
        each = torch.einsum("ti,eoi->teo", x, self.D)
        return base + (each if gates is None else each * gates[..., None]).sum(1)

    def delta_weight(self, expert: int, weight: Tensor) -> Tensor:
        return self.D[expert].detach()

    def count(self) -> int:
        return self.D.numel()


@pytest.mark.parametrize("E", [1, 3])
def test_around_any_linear_family(E: int) -> None:
    model, site = wrapped(random_layer(), E, "soft" if E > 1 else "none")
    model.double()
    site.experts.inner = inner = Dense(E)
    generator = shake(model)
    x, c = (torch.randn(6, n, generator=generator).double() for n in (10, 7))
    x.requires_grad_()
    gates = torch.rand(6, E, generator=generator).double().requires_grad_()
    trained = [inner.D, site.experts.magnitude, x] + ([gates] if E > 1 else [])
    given = gates if E > 1 else None
    y = site.experts(x, given, base_of(site, x, x, None))
    weights = gates if E > 1 else torch.ones(6, 1).double()
    want = dense_sum(site, x, weights, list(inner.D))
    assert near(y.detach(), want.detach())
    got = torch.autograd.grad((y * c).sum(), trained)
    for mine, theirs in zip(
        got, torch.autograd.grad((want * c).sum(), trained), strict=True
    ):
        assert near(mine, theirs)


def test_dropout_is_on_the_low_rank_path_alone() -> None:
    model, site = wrapped(random_layer(), lora_dropout=0.5)
    model.double().train()
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).double()
    site.experts.magnitude.data.mul_(2)
    # B is zero, so that the base term is all there is
    want = 2 * x @ site.base.weight.t() + site.base.bias
    assert (site(x) - want).abs().max() < 1e-6
    site.experts.inner.Bt.data.fill_(0.1)
    assert (site(x) - site(x)).abs().max() > 1e-3


def test_a_bf16_base_gets_bf16_back() -> None:
    model, site = wrapped(random_layer(), 3, "soft")
    shake(model)
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    want = model.float()["lin"](x)
    site.base.to(torch.bfloat16)
    narrow = x.to(torch.bfloat16).requires_grad_()
    y = site(narrow)
    y.float().square().sum().backward()
    assert y.dtype == narrow.grad.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert site.experts.magnitude.grad.dtype == torch.float32
    assert (y.float() - want).abs().max() < 0.05 * want.abs().max()


def model_of(make: Factory, E: int = 1, router: str = "none", **more: Any) -> Any:
    raw = {
        "target_modules": ["q_proj", "up_proj", "down_proj"],
        "experts": {"kind": "dora", "num_experts": E, "inner": {"kind": "lora"}},
        "router": {"kind": router} | more,
    }
    model: Any = molora.wrap(make(), molora.AdapterConfig.from_dict(raw))
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(IDS).logits
    return out


def test_it_starts_as_the_base_merges_and_is_saved(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    plain = logits(tiny_llama())
    model = model_of(tiny_llama)
    assert (logits(model) - plain).abs().max() < 1e-5
    shake(model)
    want = logits(model)
    assert (want - plain).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(molora.load(tiny_llama(), tmp_path / "out")), want)
    molora.merge(model)
    assert (logits(model) - want).abs().max() < 1e-4 * want.abs().max()
    molora.unwrap(molora.unmerge(model))
    assert torch.equal(logits(model), plain)


def test_whole_ffns_of_dora_experts(tiny_llama: Factory) -> None:
    """Equal experts give the same layer by layer and as whole FFNs."""
    found = []
    for mix in ("layer", "block"):
        raw = {
            "target_modules": ["gate_proj", "up_proj", "down_proj"],
            "experts": {"kind": "dora", "num_experts": 3},
            "router": {"kind": "topk", "top_k": 2, "scope": "block", "mix": mix},
        }
        model: Any = molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(raw))
        shake(model)
        for site in sites(model).values():
            for values in site.experts.parameters():
                values.data.copy_(values.data[:1].expand_as(values))
        found.append(logits(model.double()))
    assert (found[0] - logits(tiny_llama())).abs().max() > 1e-2
    assert (found[0] - found[1]).abs().max() < 1e-5


@pytest.mark.parametrize("rs", [False, True])
def test_peft_computes_the_same_both_ways(rs: bool) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["lin"], use_dora=True, use_rslora=rs
    )
    base = random_layer()
    theirs: Any = peft.get_peft_model(nn.ModuleDict({"lin": base}).double(), config)
    layer = theirs.base_model.model["lin"]
    generator = torch.Generator().manual_seed(3)
    values = {
        "lora_A.weight": layer.lora_A["default"].weight,
        "lora_B.weight": layer.lora_B["default"].weight,
        "lora_magnitude_vector": layer.lora_magnitude_vector["default"].weight,
    }
    for tensor in values.values():
        tensor.data = tensor.data.double().normal_(1, 0.5, generator=generator)
    x = torch.randn(5, 10, generator=generator).double()
    want = layer(x).detach()
    settings = {"r": 4, "lora_alpha": 6, "use_dora": True, "use_rslora": rs}
    tensors = {name: tensor.detach() for name, tensor in values.items()}
    block, state = DoRAExperts.from_peft(settings, tensors, 10, 7)
    model, site = wrapped(random_layer(), **block["inner"])
    assert site.experts.config.to_dict() == block | {"num_experts": 1}
    model.double()
    site.experts.load_state_dict(state)
    assert near(site(x).detach(), want)
    form = site.experts.to_peft(0)
    assert form.settings["use_dora"] and form.settings["r"] == 4
    # alpha / r stands for whatever the scale was
    layer.scaling["default"] = form.settings["lora_alpha"] / 4
    for name, tensor in values.items():
        tensor.data = form.tensors[name].clone()
    assert near(layer(x).detach(), want)
    with pytest.raises(WrapError, match="of kind lora"):
        DoRAExperts.from_peft(settings | {"use_dora": False}, tensors, 10, 7)


def test_trained_values(tiny_llama: Factory) -> None:
    model = model_of(tiny_llama, 4, "topk")
    for path, site in sites(model).items():
        I, O, r = site.in_features, site.out_features, 8  # noqa: E741
        mine = adapter_parameters(model).items()
        own = [p.numel() for n, p in mine if n.startswith(f"{path}.experts.")]
        assert site.experts.count() == sum(own) == 4 * (r * (I + O) + O)


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        ({"kind": "ia3"}, r"inner\.kind: IA3Experts changes what the layer reads"),
        ({"kind": "dora"}, "has magnitudes already"),
        ({"kind": "loraa"}, r"inner\.kind: unknown expert family 'loraa'"),
        ({"r": 8}, r"inner\.kind: this field is required; one of .*lora"),
        (
            {"kind": "sum", "parts": [{"kind": "lora"}, {"kind": "bitfit"}]},
            r"inner\.kind: BitFitExperts changes the bias of the layer",
        ),
        ({"kind": "lora", "num_experts": 2}, "set num_experts of dora"),
        ({"kind": "lora", "rank": 2}, r"experts\.inner\.rank: unknown field"),
    ],
)
def test_mistakes_in_the_settings(inner: dict[str, Any], message: str) -> None:
    raw = {"target_modules": ["lin"], "experts": {"kind": "dora", "inner": inner}}
    with pytest.raises(ConfigError, match=message):
        molora.AdapterConfig.from_dict(raw)


def test_weights_without_norms_are_refused() -> None:
    empty = random_layer()
    empty.weight.data[3] = 0
    with pytest.raises(WrapError, match=r"\[7, 10\], and row 3 is zero"):
        wrapped(empty)
    with pytest.raises(WrapError, match="meta device"):
        wrapped(random_layer().to("meta"))


def test_vera_with_magnitudes_shares_its_projections(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    """DVoRA (section 5.6 of the paper)."""
    raw = {
        "target_modules": ["q_proj", "up_proj"],
        "experts": {"kind": "dora", "num_experts": 2, "inner": {"kind": "vera"}},
        "router": {"kind": "soft"},
    }
    raw["experts"]["inner"]["r"] = 5  # type: ignore[index]
    model: Any = molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(raw))
    assert (logits(model) - logits(tiny_llama())).abs().max() < 1e-5
    shake(model)
    mine = adapter_parameters(model)
    kept = [name for name in mine if name.endswith("inner.A")]
    # one for the model, as wide as the widest layer, not trained
    assert len(kept) == 1 and not mine[kept[0]].requires_grad
    first, *_, last = sites(model).values()
    assert last.experts.adapted().value("A").data_ptr() == mine[kept[0]].data_ptr()  # type: ignore[operator]
    x = torch.randn(4, last.in_features, generator=torch.Generator().manual_seed(0))
    gates = torch.full((4, 2), 0.5)
    want = dense_sum(last, x, gates, lora_deltas(last.experts.adapted()))
    assert (last.experts(x, gates, last.base(x)) - want).abs().max() < 1e-4
    before = logits(model)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(molora.load(tiny_llama(), tmp_path / "out")), before)
