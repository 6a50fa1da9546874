"""Which layers get a bank, and of what size."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from transformers import PreTrainedModel

import molora
from molora.errors import ConfigError, WrapError
from molora.model import sites

Factory = Callable[..., PreTrainedModel]


def config(targets: Any = ("q_proj", "down_proj"), **kw: Any) -> molora.AdapterConfig:
    raw = {
        "target_modules": list(targets) if isinstance(targets, tuple) else targets,
        "experts": {"kind": "lora", "num_experts": 4, "r": 2},
        "router": {"kind": "topk"},
    }
    return molora.AdapterConfig.from_dict(raw | kw)


def test_what_gets_a_bank(tiny_llama: Factory, tiny_gpt2: Factory) -> None:
    every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    found = sites(molora.wrap(tiny_llama(), config("all-linear")))
    names = {path.split(".")[-1] for path in found}
    # the output head is no target of all-linear
    assert names == every | {"down_proj"}
    assert len(found) == 14
    tied = tiny_llama(tie_word_embeddings=True)
    assert len(sites(molora.wrap(tied, config("all-linear")))) == 14
    found = sites(molora.wrap(tiny_gpt2(), config("all-linear")))
    assert len(found) == 8
    assert "transformer.h.1.mlp.c_fc" in found
    regex = r"model\.layers\.1\..*(q|k)_proj"
    assert list(sites(molora.wrap(tiny_llama(), config(regex)))) == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
    ]
    suffix = config(("self_attn.q_proj", "layers.0.mlp.up_proj"))
    assert list(sites(molora.wrap(tiny_llama(), suffix))) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    for exclude in (["layers.0.self_attn.q_proj"], r".*layers\.0\..*q_proj"):
        found = sites(molora.wrap(tiny_llama(), config(exclude_modules=exclude)))
        assert len(found) == 3
        assert "model.layers.0.self_attn.q_proj" not in found
    head = molora.wrap(tiny_llama(), config(("lm_head",)))
    assert list(sites(head)) == ["lm_head"]


def test_overrides_by_layer(tiny_llama: Factory) -> None:
    overrides = [
        {"match": r"layers\.0\..*q_proj", "experts": {"num_experts": 2, "r": 3}},
        {"match": r"layers\.0\.", "experts": {"r": [1, 2, 3, 4]}},
        {"match": "down", "router": {"top_k": 3, "renormalize": False}},
        {"match": "q_proj", "experts": {"num_experts": 1}, "router": {"kind": "none"}},
    ]
    found: Any = sites(molora.wrap(tiny_llama(), config(overrides=overrides)))
    got = {
        path[len("model.layers.") :]: (
            tuple(site.experts.A.shape[:2]),
            site.experts.ranks,
            site.router and (site.router.config.top_k, site.router.config.renormalize),
        )
        for path, site in found.items()
    }
    assert got == {
        "0.self_attn.q_proj": ((2, 3), [3, 3], (2, True)),
        "0.mlp.down_proj": ((4, 4), [1, 2, 3, 4], (2, True)),
        "1.self_attn.q_proj": ((1, 2), [2], None),
        "1.mlp.down_proj": ((4, 2), [2] * 4, (3, False)),
    }


def test_layers_whose_parent_never_calls_them_are_refused() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2)

    with pytest.raises(WrapError, match=r"'mha\.out_proj' is part of nn.Multihead"):
        molora.wrap(Attention(), config("all-linear"))
    with pytest.raises(WrapError, match="all-linear finds no Linear or Conv1D"):
        molora.wrap(nn.Sequential(nn.ReLU()), config("all-linear"))


def test_override_behind_another_one_is_refused(tiny_llama: Factory) -> None:
    config = molora.AdapterConfig.from_dict(
        {
            "target_modules": ["q_proj"],
            "experts": {"kind": "lora"},
            "overrides": [
                {"match": "q_proj", "experts": {"r": 4}},
                {"match": "0.self_attn.q_proj", "experts": {"r": 2}},
            ],
        }
    )
    with pytest.raises(WrapError, match=r"overrides\[1\].*overrides\[0\]"):
        molora.wrap(tiny_llama(), config)


def test_nothing_to_balance_after_the_overrides_is_refused(tiny_llama: Factory) -> None:
    config = molora.AdapterConfig.from_dict(
        {
            "target_modules": ["q_proj"],
            "experts": {"kind": "lora", "num_experts": 4},
            "router": {"kind": "soft"},
            "balance": [{"kind": "switch", "weight": 0.01}],
            "overrides": [{"match": "q_proj", "experts": {"num_experts": 1}}],
        }
    )
    with pytest.raises(WrapError, match="nothing to balance"):
        molora.wrap(tiny_llama(), config)


def test_router_settings_for_one_expert_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"overrides\[0\].router"):
        molora.AdapterConfig.from_dict(
            {
                "target_modules": ["q_proj"],
                "experts": {"kind": "lora", "num_experts": 4},
                "router": {"kind": "soft"},
                "overrides": [
                    {
                        "match": "q",
                        "experts": {"num_experts": 1},
                        "router": {"temperature": 2.0},
                    }
                ],
            }
        )
