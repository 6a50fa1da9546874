"""One expert more: what was learnt stays wherever the new one is not chosen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import molora
from molora.errors import ConfigError, WrapError
from molora.model import adapter_parameters, sites

Factory = Callable[..., PreTrainedModel]
MASKED = {"B": "masked"}
IDS = torch.arange(1, 25).view(2, 12)
FAMILIES: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "r": 3},
    "lists": {"kind": "lora", "r": [1, 4, 2, 3], "lora_alpha": [1.0, 2.0, 3.0, 4.0]},
    "shared": {"kind": "lora", "r": 3, "shared": ["A"]},
    "ia3": {"kind": "ia3"},
}


def raw(experts: dict[str, Any], targets: Any, **router: Any) -> dict[str, Any]:
    return {
        "target_modules": targets,
        "experts": {"num_experts": 4, **experts},
        "router": {"kind": "topk", "top_k": 2, **router},
    }


def randomise(model: Any, seed: int = 0, only_trained: bool = False) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            if parameter.requires_grad or not only_trained:
                draw = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(draw * 0.5)


def mixture(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layer = nn.Sequential(nn.Linear(12, 9))
    molora.wrap(layer, molora.AdapterConfig.from_dict(raw(FAMILIES[name], ["0"])))
    randomise(layer)
    # padding rows of unequal ranks are zero
    for e, rank in enumerate(getattr(sites(layer)["0"].experts, "ranks", [])):
        experts: Any = sites(layer)["0"].experts
        experts.A.data[e % len(experts.A), rank:] = 0
        experts.Bt.data[e, rank:] = 0
    return layer.double()


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(60, 12, generator=generator, dtype=torch.float64)


def run(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and gates [T, E]."""
    with torch.no_grad(), molora.record_routing(layer) as trace:
        y = layer(x)
    return y, trace.sites["0"].gates[0].flatten(0, -2)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_that_do_not_choose_it_are_unchanged(name: str) -> None:
    layer, x = mixture(name), tokens()
    before, _ = run(layer, x)
    molora.grow(layer)
    randomise(layer, seed=5, only_trained=True)
    after, gates = run(layer, x)
    assert gates.shape[1] == 5
    chosen = gates[:, 4] > 0
    assert 5 < chosen.sum() < 55
    change = (after - before).abs().amax(1)
    assert change[~chosen].max() < 1e-12
    assert change[chosen].min() > 1e-6


def test_the_new_expert_starts_at_zero_with_the_mean_row() -> None:
    layer, x = mixture("lora"), tokens()
    rows = sites(layer)["0"].router.gate.weight.detach().clone()  # type: ignore
    molora.grow(layer)
    site: Any = sites(layer)["0"]
    assert torch.equal(site.router.gate.weight[:4], rows)
    assert (site.router.gate.weight[4] - rows.mean(0)).abs().max() < 1e-15
    assert site.experts.Bt[4].abs().sum() == 0
    assert site.experts.A[4].abs().min() > 0
    y, gates = run(layer, x)
    # where it is chosen it adds nothing: the other one has its own part alone
    deltas = [x @ site.experts.delta_weight(e).double().t() for e in range(4)]
    want = site.base(x) + sum(
        g[:, None].double() * d for g, d in zip(gates.t(), deltas, strict=False)
    )
    assert (y - want).abs().max() < 1e-5


def test_a_whole_model_is_unchanged_until_then(tiny_llama: Factory) -> None:
    experts = {"kind": "lora", "r": 2, "num_experts": 8}
    config = molora.AdapterConfig.from_dict(raw(experts, ["q_proj", "up_proj"]))
    model: Any = molora.wrap(tiny_llama(), config)
    randomise(model)
    for site in sites(model).values():
        site.router.gate.weight.data.mul_(20)  # type: ignore
    model.double()
    with torch.no_grad():
        before = model(IDS).logits
        molora.grow(model)
        with molora.record_routing(model) as trace:
            after = model(IDS).logits
    used = sum(float(s.gates[0][..., 8].sum()) for s in trace.sites.values())
    assert used == 0
    assert (after - before).abs().max() < 1e-12
    assert all(s.gates[0].shape[-1] == 9 for s in trace.sites.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_training_reaches_the_new_expert_alone(name: str) -> None:
    layer, x = mixture(name), tokens()
    before, _ = run(layer, x)
    molora.grow(layer).train()
    old = {n: p.detach().clone() for n, p in adapter_parameters(layer).items()}
    # everything is given to the optimizer, with decay
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(5):
        (layer(x) - 3).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {n for n, p in adapter_parameters(layer).items() if not p.equal(old[n])}
    assert changed == {n for n in old if n.endswith("original1")}
    parts = {"ia3": ["vectors"], "shared": ["Bt"]}.get(name, ["A", "Bt"])
    assert len(changed) == len(parts) + 1
    after, gates = run(layer.eval(), x)
    chosen = gates[:, 4] > 0
    assert chosen.any() and not chosen.all()
    assert (after - before)[~chosen].abs().max() < 1e-12
    assert (after - before)[chosen].abs().amax(1).min() > 1e-6


def test_it_is_saved_grown_again_collapsed_and_exported(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    config = raw(FAMILIES["lora"], ["q_proj", "up_proj"])
    del config["experts"]["num_experts"]
    config["layout"] = {"shape": "inverted_triangle", "counts": [3, 4]}
    config["overrides"] = [{"match": "q_proj", "experts": {"num_experts": 2}}]
    model = molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(config))
    randomise(model)
    molora.grow(molora.grow(model), seed=1)
    counts = [site.experts.num_experts for site in sites(model).values()]
    assert counts == [4, 5, 4, 6]
    randomise(model, 2)
    model.save_pretrained(tmp_path / "out")
    again = molora.load(tiny_llama(), tmp_path / "out", trainable=True)
    theirs = adapter_parameters(again)
    for name, parameter in adapter_parameters(model).items():
        assert torch.equal(parameter, theirs[name])
        assert theirs[name].requires_grad == parameter.requires_grad, name
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        result = molora.collapse(again, "concat", show_progress=False)
    assert all(site.experts.num_experts == 1 for site in sites(again).values())
    assert result.report.method == "concat"


def test_the_experts_of_a_grown_mixture_are_exported(
    tiny_llama: Factory, tmp_path: Path
) -> None:
    config = raw(FAMILIES["lora"], ["q_proj"])
    model = molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(config))
    randomise(model)
    molora.grow(model)
    folders = molora.export_peft_experts(model, tmp_path / "out")
    again = molora.import_peft(tiny_llama(), folders, router=tmp_path / "out")
    with torch.no_grad():
        assert len(folders) == 5
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_what_cannot_grow_is_refused() -> None:
    for router, message in (
        ({"kind": "soft"}, "SoftRouter depend on every expert"),
        ({"renormalize": False}, "renormalize: true"),
        ({"input": "task", "tasks": ["a", "b"]}, "fixed table of tasks"),
    ):
        config = raw(FAMILIES["lora"], ["0"])
        config["router"] = config["router"] | router
        if router.get("kind"):
            config["router"] = router
        layer = nn.Sequential(nn.Linear(4, 4))
        molora.wrap(layer, molora.AdapterConfig.from_dict(config))
        with pytest.raises(WrapError, match=message):
            molora.grow(layer)
    single = {"target_modules": ["0"], "experts": {"kind": "lora"}}
    plain = molora.unwrap(layer)
    with pytest.raises(WrapError, match=r"no router to extend.*import_peft"):
        molora.grow(molora.wrap(plain, molora.AdapterConfig.from_dict(single)))
    with pytest.raises(WrapError, match="no molora adapter"):
        molora.grow(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("experts", "told"),
    [
        ({"kind": "sparse", "density": 0.5, "exact": True}, "SparseExperts"),
        ({"kind": "dora", "inner": {"kind": "vera", "r": 3}}, "VeRAExperts"),
        (
            {"kind": "dora", "inner": {"kind": "lora", "trainability": MASKED}},
            "LoRAExperts",
        ),
        (
            {"kind": "sum", "parts": [{"kind": "goat", "r": 2}, {"kind": "lora"}]},
            "GOATExperts",
        ),
        ({"kind": "lora", "shared": ["B"]}, "share B.*not start at zero"),
    ],
)
def test_experts_inside_others_that_cannot_grow_are_refused(
    experts: dict[str, Any], told: str
) -> None:
    config = molora.AdapterConfig.from_dict(raw(experts, ["0"]))
    layer = molora.wrap(nn.Sequential(nn.Linear(12, 9)), config)
    before = {name: p.clone() for name, p in layer.named_parameters()}
    with pytest.raises(WrapError, match=told):
        molora.grow(layer, seed=1)
    after = dict(layer.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], p) for name, p in after.items())


def test_sparse_experts_are_not_kept_apart() -> None:
    config = {**raw({"kind": "sparse", "density": 0.5}, ["0"]), "train": "newest"}
    layer = nn.Sequential(nn.Linear(12, 9))
    with pytest.raises(WrapError, match="newest cannot keep the values of Sparse"):
        molora.wrap(layer, molora.AdapterConfig.from_dict(config))
    assert type(layer[0]) is nn.Linear


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_1"])
def test_a_start_from_the_weight_is_that_of_the_old_experts(init: str) -> None:
    experts = {"kind": "lora", "r": 3, "init_lora_weights": init}
    config = molora.AdapterConfig.from_dict(raw(experts, ["0"]))
    layer = molora.wrap(nn.Sequential(nn.Linear(12, 9)), config, seed=1)
    randomise(layer, only_trained=True)
    site: Any = sites(layer)["0"]
    before = [site.experts.delta_weight(e).clone() for e in range(4)]
    molora.grow(layer, seed=2)
    site = sites(layer)["0"]
    for e, delta in enumerate(before):
        assert torch.equal(site.experts.delta_weight(e), delta)
    assert site.experts.delta_weight(4).abs().max() < 1e-6


def test_what_would_move_the_old_experts_is_refused() -> None:
    config = raw({"kind": "lora"}, ["0"])
    balance = [{"kind": "bias", "weight": 0.1}]
    layer = nn.Sequential(nn.Linear(12, 9))
    model = molora.wrap(
        layer, molora.AdapterConfig.from_dict({**config, "balance": balance})
    )
    with pytest.raises(WrapError, match="selection bias moves"):
        molora.grow(model)
    phatgoose = {**config, "router": {"kind": "phatgoose", "top_k": 2}}
    layer = nn.Sequential(nn.Linear(12, 9))
    model = molora.wrap(layer, molora.AdapterConfig.from_dict(phatgoose))
    with pytest.raises(WrapError, match="depend on every expert"):
        molora.grow(model)
    for router in (
        {"kind": "soft"},
        {"kind": "topk", "top_k": 2, "renormalize": False},
    ):
        with pytest.raises(ConfigError, match="train: newest keeps"):
            molora.AdapterConfig.from_dict(
                {**config, "router": router, "train": "newest"}
            )
