"""Published mixtures that are made of several registered parts, or of one setting.

A system that has a router, an expert family or a collapse method of its own stands in
the registry of that; ``molora methods`` prints both.
"""

from typing import NamedTuple


class System(NamedTuple):
    """One published system as settings of this package."""

    name: str
    paper: str
    made_of: str
    """Its parts, in the words of the YAML."""
    limitations: str
    """Where it differs from the authors' code, or what it cannot do."""
    config: str | None
    """File in configs/; None where it is no run of its own."""


SYSTEMS = [
    System(
        "MoLORA",
        "arXiv:2309.05444",
        "experts lora, router soft",
        "Each target layer routes by itself; no balance objective, as in the paper.",
        "molora.yaml",
    ),
    System(
        "MoV",
        "arXiv:2309.05444",
        "experts ia3, router soft",
        "Keys and values are routed by what their layer reads, not head by head; a "
        "mixture of vectors has no collapse.",
        "mov.yaml",
    ),
    System(
        "LoRAMoE",
        "arXiv:2312.09979",
        "experts lora, router soft, balance localized",
        "The paper's sign by default, the released code's as sign: code; one dropout "
        "mask serves all experts.",
        "loramoe.yaml",
    ),
    System(
        "HydraLoRA",
        "arXiv:2404.19245",
        "experts lora with shared: [A], router soft",
        "The number of experts is chosen beforehand, by molora clusters.",
        "hydralora.yaml",
    ),
    System(
        "MoLA",
        "arXiv:2402.08562",
        "layout, router topk, balance switch",
        "Each layer is balanced by itself; padding does not count.",
        "mola.yaml",
    ),
    System(
        "MixLoRA",
        "arXiv:2404.15159",
        "router topk or topp with scope: block and mix: block, balance switch",
        "Routers whose number of experts varies compute every expert. One expert can "
        "be kept (collapse select), no other collapse is offered.",
        "mixlora.yaml",
    ),
    System(
        "Mixture-of-LoRAs",
        "arXiv:2403.03432",
        "import_peft, train: router, balance domain, grow",
        "No code was published: the cross-entropy of each token and layer, and its "
        "weight, follow the paper's text.",
        "moa.yaml",
    ),
    System(
        "GenKnowSub",
        "2025.acl-short.54",
        "import_peft with general=[...], router arrow",
        "Updates are subtracted exactly, at the price of rank; general_form: factors "
        "is the authors' way.",
        None,
    ),
]
