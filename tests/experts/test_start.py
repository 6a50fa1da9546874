"""Initialisers: PEFT's numbers, the base that stays, export, mixtures, refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

import molora
from molora.errors import ConfigError, WrapError
from molora.model import adapter_parameters, sites
from tests.oracle import FOLDER, Layer, near

Factory = Callable[..., PreTrainedModel]
IDS = torch.arange(1, 25).view(2, 12)
FROM_WEIGHT = ["pissa", "pissa_niter", "olora"]


def single(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        hyper = json.loads(file.metadata()["hyper"])
        return {k: file.get_tensor(k) for k in file.keys()}, hyper  # noqa: SIM118


def wrapped(
    layer: nn.Linear, init: Any, E: int = 1, router: str = "none", **more: Any
) -> tuple[Any, Any]:
    """A model of one layer under LoRA experts, and its site."""
    experts = {"kind": "lora", "num_experts": E, "init_lora_weights": init} | more
    config = {
        "target_modules": ["lin"],
        "experts": experts,
        "router": {"kind": router},
    }
    model = nn.ModuleDict({"lin": layer})
    molora.wrap(model, molora.AdapterConfig.from_dict(config))
    return model, sites(model)["lin"]


def of_file(name: str) -> tuple[dict[str, Tensor], dict[str, Any], Any]:
    t, hyper = single(name)
    bias = t["base.bias"].float()
    lin = Layer(t["orig.weight"].clone(), bias).lin
    settings = {"r": hyper["r"], "lora_alpha": hyper["alpha"]}
    return t, hyper, wrapped(lin, hyper["init"], **settings)[1]


@pytest.mark.parametrize("name", FROM_WEIGHT)
def test_the_start_is_pefts(name: str) -> None:
    t, hyper, site = of_file(name)
    experts, s = site.experts, hyper["scale"]
    assert experts.A.shape[1] == hyper["r"]
    product = experts.Bt[0].t() @ experts.A[0]
    left = t["orig.weight"] - s * product
    want = t["init.B"] @ t["init.A"]
    if name == "pissa_niter":
        # random numbers of its own: near the best part, as theirs is
        assert (product - want).norm() < 0.02 * want.norm()
        best = torch.linalg.svdvals(t["orig.weight"])[hyper["r"] :].norm()
        assert best <= left.norm() * (1 + 1e-6) and left.norm() < 1.001 * best
    else:
        assert near(product.detach(), want)
        assert near(left.detach(), t["base.weight"].float())
    assert torch.equal(experts.A_start[0], experts.A[0])
    # the update is nothing, and the stored base as it was
    x = t["x"].float()
    plain = nn.functional.linear(x, t["orig.weight"], t["base.bias"].float())
    assert near(site(x).detach(), plain)
    assert torch.equal(site.base.weight, t["orig.weight"])


@pytest.mark.parametrize("name", FROM_WEIGHT)
def test_what_is_trained_is_pefts(name: str) -> None:
    t, hyper, site = of_file(name)
    site.double()
    experts = site.experts
    with torch.no_grad():
        experts.A_start.copy_(t["init.A"])
        experts.Bt_start.copy_(t["init.B"].t())
        experts.A.copy_(t["param.A"])
        experts.Bt.copy_(t["param.B"].t())
    x = t["x"].clone().requires_grad_()
    y = site(x)
    (y * t["c"]).sum().backward()
    assert near(experts.A.grad[0], t["grad.A"], "A")
    assert near(experts.Bt.grad[0].t(), t["grad.B"], "B")
    # PEFT rounds the weight that is left to float32
    start = hyper["scale"] * (t["init.B"].double() @ t["init.A"].double())
    rounded = t["base.weight"] - (t["orig.weight"].double() - start)
    assert rounded.abs().max() < 1e-7
    assert near(y.detach(), t["y"] - t["x"] @ rounded.t(), "y")
    assert near(x.grad, t["grad.x"] - t["c"] @ rounded, "x")
    merged = site.base.weight.detach() + site.delta_weight()
    assert near(merged, t["merged.weight"] - rounded, "merged")


def test_its_factors_are_pefts_conversion() -> None:
    t, hyper = single("pissa_convert")
    lin = Layer(t["orig.weight"].clone(), t["orig.bias"]).lin
    settings = {"r": hyper["r"], "lora_alpha": hyper["alpha"]}
    _, site = wrapped(lin, "pissa", **settings)
    experts = site.experts
    with torch.no_grad():
        for kind, end in (("trained", ""), ("init", "_start")):
            getattr(experts, f"A{end}").copy_(t[f"{kind}.A"])
            getattr(experts, f"Bt{end}").copy_(t[f"{kind}.B"].t())
    A, Bt, scale = experts.factors()
    assert near(A[0].detach(), t["converted.A"])
    assert near(Bt[0].t().detach(), t["converted.B"])
    assert scale == hyper["alpha_new"] / hyper["r_new"]
    assert near(site(t["x"]).detach(), t["y"])


@pytest.mark.parametrize("shared", [[], ["A"], ["B"]])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_mixture_starts_as_the_base_and_trains_what_is_left(
    init: str, shared: list[str]
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 10, generator=generator)
    model, site = wrapped(Layer(weight, None).lin, init, 3, "soft", r=2, shared=shared)
    experts = site.experts
    x = torch.randn(5, 10, generator=generator).double()
    base = site.double().base(x)
    for gates in (torch.full((5, 3), 1 / 3), torch.rand(5, 3, generator=generator)):
        # whatever they sum to
        assert near(experts(x, gates.double(), base).detach(), base.detach()) is True
    C = experts.scale * experts.Bt_start[0].t() @ experts.A_start[0]
    assert C.norm() > 0.1 * weight.norm()
    for values in (experts.A, experts.Bt):
        values.data.add_(torch.randn(values.shape, generator=generator))
    gates = torch.rand(5, 3, generator=generator).double().softmax(-1)
    # gates that sum to one: experts on what is left of the weight
    want = x @ (site.base.weight - C).t()
    for e in range(3):
        a_rI, b_rO = experts.A[e % len(experts.A)], experts.Bt[e % len(experts.Bt)]
        BA = experts.scale * b_rO.t() @ a_rI
        want = want + gates[:, e : e + 1] * (x @ BA.t())
        assert near(experts.delta_weight(e), (BA - C).detach())
    assert near(experts(x, gates, base).detach(), want.detach())


def test_dropout_is_not_on_the_frozen_term() -> None:
    weight = torch.randn(7, 10, generator=torch.Generator().manual_seed(0))
    model, site = wrapped(Layer(weight, None).lin, "pissa", r=2, lora_dropout=0.5)
    model.double().train()
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(1)).double()
    site.experts.Bt.data.zero_()
    start = site.experts.scale * site.experts.Bt_start[0].t() @ site.experts.A_start[0]
    assert near(site(x).detach(), (x @ (site.base.weight - start).t()).detach())


@pytest.mark.parametrize("r", [4, [4, 2, 3]])
def test_gaussian_has_the_deviation_of_pefts(r: Any) -> None:
    lin = nn.Linear(400, 30)
    _, site = wrapped(lin, "gaussian", 3, "soft", r=r)
    ranks = [r] * 3 if isinstance(r, int) else r
    for a_rI, rank in zip(site.experts.A.detach(), ranks, strict=True):
        assert a_rI[:rank].std().item() == pytest.approx(1 / rank, rel=0.06)
        assert not a_rI[rank:].any()
    assert not site.experts.Bt.any()


def test_orthogonal_is_no_update_though_b_is_not_zero() -> None:
    """PEFT 0.21.2: BA is zero, A and B have entries of deviation sqrt(1/2) / 10."""
    _, site = wrapped(nn.Linear(300, 200), "orthogonal", 2, "soft", r=8)
    experts = site.experts
    for e in range(2):
        assert experts.delta_weight(e).abs().max() < 1e-6
    for values in (experts.A, experts.Bt):
        assert values.std().item() == pytest.approx(0.5**0.5 / 10, rel=0.15)
        assert not torch.equal(values[0], values[1])
    with pytest.raises(ConfigError, match="an even r, not 3"):
        wrapped(nn.Linear(3, 4), "orthogonal", r=3)


def model_of(make: Factory, init: str, E: int = 1, **more: Any) -> Any:
    experts = {"kind": "lora", "num_experts": E, "r": 3, "init_lora_weights": init}
    raw = {
        "target_modules": ["q_proj", "up_proj", "down_proj"],
        "experts": experts | more,
        "router": {"kind": "topk" if E > 1 else "none"},
    }
    model: Any = molora.wrap(make(), molora.AdapterConfig.from_dict(raw))
    return model


def shaken(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(model).values():
        if parameter.requires_grad:
            draw = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.1 * draw)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(IDS).logits
    return out


@pytest.mark.parametrize("init", ["orthogonal", "pissa", "pissa_niter_4", "olora"])
def test_models_start_as_the_base_and_give_it_back(
    init: str, tiny_llama: Factory, tmp_path: Path
) -> None:
    plain = logits(tiny_llama())
    before = torch.get_rng_state()
    model = model_of(tiny_llama, init, 3, r=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert (logits(model) - plain).abs().max() < 1e-5
    assert (logits(shaken(model)) - plain).abs().max() > 1e-3
    want = logits(model)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(molora.load(tiny_llama(), tmp_path / "out")), want)
    trained = [p for p in adapter_parameters(model).values() if p.requires_grad]
    own = [p for s in sites(model).values() for p in s.experts.parameters()]  # type: ignore[union-attr]
    count = sum(s.experts.count() for s in sites(model).values())  # type: ignore[operator]
    assert count == sum(p.numel() for p in own if p.requires_grad)
    assert len(trained) == 3 * len(sites(model))
    molora.unwrap(model)
    assert torch.equal(logits(model), plain)


def test_the_export_is_a_lora_of_twice_the_rank(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    model = shaken(model_of(tiny_llama, "pissa"))
    want = logits(model)
    molora.export_peft(model, tmp_path / "one")
    saved = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert saved["r"] == 6 and not saved.get("init_lora_weights", None)
    theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path / "one").eval()
    assert (logits(theirs) - want).abs().max() < 1e-4
    molora.merge(model)
    assert (logits(model) - want).abs().max() < 1e-4
    mixture = shaken(model_of(tiny_llama, "olora", 2))
    folders = molora.export_peft_experts(mixture, tmp_path / "experts")
    again = molora.import_peft(tiny_llama(), folders, router=tmp_path / "experts")
    assert (logits(again) - logits(mixture)).abs().max() < 1e-4


def test_a_grown_expert_has_the_start_of_the_others(tiny_llama: Factory) -> None:
    model = shaken(model_of(tiny_llama, "pissa", 3))
    molora.grow(model)
    for site in sites(model).values():
        experts: Any = site.experts
        assert torch.equal(experts.A[-1], experts.A_start[0])
        assert experts.delta_weight(3).abs().max() < 1e-6
        assert experts.delta_weight(0).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pisa"}, "There are true .kaiming., gaussian"),
        ({"init_lora_weights": "pissa_niter_0"}, "pissa_niter_<iterations>"),
        ({"init_lora_weights": False}, "A random B would change the model"),
        ({"init_lora_weights": "goat"}, r"experts\.kind goat"),
        ({"init_lora_weights": "loftq_iter_0"}, "loftq and loftq_iter_<iterations>"),
        ({"init_lora_weights": "loftq", "r": [2, 3]}, "one r and one lora_alpha"),
        ({"init_lora_weights": "pissa", "r": [2, 3]}, "one r and one lora_alpha"),
        (
            {"init_lora_weights": "olora", "trainability": {"B": "masked"}},
            "none can be masked or seeded",
        ),
        (
            {"init_lora_weights": "pissa", "shared": {"A": "model"}},
            "cannot stand beside this shared",
        ),
    ],
)
def test_mistakes_in_the_settings(settings: dict[str, Any], message: str) -> None:
    experts = {"kind": "lora", "num_experts": 2} | settings
    raw = {"target_modules": ["lin"], "experts": experts, "router": {"kind": "soft"}}
    with pytest.raises(ConfigError, match=rf"init_lora_weights.*{message}"):
        molora.AdapterConfig.from_dict(raw)


def test_mistakes_that_the_layer_shows() -> None:
    with pytest.raises(WrapError, match="takes r of the 4 directions"):
        wrapped(nn.Linear(9, 4), "pissa", r=5)
    with pytest.raises(WrapError, match="olora starts from the frozen weights.*meta"):
        wrapped(nn.Linear(9, 4, device="meta"), "olora", r=2)
