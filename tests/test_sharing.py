"""Tensors that layers share, and what keeps tensors from training."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import molora
from molora.errors import ConfigError, WrapError
from molora.model import adapter_parameters, sites
from molora.wrapped import adapter_tensors

Factory = Callable[..., PreTrainedModel]
IDS = torch.arange(1, 17).view(2, 8)
# widths of the tiny Llama: (I, O)
TARGETS = {"q_proj": (32, 32), "k_proj": (32, 16), "down_proj": (64, 32)}
E, R = 3, 2


def config(E: int = E, **experts: Any) -> molora.AdapterConfig:
    router = {"kind": "soft"} if E > 1 else {"kind": "none"}
    block = {"kind": "lora", "num_experts": E, "r": R, **experts}
    raw = {"target_modules": list(TARGETS), "experts": block, "router": router}
    return molora.AdapterConfig.from_dict(raw)


def randomised(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(model).values():
        parameter.data.normal_(0, 0.3, generator=generator)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


def by_hand(model: Any, owners: dict[str, dict[str, str]]) -> None:
    """Check every site against loops over experts, with the tensors of its owners."""
    found = sites(model)
    parameters = dict(model.named_parameters())
    for path, site in found.items():
        wide_in, wide_out = site.in_features, site.out_features
        names = {"A": ("A", wide_in), "B": ("Bt", wide_out)}
        factor = {}
        for name, (attribute, wide) in names.items():
            owner = owners[name].get(path, path)
            whole = parameters[f"{owner}.experts.{attribute}"]
            factor[name] = whole[..., :wide]
        x = torch.randn(5, wide_in, dtype=torch.float64, requires_grad=True)
        gates = torch.rand(5, E, dtype=torch.float64, requires_grad=True)
        base = torch.randn(5, wide_out, dtype=torch.float64)
        want = base.clone()
        for e in range(E):
            a = factor["A"][e % len(factor["A"])]
            b = factor["B"][e % len(factor["B"])]
            scale = 16 / R
            want = want + gates[:, e : e + 1] * scale * (x @ a.t() @ b)
        got = site.experts(x, gates, base)
        inputs = [x, gates, *adapter_parameters(model).values()]
        c = torch.randn_like(got)
        theirs = torch.autograd.grad(want, inputs, c, allow_unused=True)
        ours = torch.autograd.grad(got, inputs, c, allow_unused=True)
        assert (got - want).abs().max() < 1e-12, path
        for one, two in zip(ours, theirs, strict=True):
            assert (one is None) == (two is None)
            assert one is None or (one - two).abs().max() < 1e-12, path  # type: ignore


def owners_of(scope: str, found: list[str]) -> dict[str, str]:
    """Who keeps the tensor that a layer reads, written out by hand."""
    first = {"model": lambda p: "", "layer": lambda p: p.split(".")[2]}
    first["type"] = lambda p: p.split(".")[-1]
    kept: dict[str, str] = {}
    return {p: kept.setdefault(first[scope](p), p) for p in found}


@pytest.mark.parametrize("scope", ["layer", "type", "model"])
@pytest.mark.parametrize("name", ["A", "B"])
def test_a_shared_tensor_is_stored_once_and_read_in_part(
    name: str, scope: str, tiny_llama: Factory, tmp_path: Path
) -> None:
    settings = config(shared={name: scope})
    model = molora.wrap(tiny_llama(), settings)
    assert torch.equal(logits(model), logits(tiny_llama()))
    randomised(model).double()
    found = list(sites(model))
    owners = owners_of(scope, found)
    attribute = {"A": "A", "B": "Bt"}[name]
    stored = {n for n in adapter_tensors(model) if n.endswith(f".{attribute}")}
    assert stored == {f"{p}.experts.{attribute}" for p in set(owners.values())}
    other = {"A": {}, "B": {}}
    by_hand(model, other | {name: owners})
    # the widest I or O of the group
    side = 0 if name == "A" else 1
    for path in set(owners.values()):
        group = [p for p in found if owners[p] == path]
        widest = max(TARGETS[p.split(".")[-1]][side] for p in group)
        whole = dict(model.named_parameters())[f"{path}.experts.{attribute}"]
        assert whole.shape == (1, R, widest)
    # r * widest once per group, E r of the other per site
    once = sum(dict(model.named_parameters())[n].numel() for n in stored)
    rest = sum(E * R * TARGETS[p.split(".")[-1]][1 - side] for p in found)
    counted = sum(s.experts.count() for s in sites(model).values())
    assert counted == once + rest
    # saved, loaded, copied and taken away
    model.float()
    model.save_pretrained(tmp_path / "out")
    again = molora.load(tiny_llama(), tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    twin = copy.deepcopy(model)
    before = logits(model)
    assert torch.equal(logits(twin), before)
    next(p for n, p in twin.named_parameters() if n in stored).data.zero_()
    assert not torch.equal(logits(twin), before)
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(molora.unwrap(model)), logits(tiny_llama()))


def test_one_optimizer_step_moves_what_layers_share_once(tiny_llama: Factory) -> None:
    model: Any = randomised(molora.wrap(tiny_llama(), config(shared={"A": "model"})))
    owner = next(iter(sites(model).values())).experts
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p is owner.A for p in trained) == 1
    model(IDS, labels=IDS).loss.backward()
    total = owner.A.grad.clone()
    # the same loss by a tensor of its own at every site
    apart: Any = molora.wrap(tiny_llama(), config(shared=["A"]))
    with torch.no_grad():
        for mine, theirs in zip(
            sites(apart).values(), sites(model).values(), strict=True
        ):
            mine.experts.A.copy_(theirs.experts.value("A"))
            mine.experts.Bt.copy_(theirs.experts.Bt)
            mine.router.load_state_dict(theirs.router.state_dict())
    apart(IDS, labels=IDS).loss.backward()
    want = torch.zeros_like(total)
    for site in sites(apart).values():
        grad: Any = site.experts.A.grad
        want[..., : grad.shape[-1]] += grad
    assert (total - want).abs().max() < 1e-6 * want.abs().max()
    before = owner.A.detach().clone()
    torch.optim.SGD(trained, lr=0.5).step()
    assert torch.allclose(before - 0.5 * total, owner.A)


def test_values_depend_on_the_seed_and_the_group_alone(tiny_llama: Factory) -> None:
    def wrap(seed: int, *targets: str) -> Any:
        raw = config(shared={"A": "model"}).to_dict()
        raw["target_modules"] = list(targets)
        return molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(raw), seed=seed)

    one, two = wrap(3, *TARGETS), wrap(3, "k_proj", "down_proj")
    theirs = adapter_parameters(one)
    common = adapter_parameters(two).keys() & theirs.keys()
    # Bt and the router of four layers; another layer owns A there
    assert len(common) == 2 * 4
    for name in common:
        assert torch.equal(adapter_parameters(two)[name], theirs[name]), name
    a = [s.experts.value("A") for s in sites(one).values()][1:3]  # type: ignore
    b = [s.experts.value("A") for s in sites(two).values()][:2]  # type: ignore
    c = [s.experts.value("A") for s in sites(wrap(4, *TARGETS)).values()][1:3]  # type: ignore
    for mine, other, third in zip(a, b, c, strict=True):
        assert torch.equal(mine, other)
        assert not torch.equal(mine, third)


def test_frozen_is_saved_and_seeded_is_not(tiny_llama: Factory, tmp_path: Path) -> None:
    saved = {}
    for kind in ("frozen", "seeded"):
        model: Any = molora.wrap(tiny_llama(), config(trainability={"A": kind}), seed=5)
        start = {p: s.experts.value("A").clone() for p, s in sites(model).items()}  # type: ignore
        assert all(a.std() > 0 for a in start.values())
        model(IDS, labels=IDS).loss.backward()
        for path, site in sites(model).items():
            A, B = site.experts.A, site.experts.Bt
            assert isinstance(A, Tensor) and A.grad is None and not A.requires_grad
            assert isinstance(B, Tensor) and B.grad is not None and B.grad.any(), path
            assert site.experts.count() == B.numel()
        for parameter in adapter_parameters(model).values():
            if parameter.requires_grad:
                parameter.data.normal_()
        model.save_pretrained(tmp_path / kind)
        saved[kind] = adapter_tensors(model)
        again = molora.load(tiny_llama(), tmp_path / kind, trainable=True)
        assert torch.equal(logits(again), logits(model))
        for path, site in sites(again).items():
            assert torch.equal(site.experts.value("A"), start[path])  # type: ignore
            assert not site.experts.A.requires_grad  # type: ignore
            assert site.experts.Bt.requires_grad  # type: ignore
    assert any(name.endswith(".A") for name in saved["frozen"])
    assert not any(name.endswith(".A") for name in saved["seeded"])


def test_the_key_of_seeded_tensors_says_what_they_are(tiny_llama: Factory) -> None:
    def drawn(seed: int, **more: Any) -> list[Tensor]:
        settings = config(trainability={"A": "seeded"}, **more)
        model = molora.wrap(tiny_llama(), settings, seed=seed)
        return [s.experts.value("A") for s in sites(model).values()]  # type: ignore

    first, again = drawn(0), drawn(1)
    other = drawn(0, projection_prng_key=7)
    for one, two, three in zip(first, again, other, strict=True):
        assert torch.equal(one, two)
        assert not torch.equal(one, three)
    # every layer and every expert has its own, until they are shared
    assert not torch.equal(first[0], first[1]) and not torch.equal(*first[0][:2])
    shared = drawn(0, shared={"A": "model"})
    assert torch.equal(shared[0], shared[1])


def masked(make: Factory, density: float | None = None) -> Any:
    trainability = {"A": "frozen", "B": "masked"}
    settings = config(trainability=trainability, density=density)
    model: Any = molora.wrap(make(), settings)
    return model


def test_only_the_entries_of_a_mask_train(tiny_llama: Factory, tmp_path: Path) -> None:
    model = masked(tiny_llama, 0.25)
    found = sites(model)
    kept = {p: s.experts.mask_Bt for p, s in found.items()}
    for site in found.values():
        want = round(0.25 * site.experts.Bt.numel())
        assert site.experts.mask_Bt.sum() == want == site.experts.count()
    # decay moves what has no gradient as well
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.5)
    for site in found.values():
        site.experts.Bt.data.normal_()
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        for path, site in found.items():
            assert not site.experts.Bt.grad[~kept[path]].any()
            assert site.experts.Bt.grad[kept[path]].any()
        optimizer.step()
        for path, site in found.items():
            b = site.experts.factors()[1]
            assert not b[~kept[path]].any() and b[kept[path]].all()
            delta = site.experts.delta_weight(0)
            hidden = site.experts.factors()[1][0].t() @ site.experts.A[0] * 8
            assert torch.allclose(delta, hidden, atol=1e-6)
    model.save_pretrained(tmp_path / "out")
    again = molora.load(tiny_llama(), tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    for path, site in sites(again).items():
        assert torch.equal(site.experts.mask_Bt, kept[path])  # type: ignore


def test_masks_by_magnitude_are_one_threshold_for_all_sites(
    tiny_llama: Factory,
) -> None:
    model = masked(tiny_llama)
    with pytest.raises(WrapError, match="train first"):
        molora.mask_by_magnitude(model, 0.1)
    generator = torch.Generator().manual_seed(2)
    found = sites(model)
    for i, site in enumerate(found.values()):
        site.experts.Bt.data.normal_(0, 1 + i, generator=generator)
    before = {p: s.experts.Bt.detach().clone() for p, s in found.items()}
    frozen = {p: s.experts.A.detach().clone() for p, s in found.items()}
    every = torch.cat([b.abs().flatten() for b in before.values()])
    want = int(0.1 * len(every))
    assert molora.mask_by_magnitude(model, 0.1) == want
    tau = every.sort(descending=True).values[want - 1]
    for path, site in found.items():
        assert torch.equal(site.experts.mask_Bt, before[path].abs() >= tau)
        assert not site.experts.Bt.any()
        assert torch.equal(site.experts.A, frozen[path])
    assert torch.equal(logits(model), logits(tiny_llama()))
    with pytest.raises(WrapError, match="density=2"):
        molora.mask_by_magnitude(model, 2)
    plain = molora.wrap(tiny_llama(), config())
    with pytest.raises(WrapError, match=r"no tensor.*experts\.trainability"):
        molora.mask_by_magnitude(plain, 0.1)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"shared": {"C": "model"}}, "no tensor 'C'; there are A, B"),
        ({"shared": {"A": "galaxy"}}, "no scope 'galaxy'; there are experts, layer"),
        ({"shared": ["A", "A"]}, "listed twice"),
        ({"shared": {"A": "model", "B": "type"}}, "would all be the same expert"),
        ({"shared": {"A": "type"}, "r": [1, 2, 3]}, "need equal ranks"),
        ({"trainability": {"C": "frozen"}}, "no tensor 'C'"),
        ({"trainability": {"B": "frozen"}}, "B starts at zero; frozen it would stay"),
        ({"trainability": {"B": "seeded"}}, "B starts at zero; seeded it would stay"),
        ({"trainability": {"A": "masked"}}, "A starts at random values.*mask B"),
        ({"trainability": {"A": "asleep"}}, "frozen.*seeded.*masked"),
        ({"density": 0.5}, "density: no tensor is masked"),
        ({"projection_prng_key": 1}, "projection_prng_key: no tensor is seeded"),
        ({"trainability": {"B": "masked"}, "r": [1, 2, 3]}, "masked.*equal ranks"),
        ({"trainability": {"B": "masked"}, "density": 0.0}, "experts.density"),
    ],
)
def test_what_means_nothing_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        config(**settings)


def test_layers_that_cannot_share_are_named(tiny_llama: Factory) -> None:
    def wrap(shared: dict[str, str], **change: Any) -> Any:
        raw = config(shared=shared).to_dict()
        return molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(raw | change))

    other = [{"match": "down_proj", "experts": {"r": 5}}]
    with pytest.raises(WrapError, match=r"q_proj.*down_proj.*share A.*same rank"):
        wrap({"A": "layer"}, overrides=other)
    other = [{"match": "k_proj", "experts": {"trainability": {"A": "frozen"}}}]
    with pytest.raises(WrapError, match=r"share A.*different settings of trainability"):
        wrap({"A": "model"}, overrides=other)
    with pytest.raises(WrapError, match=r"'lm_head' belongs to no numbered layer"):
        wrap({"A": "layer"}, target_modules=["q_proj", "lm_head"])
    with pytest.raises(WrapError, match=r"no two target layers of lora have one A .*"):
        wrap({"A": "layer"}, target_modules=["q_proj"])
    with pytest.raises(WrapError, match=r"the scope type; list it .shared: \[B\]"):
        wrap({"B": "type"}, target_modules=r"model.layers.0.*proj")
    # layers of two groups may be alone in a third
    assert sites(wrap({"A": "layer"}, target_modules=["q_proj", "0.mlp.up_proj"]))
    # another rank in a group of its own is fine
    other = [{"match": "down_proj", "experts": {"r": 5}}]
    assert len(sites(wrap({"A": "type"}, overrides=other))) == 6


def test_growing_refuses_a_fixed_number_of_experts(tiny_llama: Factory) -> None:
    raw = config(shared={"A": "model"}).to_dict()
    raw["router"] = {"kind": "topk", "top_k": 2, "renormalize": True}
    model = molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(raw))
    with pytest.raises(WrapError, match="shared among layers"):
        molora.grow(model)
    joined = {"kind": "superlora", "num_experts": E, "scope": "model"}
    whole = molora.AdapterConfig.from_dict(raw | {"experts": joined})
    with pytest.raises(WrapError, match="shared among layers"):
        molora.grow(molora.wrap(tiny_llama(), whole))
    raw["experts"] |= {"shared": [], "trainability": {"A": "frozen"}}
    model = molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(raw))
    old = {n: p.detach().clone() for n, p in adapter_parameters(model).items()}
    molora.grow(model)
    trained = [n for n, p in adapter_parameters(model).items() if p.requires_grad]
    assert trained and not any(".A." in name for name in trained)
    for path, site in sites(model).items():
        assert torch.equal(site.experts.value("A")[:E], old[f"{path}.experts.A"])  # type: ignore


def test_a_router_that_reads_factors_sees_those_of_the_owner_change() -> None:
    layers = [torch.nn.Linear(12, 10) for _ in range(2)]
    raw = {
        "target_modules": ["0", "1"],
        "experts": {"kind": "lora", "num_experts": E, "r": R, "shared": {"A": "model"}},
        "router": {"kind": "arrow", "top_k": 1},
    }
    model: Any = torch.nn.Sequential(*layers)
    molora.wrap(model, molora.AdapterConfig.from_dict(raw)).eval()
    randomised(model)
    owner, follower = sites(model).values()
    before = follower.router.directions().clone()  # type: ignore[union-attr, operator]
    assert torch.equal(follower.router.directions(), before)  # type: ignore
    with torch.no_grad():
        owner.experts.A.copy_(torch.randn(1, R, 12))  # type: ignore[operator]
    after = follower.router.directions()  # type: ignore[union-attr, operator]
    assert (after - before).abs().max() > 0.1


def test_layers_that_share_a_tensor_start_it_alike() -> None:
    raw = {
        "target_modules": ["0", "1"],
        "experts": {"kind": "lora", "r": 2, "shared": {"A": "model"}},
        "overrides": [{"match": "1", "experts": {"init_lora_weights": "gaussian"}}],
    }
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    with pytest.raises(WrapError, match="different settings of init_lora_weights"):
        molora.wrap(model, molora.AdapterConfig.from_dict(raw))


def test_masks_by_magnitude_inside_magnitudes() -> None:
    inner = {"kind": "lora", "r": 2, "trainability": {"B": "masked"}}
    settings = {"kind": "dora", "inner": inner}
    raw = {"target_modules": ["0"], "experts": settings}
    model = molora.wrap(
        torch.nn.Sequential(torch.nn.Linear(6, 5)), molora.AdapterConfig.from_dict(raw)
    )
    experts: Any = sites(model)["0"].experts
    values = torch.arange(1.0, 11.0).view(1, 2, 5)
    experts.inner.Bt.data.copy_(values)
    assert molora.mask_by_magnitude(model, 0.3) == 3
    assert torch.equal(experts.inner.mask_Bt, values > 7)
    assert not experts.inner.Bt.any()
