"""Sums of families: RoSA by the authors' numbers, mixtures by definition, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import molora
from molora.errors import ConfigError
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

ROSA = [
    {"kind": "lora", "r": 3, "lora_alpha": 6.0},
    {"kind": "sparse", "density": 0.08, "exact": True},
]


def test_one_expert_is_rosa() -> None:
    t, hyper = vector("rosa_forward")
    assert (hyper["r"], hyper["alpha"], hyper["density"]) == (3, 6, 0.08)
    site = site_of({"kind": "sum", "parts": ROSA}, t["base.weight"], t["base.bias"])
    low, few = site.experts.parts
    rows, columns = t["indices"]
    few.set_mask(0, rows * 28 + columns)
    with torch.no_grad():
        low.A.copy_(t["param.A"])
        low.Bt.copy_(t["param.B"].t())
        few.values.copy_(t["param.values"])
    grads = {
        "A": lambda: low.A.grad[0],
        "B": lambda: low.Bt.grad[0].t(),
        "values": lambda: few.values.grad[0],
    }
    found = worst_of_vector(site, t, grads)
    assert max(found.values()) < 1e-12, found
    assert site.experts.count() == 3 * 48 + 44


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_mixture_by_its_definition(top_k: int | None) -> None:
    parts = [*ROSA, {"kind": "lokr", "r": 2}, {"kind": "mora", "r": 2, "mora_type": 1}]
    site = site_of({"kind": "sum", "parts": parts}, *layer_of(20, 28), E=4)
    disturb(site)
    own = site.experts.parts

    def delta(e: int, x: Tensor) -> Tensor:
        y = 2.0 * x @ own[0].A[e].t() @ own[0].Bt[e]
        flat = torch.zeros(20 * 28, dtype=torch.float64)
        flat = flat.index_put((own[1].indices[e].long(),), own[1].values[e])
        W = flat.view(20, 28) + 4.0 * torch.kron(
            own[2].w1[e], own[2].w2_a[e] @ own[2].w2_b[e]
        )
        z = torch.cat([x, x[:, :2]], 1).view(-1, 3, 10).sum(1) @ own[3].M[e].t()
        return y + x @ W.t() + torch.cat([z, z], 1)

    found = worst_of_sum(site, delta, top_k=top_k)
    assert max(found.values()) < 1e-12, found
    eye = torch.eye(28, dtype=torch.float64)
    dense = site.experts.delta_weight(1, site.base.weight)
    assert torch.allclose(dense, delta(1, eye).t(), rtol=0, atol=1e-6)
    x = torch.randn(3, 28, dtype=torch.float64)
    assert torch.equal(run(site, x, torch.zeros(3, 4).double(), top_k), site.base(x))
    assert run(site, x[:0], gates_of(2, 4)[:0], top_k).shape == (0, 20)


def test_it_starts_at_the_base_as_its_parts_do() -> None:
    site = site_of({"kind": "sum", "parts": ROSA}, *layer_of(20, 28), E=2)
    x = torch.randn(5, 28, dtype=torch.float64)
    assert torch.equal(run(site, x, gates_of(5, 2)), site.base(x))
    assert site.experts.starts_at_zero and site.experts.frozen == ()
    started = [{"kind": "goat", "r": 2}, ROSA[1]]
    site = site_of({"kind": "sum", "parts": started}, *layer_of(20, 28), E=2)
    assert not site.experts.starts_at_zero
    assert site.experts.parts[0].A_start.abs().sum() > 0
    trained = {n for n, p in site.experts.named_parameters() if p.requires_grad}
    assert trained == {"parts.0.A", "parts.0.Bt", "parts.1.values"}
    frozen = [{"kind": "lora", "r": 2, "trainability": {"A": "frozen"}}, ROSA[0]]
    site = site_of({"kind": "sum", "parts": frozen}, *layer_of(20, 28), E=2)
    trained = {n for n, p in site.experts.named_parameters() if p.requires_grad}
    assert trained == {"parts.0.Bt", "parts.1.A", "parts.1.Bt"}


def test_it_is_saved_loaded_merged_and_overridden(tmp_path: Path) -> None:
    def base() -> Any:
        torch.manual_seed(1)
        layers = {name: nn.Linear(28, 28) for name in ("a", "b")}
        model: Any = nn.Sequential(nn.ModuleDict(layers))
        model.config = None
        return model

    raw = {
        "target_modules": ["a", "b"],
        "experts": {"kind": "sum", "num_experts": 4, "parts": ROSA},
        "router": {"kind": "soft"},
        "overrides": [{"match": "b$", "experts": {"num_experts": 1}}],
    }
    config = molora.AdapterConfig.from_dict(raw)
    assert molora.AdapterConfig.from_dict(config.to_dict()) == config
    assert "num_experts" not in config.to_dict()["experts"]["parts"][0]
    model = molora.wrap(base(), config)
    found: Any = list(sites(model).values())
    assert [site.experts.num_experts for site in found] == [4, 1]
    assert [len(site.experts.parts[1].values) for site in found] == [4, 1]
    for site in found:
        disturb(site)
    model.save_pretrained(tmp_path / "out")
    again: Any = list(sites(molora.load(base(), tmp_path / "out")).values())
    x = torch.randn(5, 28)
    for one, two in zip(found, again, strict=True):
        gates = None if one.experts.num_experts == 1 else gates_of(5, 4).float()
        assert torch.equal(run(one, x, gates), run(two, x, gates))
    want = found[1](x)
    found[1].merge()
    assert torch.allclose(found[1](x), want, atol=1e-5) and found[1].merged
    found[1].unmerge()


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([ROSA[0]], r"experts\.parts: .*at least 2"),
        (
            [{"kind": "ia3"}, *ROSA],
            r"\.parts\[0\]\.kind: ia3 changes what.*lora",
        ),
        ([*ROSA, {"r": 1}], r"experts\.parts\[2\]\.kind: this field is required"),
        ([*ROSA, {"kind": "lor"}], r"experts\.parts\[2\]\.kind: .*Did you mean"),
        ([*ROSA, {"kind": "lora", "rank": 1}], r"parts\[2\]\.rank: unknown field"),
        ([*ROSA, {"kind": "lora", "num_experts": 2}], r"\[2\]\.num_experts: all parts"),
        (
            [*ROSA, {"kind": "lotr"}],
            r"parts\[2\]\.shared: A, B would be shared",
        ),
        ([ROSA[0], {"kind": "sparse"}], r"parts\[1\].*density: set it or r"),
    ],
)
def test_what_is_no_part_is_refused(parts: list[Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        site_of({"kind": "sum", "parts": parts}, *layer_of(20, 28), E=4)


def test_a_frozen_part_leaves_the_others_trained() -> None:
    parts = [{"kind": "lora", "trainability": {"A": "frozen"}}, {"kind": "lora"}]
    site = site_of({"kind": "sum", "parts": parts}, *layer_of(20, 28))
    trained = {n for n, p in site.experts.named_parameters() if p.requires_grad}
    assert trained == {"parts.0.Bt", "parts.1.A", "parts.1.Bt"}
    # r O of the first part, r (I + O) of the second
    assert site.experts.count() == 8 * 20 + 8 * 48


@pytest.mark.parametrize(
    "part", [{"kind": "lora", "shared": {"A": "type"}}, {"kind": "vera", "r": 4}]
)
def test_a_part_shares_nothing_among_layers(part: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"parts\[0\]\.shared: A.*set shared: \[A"):
        site_of({"kind": "sum", "parts": [part, *ROSA]}, *layer_of(20, 28))
    within = {**part, "shared": list(part.get("shared", ("A", "B")))}
    site = site_of({"kind": "sum", "parts": [within, *ROSA]}, *layer_of(20, 28), E=3)
    assert len(site.experts.parts[0].A) == 1
