"""Sparse banks: numbers of PEFT's SHiRA, laws of masks, mixtures by definition."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import molora
from molora.errors import ConfigError, WrapError
from molora.model import sites
from tests.families import (
    disturb,
    gates_of,
    layer_of,
    run,
    site_of,
    vector,
    worst_of_sum,
    worst_of_vector,
)


def test_one_expert_is_shira() -> None:
    t, hyper = vector("shira_random")
    settings = {"kind": "sparse", "r": hyper["r"], "random_seed": hyper["random_seed"]}
    site = site_of(settings, t["base.weight"], t["base.bias"])
    rows, columns = t["indices"]
    assert torch.equal(site.experts.indices[0].long(), rows * 28 + columns)
    with torch.no_grad():
        site.experts.values.copy_(t["param.values"])
    found = worst_of_vector(site, t, {"values": lambda: site.experts.values.grad[0]})
    assert max(found.values()) < 1e-12, found
    assert torch.equal(site.delta_weight(), t["delta.weight"])
    assert site.experts.count() == hyper["r"] * (28 + 20)


@pytest.mark.parametrize("more", [{"density": 0.2}, {"r": 3}])
@pytest.mark.parametrize(("out", "wide"), [(50, 30), (20, 28), (7, 31)])
@pytest.mark.parametrize("top_k", [None, 2])
def test_a_mixture_by_its_definition(
    out: int, wide: int, more: dict[str, Any], top_k: int | None
) -> None:
    site = site_of({"kind": "sparse", **more}, *layer_of(out, wide), E=4)
    disturb(site)
    own = site.experts

    def dense(e: int) -> Tensor:
        flat = torch.zeros(out * wide, dtype=torch.float64)
        return flat.index_put((own.indices[e].long(),), own.values[e]).view(out, wide)

    found = worst_of_sum(site, lambda e, x: x @ dense(e).t(), top_k=top_k)
    assert max(found.values()) < 1e-12, found
    assert torch.equal(own.delta_weight(1, site.base.weight), dense(1))
    x = torch.randn(3, wide, dtype=torch.float64)
    assert torch.equal(run(site, x, torch.zeros(3, 4).double(), top_k), site.base(x))
    one = run(site, x[:1], torch.tensor([[0.0, 2.0, 0.0, 0.0]]).double(), top_k)
    assert torch.allclose(one, site.base(x[:1]) + 2 * x[:1] @ dense(1).t(), atol=1e-12)
    none = run(site, x[:0], gates_of(2, 4)[:0], top_k)
    none.sum().backward()
    assert none.shape == (0, out) and not own.values.grad.any()


def test_every_place_is_as_likely_as_density_says() -> None:
    """Random Masking: a Bernoulli draw per entry, alike for all experts of a layer."""
    hits, numbers = torch.zeros(20 * 28), []
    for seed in range(400):
        site = site_of(
            {"kind": "sparse", "density": 0.1, "random_seed": 10 * seed},
            *layer_of(20, 28),
            E=2,
        )
        own = site.experts.indices
        assert own.shape[0] == 2 and not torch.equal(own[0], own[1])
        assert all(len(set(mask.tolist())) == own.shape[1] for mask in own)
        numbers.append(float(own.shape[1]))
        hits[own[1].long()] += 1
    drawn = torch.tensor(numbers)
    # mean 56, standard deviation sqrt(560 * 0.1 * 0.9) = 7.1; 40 +- 6 hits per place
    assert abs(drawn.mean() - 56) < 1.5 and abs(drawn.std() - 7.1) < 1.0
    assert hits.min() > 10 and hits.max() < 75 and abs(hits.mean() - 40) < 1
    exact = {"kind": "sparse", "density": 0.1, "exact": True}
    assert site_of(exact, *layer_of(7, 31)).experts.indices.shape == (1, 21)


def test_places_are_saved_and_a_seed_gives_them_again(tmp_path: Path) -> None:
    def make(seed: int = 0) -> Any:
        torch.manual_seed(1)
        model = nn.ModuleDict({"lin": nn.Linear(28, 20)})
        model.config = None
        raw = {
            "target_modules": ["lin"],
            "experts": {"kind": "sparse", "num_experts": 2, "density": 0.1},
            "router": {"kind": "soft"},
        }
        return molora.wrap(model, molora.AdapterConfig.from_dict(raw), seed=seed)

    first, same, other = make(), make(), make(1)
    masks = [sites(m)["lin"].experts.indices for m in (first, same, other)]
    assert torch.equal(masks[0], masks[1])
    assert masks[0].shape != masks[2].shape or not torch.equal(masks[0], masks[2])
    names = molora.wrapped.adapter_tensors(first)
    assert "lin.experts.indices" in names and "lin.experts.values" in names
    own: Any = sites(first)["lin"].experts
    count = own.values.shape[1]
    own.set_mask(1, torch.arange(count).flip(0))
    disturb(sites(first)["lin"])
    first.save_pretrained(tmp_path / "out")
    torch.manual_seed(1)
    base = nn.ModuleDict({"lin": nn.Linear(28, 20)})
    again: Any = sites(molora.load(base, tmp_path / "out"))["lin"].experts
    assert torch.equal(again.indices, own.indices)
    assert torch.equal(again.indices[1], torch.arange(count, dtype=torch.int32))
    assert torch.equal(again.values, own.values)


def test_another_mask() -> None:
    site = site_of({"kind": "sparse", "r": 1}, *layer_of(20, 28), E=2)
    disturb(site)
    before = site.experts.indices[0].clone()
    score = torch.zeros(20, 28)
    score.view(-1)[100:148] = torch.rand(48) + 1
    site.experts.set_mask(1, score.flatten().topk(48).indices)
    assert site.experts.indices[1].tolist() == list(range(100, 148))
    assert not site.experts.values[1].any() and site.experts.values[0].all()
    assert torch.equal(site.experts.indices[0], before)
    with pytest.raises(WrapError, match="has 48 places, each once; got 47 in"):
        site.experts.set_mask(0, torch.arange(47))
    with pytest.raises(WrapError, match="got 1 in a tensor"):
        site.experts.set_mask(0, torch.zeros(48, dtype=torch.long))
    with pytest.raises(WrapError, match="places are 0 to 559; got 520 to 567"):
        site.experts.set_mask(0, torch.arange(520, 568))
    with pytest.raises(WrapError, match="no expert -1 among 2"):
        site.experts.set_mask(-1, torch.arange(48))


def test_nothing_dense_is_kept_nor_computed() -> None:
    site = site_of({"kind": "sparse", "density": 0.01}, *layer_of(60, 50), E=4)
    x = torch.randn(16, 50, dtype=torch.float64, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(t.numel()), t)[1], lambda t: t
    ):
        zero = torch.zeros(16, 60, dtype=torch.float64)
        y = site.experts(x, gates_of(16, 4).requires_grad_(), zero)
    n = site.experts.values.shape[1]
    # x, gates, values and places
    assert sum(kept) == 16 * 50 + 16 * 4 + 2 * 4 * n
    made: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.layout == torch.strided:
                made.append(out.untyped_storage().nbytes() // 8)
            return out

    with Watch():
        y.sum().backward()
    assert made and max(made) < 60 * 50


def peft_layer(rows: int, wide: int, **settings: Any) -> tuple[Any, Any]:
    model = nn.ModuleDict({"lin": nn.Linear(wide, rows)}).double()
    base = nn.Linear(wide, rows).double()
    base.load_state_dict(model["lin"].state_dict())
    config = peft.ShiraConfig(target_modules=["lin"], init_weights=False, **settings)
    return peft.get_peft_model(model, config).double(), base  # type: ignore[arg-type]


def test_peft_computes_the_same_from_what_is_exported() -> None:
    site = site_of({"kind": "sparse", "r": 2}, *layer_of(20, 28), E=2)
    disturb(site)
    form = site.experts.to_peft(1)
    theirs, base = peft_layer(20, 28, **form.settings)
    prefix = "base_model.model.lin."
    state = {prefix + n: v for n, v in form.tensors.items()}
    assert state.keys() == peft.get_peft_model_state_dict(theirs).keys()
    peft.set_peft_model_state_dict(theirs, state)
    x = torch.randn(5, 28, dtype=torch.float64)
    gates = torch.tensor([[0.0, 1.0]]).double().expand(5, 2)
    want = theirs.base_model.model["lin"](x) - base(x)
    got = run(site, x, gates) - site.base(x)
    assert (got - want).abs().max() < 1e-9 < want.abs().max()
    density = site_of({"kind": "sparse", "density": 0.1}, *layer_of(20, 28))
    with pytest.raises(WrapError, match="trains r .* so set r in place of density"):
        density.experts.to_peft(0)


def test_what_peft_saved_is_read() -> None:
    theirs, base = peft_layer(20, 28, r=2)
    state = peft.get_peft_model_state_dict(theirs)
    tensors = {n.removeprefix("base_model.model.lin."): v for n, v in state.items()}
    config = theirs.peft_config["default"].to_dict()
    cls = molora.experts.SparseExperts
    turned = {n: v.flip(-1) for n, v in tensors.items()}
    for given in (tensors, turned):
        block, ours = cls.from_peft(config, given, 28, 20)
        site = site_of(block, base.weight.data, base.bias.data)
        site.experts.load_state_dict(ours)
        x = torch.randn(5, 28, dtype=torch.float64)
        want = theirs.base_model.model["lin"](x)
        assert torch.allclose(run(site, x, None), want, rtol=0, atol=1e-9)
    with pytest.raises(WrapError, match="shira_weight and shira_indices, not shira_w"):
        cls.from_peft(config, {"shira_weight": tensors["shira_weight"]}, 28, 20)


def test_what_does_not_fit_is_refused() -> None:
    layer = layer_of(20, 28)
    with pytest.raises(ConfigError, match="density: set it or r"):
        site_of({"kind": "sparse"}, *layer)
    with pytest.raises(ConfigError, match="density: set it or r"):
        site_of({"kind": "sparse", "r": 1, "density": 0.1}, *layer)
    with pytest.raises(ConfigError, match="exact: r always"):
        site_of({"kind": "sparse", "r": 1, "exact": True}, *layer)
    with pytest.raises(WrapError, match=r"experts\.r=12.* 576 .*560.*r up to 11 works"):
        site_of({"kind": "sparse", "r": 12}, *layer)
    few = {"kind": "sparse", "density": 0.001, "exact": True}
    with pytest.raises(
        WrapError, match=r"density=0\.001: leaves nothing.*above 0\.001"
    ):
        site_of(few, *layer)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_bases(autocast: bool) -> None:
    weight, bias = layer_of(20, 28)
    settings = {"kind": "sparse", "density": 0.2, "random_seed": 1}
    narrow = weight if autocast else weight.bfloat16()
    site = site_of(settings, narrow, bias.to(narrow.dtype), E=2)
    site.experts.float()
    disturb(site)
    x = torch.randn(5, 28)
    if autocast:
        site.base.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = run(site, x if autocast else x.bfloat16(), gates_of(5, 2).float())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and site.experts.values.grad.dtype == torch.float32
    exact = site_of(settings, weight, bias, E=2)
    exact.experts.load_state_dict(site.experts.state_dict())
    want = run(exact, x.double(), gates_of(5, 2))
    assert (y.double() - want).abs().max() < 0.05 * want.abs().max()
