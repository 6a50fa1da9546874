"""Cosine between experts against values worked out by hand and dense updates."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import molora
from molora.layer import MoloraLinear
from molora.model import sites
from molora.page import expert_similarity

Factory = Callable[..., PreTrainedModel]


def first_site(base: PreTrainedModel, target: str, **experts: Any) -> MoloraLinear:
    settings = {
        "target_modules": [target],
        "experts": {"num_experts": 3, **experts},
        "router": {"kind": "soft"},
    }
    config = molora.AdapterConfig.from_dict(settings)
    site = next(iter(sites(molora.wrap(base, config, seed=0)).values()))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in site.experts.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=generator)
    return site


def cosines(deltas: list[Tensor]) -> Tensor:
    flat = torch.stack([delta.double().flatten() for delta in deltas])
    return torch.nn.functional.normalize(flat) @ torch.nn.functional.normalize(flat).T


def test_rank_one_by_hand(tiny_llama: Factory) -> None:
    site = first_site(tiny_llama(), "up_proj", kind="lora", r=1)
    A, Bt = site.experts.A.detach(), site.experts.Bt.detach()
    A.zero_()
    Bt.zero_()
    A[0, 0, :2] = torch.tensor([1.0, 0.0])
    A[1, 0, :2] = torch.tensor([1.0, 1.0])
    A[2, 0, :2] = torch.tensor([0.0, 2.0])
    Bt[0, 0, :2] = torch.tensor([3.0, 4.0])
    Bt[1, 0, :2] = torch.tensor([4.0, 3.0])
    Bt[2, 0, :2] = torch.tensor([-4.0, -3.0])
    found = expert_similarity(site)
    root = 1 / math.sqrt(2)
    # cosine of the rows of A times cosine of the columns of B: 24 / 25, and -1
    want = [[1, 0.96 * root, 0], [0.96 * root, 1, -root], [0, -root, 1]]
    assert found.dtype == torch.float64
    assert torch.allclose(found, torch.tensor(want, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("shared", [[], ["A"], ["B"]])
def test_lora_equals_dense_updates(tiny_llama: Factory, shared: list[str]) -> None:
    alphas = [4.0, 8.0, 1.0]
    settings = {"r": 3, "lora_alpha": alphas, "shared": shared}
    site = first_site(tiny_llama(), "down_proj", kind="lora", **settings)
    A = site.experts.A.detach().double().expand(3, -1, -1)
    Bt = site.experts.Bt.detach().double().expand(3, -1, -1)
    want = cosines([b.T @ a for a, b in zip(A, Bt, strict=True)])
    assert torch.allclose(expert_similarity(site), want, atol=1e-12)
    assert abs(want[0, 1]) > 1e-4


def test_goat_counts_what_the_base_is_corrected_by(tiny_llama: Factory) -> None:
    site = first_site(tiny_llama(), "up_proj", kind="goat", r=2)
    experts = site.experts
    scale = 32 / 2
    start = experts.Bt_start[0].detach().double().T @ experts.A_start[0].double()
    deltas = [
        scale * (b.double().T @ a.double() - start / 3)
        for a, b in zip(experts.A.detach(), experts.Bt.detach(), strict=True)
    ]
    want = cosines([delta.detach() for delta in deltas])
    assert torch.allclose(expert_similarity(site), want, atol=1e-6)


def test_vectors_by_hand(tiny_gpt2: Factory) -> None:
    site = first_site(tiny_gpt2(), "c_fc", kind="ia3")
    vectors = site.experts.vectors.detach()
    vectors.fill_(1)
    vectors[0, 0] = 3
    vectors[1, :2] = 2
    # diag(l - 1) W, and Conv1D keeps W transposed
    norms = site.weight.detach().double().norm(dim=0)
    want = norms[0] / (norms[0] ** 2 + norms[1] ** 2).sqrt()
    found = expert_similarity(site)
    assert found[0, 1] == found[1, 0] == pytest.approx(float(want), abs=1e-12)
    assert found[0, 0] == pytest.approx(1, abs=1e-12)
    # the third is still at its start
    assert found[2].isnan().all() and found[:, 2].isnan().all()
    assert 0.1 < want < 0.99
