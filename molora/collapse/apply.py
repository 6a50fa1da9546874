"""Putting one expert in the place of many: banks, the config that describes them, swap.

Shape legend: see factors.py.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch
from torch import nn

from molora.collapse.factors import LowRank
from molora.config import AdapterConfig
from molora.experts import AbstractExperts, LoRAExperts
from molora.layer import MoloraLinear
from molora.model import sites
from molora.wrapped import runtime_of


def single_config(
    config: AdapterConfig,
    ranks: Mapping[str, int],
    found: Mapping[str, MoloraLinear],
) -> AdapterConfig:
    """Describe the same targets with one LoRA expert each and no router.

    lora_alpha equals r, so the scale is 1. Dropout and balance do not carry over; what
    LoftQ made of the base does.

    Args:
        config: Config of the mixture.
        ranks: Rank of each site, by module path.
        found: The sites.

    Returns:
        A config that ``wrap`` turns into banks of exactly these ranks: the most common
        settings, and one override for each site that differs.
    """
    loftq = any(_is_loftq(site.experts) for site in found.values())
    settings = {p: _settings(rank, found[p], loftq) for p, rank in ranks.items()}
    every = list(settings.values())
    usual = max(every, key=every.count)
    kept = {"target_modules", "exclude_modules"}
    return AdapterConfig.from_dict(
        {
            **config.model_dump(include=kept),
            "experts": {"kind": "lora", "num_experts": 1, **usual},
            "router": {"kind": "none"},
            "overrides": [
                {"match": f"^{re.escape(path)}$", "experts": own}
                for path, own in settings.items()
                if own != usual
            ],
        }
    )


def _settings(rank: int, site: MoloraLinear, any_loftq: bool) -> dict[str, Any]:
    """Of the expert of one site, with the start of LoftQ on the base that it made."""
    settings: dict[str, Any] = {"r": rank, "lora_alpha": float(rank)}
    if any_loftq:
        settings |= {"init_lora_weights": True, "loftq_r": None}
    if _is_loftq(site.experts):
        settings["init_lora_weights"] = site.experts.config.init_lora_weights
        settings["loftq_r"] = site.experts.A_start.shape[1]
    return settings


def _is_loftq(experts: AbstractExperts) -> TypeGuard[LoRAExperts]:
    """Whether experts stand on a base that lacks what they started at."""
    if not isinstance(experts, LoRAExperts):
        return False
    return experts.taken_off() != experts.correction


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
        if _is_loftq(site.experts):
            for name in bank.frozen:
                # the scale of the mixture goes into B
                factor = -site.experts.correction if name == "Bt_start" else 1.0
                values = site.experts.get_parameter(name)
                bank.get_parameter(name).copy_(factor * values)
    trained = any(p.requires_grad for p in site.experts.parameters())
    for name, values in bank.named_parameters():
        values.requires_grad_(trained and name not in bank.frozen)
    bank.frozen_weight = site.experts.frozen_weight
    bank.frozen_bias = site.experts.frozen_bias
    bank.in_nf4 = site.experts.in_nf4
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
