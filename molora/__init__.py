"""Mixtures of LoRA experts: wrap a model, train it, route per token, collapse."""

import importlib
from types import ModuleType

from molora.checkpoint import load as load
from molora.clusters import choose_num_experts as choose_num_experts
from molora.collapse.api import collapse as collapse
from molora.collapse.report import CollapseResult as CollapseResult
from molora.config import AdapterConfig as AdapterConfig
from molora.grow import grow as grow
from molora.interop.peft import export_peft as export_peft
from molora.interop.peft_experts import export_peft_experts as export_peft_experts
from molora.interop.peft_import import import_peft as import_peft
from molora.loftq import loftq_factors as loftq_factors
from molora.loftq import nf4 as nf4
from molora.masks import mask_by_magnitude as mask_by_magnitude
from molora.merging import merge as merge
from molora.merging import merge_costs as merge_costs
from molora.merging import unmerge as unmerge
from molora.model import after_optimizer_step as after_optimizer_step
from molora.model import disabled as disabled
from molora.model import prompts as prompts
from molora.model import record_routing as record_routing
from molora.model import tasks as tasks
from molora.model import unwrap as unwrap
from molora.model import wrap as wrap


def __getattr__(name: str) -> ModuleType:
    """Import ``molora.training`` when it is first used: the Trainer is slow to load."""
    if name == "training":
        return importlib.import_module("molora.training")
    raise AttributeError(f"module 'molora' has no attribute {name!r}")
