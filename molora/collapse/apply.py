"""Putting one expert in the place of many: banks, the config that describes them, swap.

Shape legend: see factors.py.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from molora.collapse.factors import LowRank
from molora.config import AdapterConfig
from molora.experts import AbstractExperts, LoRAExperts
from molora.layer import MoloraLinear
from molora.model import sites
from molora.wrapped import runtime_of


def single_config(config: AdapterConfig, ranks: Mapping[str, int]) -> AdapterConfig:
    """Describe the same targets with one LoRA expert each and no router.

    lora_alpha equals r, so the scale is 1. Dropout and balance do not carry over.

    Args:
        config: Config of the mixture.
        ranks: Rank of each site, by module path.

    Returns:
        A config that ``wrap`` turns into banks of exactly these ranks: the most common
        rank, and one override for each site that differs.
    """
    usual = Counter(ranks.values()).most_common(1)[0][0]
    kept = {"target_modules", "exclude_modules"}
    return AdapterConfig.from_dict(
        {
            **config.model_dump(include=kept),
            "experts": {"kind": "lora", "num_experts": 1, **_scaled(usual)},
            "router": {"kind": "none"},
            "overrides": [
                {"match": f"^{re.escape(path)}$", "experts": _scaled(rank)}
                for path, rank in ranks.items()
                if rank != usual
            ],
        }
    )


def _scaled(rank: int) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": float(rank)}


def single_expert(
    site: MoloraLinear, delta: LowRank, config: AdapterConfig
) -> LoRAExperts:
    """Make the bank that holds one static update.

    Args:
        site: Where it will sit; device, mode and requires_grad are taken from it.
        delta: The update.
        config: What ``single_config`` returned.
    """
    settings = config.site(site.path).experts
    assert isinstance(settings, LoRAExperts.Config)
    bank = LoRAExperts(
        settings,
        in_features=site.in_features,
        out_features=site.out_features,
        generator=torch.Generator(),
    )
    with torch.no_grad():
        bank.A.copy_(delta.A_rI.unsqueeze(0))
        bank.Bt.copy_(delta.Bt_rO.unsqueeze(0))
    trained = any(p.requires_grad for p in site.experts.parameters())
    bank.requires_grad_(trained)
    bank.frozen_weight = site.experts.frozen_weight
    bank.frozen_bias = site.experts.frozen_bias
    return bank.to(site.base_weight().device).train(site.training)


def replace_banks(
    model: nn.Module, banks: Mapping[str, AbstractExperts], config: AdapterConfig
) -> Callable[[], None]:
    """Give sites other banks, without routers, and the model the config to match.

    Args:
        model: A wrapped model.
        banks: Bank of one expert for every site, by module path.
        config: What describes them.

    Returns:
        A function that puts everything back.
    """
    found = sites(model)
    assert banks.keys() == found.keys()
    before = [(s, s.experts, s.router, s.objectives) for s in found.values()]
    old_config, runtime = model.molora_config, runtime_of(model)
    asked = runtime.reads_prompt, runtime.shares

    def undo() -> None:
        runtime.reads_prompt, runtime.shares = asked
        for site, experts, router, objectives in before:
            site.experts, site.router, site.objectives = experts, router, objectives
        model.__dict__["molora_config"] = old_config

    # nothing is routed any more
    runtime.reads_prompt = runtime.shares = False
    for path, bank in banks.items():
        found[path].experts, found[path].router = bank, None
        found[path].objectives = []
    model.__dict__["molora_config"] = config
    return undo
