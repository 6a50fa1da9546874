"""Adapters of every family that PEFT has: what PEFT writes, what it has to read."""

from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

import molora

Factory = Any
IDS = torch.arange(1, 25).view(2, 12)
TARGETS = ["k_proj", "up_proj", "down_proj"]
"""Layers of 32 to 16, 32 to 64 and 64 to 32 features."""

BY_LAYER = {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"up_proj": 7}}
THEIRS: dict[str, list[peft.PeftConfig]] = {
    "adalora": [
        peft.AdaLoraConfig(
            target_modules=TARGETS, init_r=5, target_r=2, lora_alpha=9, total_step=9
        )
    ],
    "bitfit": [peft.BeftConfig(target_modules=TARGETS)],
    "boft": [
        peft.BOFTConfig(target_modules=TARGETS, boft_block_size=8),
        peft.BOFTConfig(target_modules=TARGETS, boft_block_num=4, boft_block_size=0),
    ],
    "dora": [
        peft.LoraConfig(target_modules=TARGETS, use_dora=True, r=4, lora_alpha=6),
        peft.LoraConfig(
            target_modules=TARGETS, use_dora=True, use_rslora=True, **BY_LAYER
        ),
    ],
    "ia3": [
        peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
        peft.IA3Config(target_modules=TARGETS, feedforward_modules=r".*\.0\..*_proj"),
    ],
    "loha": [
        peft.LoHaConfig(target_modules=TARGETS, r=4, alpha=6),
        peft.LoHaConfig(target_modules=TARGETS, **BY_LAYER),
    ],
    "lokr": [
        peft.LoKrConfig(target_modules=TARGETS, r=2, alpha=3, decompose_factor=4),
        peft.LoKrConfig(target_modules=TARGETS, **BY_LAYER),
        peft.LoKrConfig(target_modules=TARGETS, r=2, decompose_both=True),
    ],
    "oft": [
        peft.OFTConfig(target_modules=TARGETS, oft_block_size=8),
        peft.OFTConfig(target_modules=TARGETS, r=4, oft_block_size=0),
        peft.OFTConfig(
            target_modules=TARGETS, oft_block_size=4, use_cayley_neumann=False
        ),
        peft.OFTConfig(
            target_modules=TARGETS,
            oft_block_size=4,
            block_share=True,
            coft=True,
            eps=0.5,
        ),
    ],
    "sparse": [peft.ShiraConfig(target_modules=TARGETS, r=2, random_seed=3)],
    "vera": [
        peft.VeraConfig(target_modules=TARGETS, r=6),
        peft.VeraConfig(
            target_modules=TARGETS, r=6, save_projection=False, projection_prng_key=7
        ),
    ],
}
"""By family: what PEFT writes."""

LORA_BY_LAYER = [{"match": "up_proj", "experts": {"inner": {"kind": "lora", "r": 3}}}]
OURS: dict[str, dict[str, Any]] = {
    "adalora": {"experts": {"kind": "adalora", "init_r": 4}},
    "bitfit": {},
    "boft": {"experts": {"kind": "boft", "boft_block_size": 8}},
    "dora": {"overrides": LORA_BY_LAYER},
    "ia3": {"overrides": [{"match": "down", "experts": {"position": "input"}}]},
    "loha": {"overrides": [{"match": "down", "experts": {"r": 3, "alpha": 2.0}}]},
    "lokr": {"overrides": [{"match": "down", "experts": {"r": 2, "alpha": 2.0}}]},
    "oft": {"experts": {"kind": "oft", "oft_block_size": 8}},
    "sparse": {"experts": {"kind": "sparse", "r": 2}},
    "vera": {"experts": {"kind": "vera", "r": 6}},
}
"""By family: settings of a bank that PEFT has to read."""


def values(model: Any, seed: int = 0) -> None:
    """Change everything that an adapter trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.2 * noise.to(parameter.dtype))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.double().eval()(IDS).logits
    return out


def written(make: Factory, config: peft.PeftConfig, folder: Path, seed: int = 0) -> Any:
    """An adapter that PEFT made, with other values than those of its start."""
    theirs: Any = get_peft_model(make(), config)
    values(theirs, seed)
    theirs.save_pretrained(folder)
    return theirs


def in_peft(make: Factory, folder: Path) -> Any:
    """What PEFT loads, with every tensor of the file and no other."""
    theirs = PeftModel.from_pretrained(make(), folder)
    stored = load_file(folder / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(theirs)
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[key], stored[key]) for key in stored)
    return theirs


def wrapped(model: Any, kind: str, seed: int = 1, **more: Any) -> Any:
    raw = {"target_modules": TARGETS, "experts": {"kind": kind}} | OURS[kind] | more
    molora.wrap(model, molora.AdapterConfig.from_dict(raw))
    values(model, seed)
    return model
