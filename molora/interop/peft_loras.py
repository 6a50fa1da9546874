"""PEFT LoRAs as the experts of one bank.

    delta_e(x) = s_e B_e A_e x

Experts of different rank are padded with zeros, which changes no value. Every expert
keeps its own scale, layer by layer.

Shape legend
    E experts   I in features   O out features   r rank of one expert
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from molora.errors import CheckpointError
from molora.experts import LoRAExperts
from molora.hosts import find_host, host_of, sizes
from molora.interop.general import Subtract, subtract_general
from molora.interop.peft_folder import PeftLora, read_lora
from molora.interop.peft_targets import check_layers
from molora.layer import MoloraLinear
from molora.manifest import CONFIG, read_json


@dataclass
class Loras:
    """The adapters of one import.

    Attributes:
        loras: One for each expert.
        general: Those whose mean is taken from every expert.
        form: How it is taken.
        dropout: Of the bank, in training.
    """

    loras: list[PeftLora]
    general: list[PeftLora]
    form: Subtract
    dropout: float

    @classmethod
    def read(
        cls,
        folders: Sequence[str | Path],
        general: Sequence[str | Path],
        form: Subtract,
        dropout: float,
    ) -> "Loras":
        """Read the folders.

        Raises:
            CheckpointError: See ``read_lora``.
        """
        loras = [read_lora(folder) for folder in folders]
        return cls(loras, [read_lora(folder) for folder in general], form, dropout)

    @property
    def bases(self) -> dict[str, str | None]:
        """Base model that each folder names."""
        return {str(lora.folder): lora.base for lora in [*self.loras, *self.general]}

    @property
    def paths(self) -> list[str]:
        """Layers of any adapter."""
        return list(dict.fromkeys(path for lora in self.loras for path in lora.factors))

    def blocks(self, model: nn.Module, named: bool) -> dict[str, dict[str, Any]]:
        """Settings of the bank of every layer.

        Args:
            model: The base model.
            named: Whether each row names its adapter, which then may lack layers.

        Raises:
            CheckpointError: Adapters that do not fit each other or the model.
        """
        both = [*self.loras, *self.general]
        _check_targets(model, both, named, bool(self.general))
        if self.general:
            self.loras = [
                subtract_general(lora, self.general, self.form) for lora in self.loras
            ]
        return {path: _block(self.loras, path, self.dropout) for path in self.paths}

    @torch.no_grad()
    def fill(self, site: MoloraLinear) -> None:
        """Give a bank the factors at its layer."""
        experts = site.experts
        assert isinstance(experts, LoRAExperts)
        for e, lora in enumerate(self.loras):
            if site.path not in lora.factors:
                experts.A[e] = 0
                continue
            a_rI, b_Or = lora.factors[site.path]
            experts.A[e, : a_rI.shape[0]] = a_rI
            experts.Bt[e, : a_rI.shape[0]] = b_Or.t()


def _check_targets(
    model: nn.Module, loras: list[PeftLora], named: bool, general: bool
) -> None:
    """Refuse layers that the model lacks, and different ones unless rows name them."""
    first, modules = loras[0], dict(model.named_modules())
    why = "which goes with router.kind adapter or xlora only"
    if general:
        why = "but general adapters and experts need the same layers, with any router"
    for lora in loras:
        differing = sorted(lora.factors.keys() ^ first.factors.keys())
        if differing and (general or not named):
            raise CheckpointError(
                f"import_peft: {first.folder} and {lora.folder} have different target "
                f"layers, for example {differing[0]!r} is in one of them only, "
                f"{why}"
            )
        for path, (a_rI, b_Or) in lora.factors.items():
            module = modules.get(path)
            if find_host(module) is None:
                what = "which the model lacks"
                if module is not None:
                    what = "no layer that can hold experts"
                raise CheckpointError(f"{lora.folder}: targets {path!r}, {what}")
            assert module is not None
            host = host_of(module)
            if lora.forms[path] != (host.LORA[0], 2 + len(host.kernel(module))):
                name, axes = lora.forms[path]
                raise CheckpointError(
                    f"{lora.folder}: {path} holds {name} of {axes} axes, which is not "
                    f"for a {type(module).__name__} as the model has there"
                )
            if (a_rI.shape[1], b_Or.shape[0]) != sizes(module):
                raise CheckpointError(
                    f"{lora.folder}: {path} maps {a_rI.shape[1]} to {b_Or.shape[0]} "
                    f"features, in the model {' to '.join(map(str, sizes(module)))}"
                )
        _check_tables(lora, modules)
        config = read_json(lora.folder / CONFIG)
        check_layers(lora.folder, config, model, lora.factors)


def _check_tables(lora: PeftLora, modules: Mapping[str, nn.Module]) -> None:
    """Refuse frozen weights in a folder that are not those of the model."""
    for path, table in lora.tables.items():
        weight: Any = getattr(modules.get(path), "weight", None)
        same = weight is not None and weight.shape == table.shape
        if not same or not torch.equal(table.to(weight), weight):
            raise CheckpointError(
                f"{lora.folder}: holds a weight of {path} that is not the model's; it "
                "was trained on another base, or on a resized one. Load that base"
            )


def _block(loras: list[PeftLora], path: str, dropout: float) -> dict[str, Any]:
    # an adapter that lacks the layer keeps a rank of zeros there
    ranks = [
        lora.factors[path][0].shape[0] if path in lora.factors else 1 for lora in loras
    ]
    scales = [lora.scales.get(path, 1.0) for lora in loras]
    return {
        "kind": "lora",
        "num_experts": len(loras),
        "r": ranks,
        "lora_alpha": [scale * r for scale, r in zip(scales, ranks, strict=True)],
        "lora_dropout": dropout,
    }
